"""Data and training module of the image and the audio codec.

Shapes: B batch, C channels, H height, W width, S samples, F frames, M mels.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import Dataset

from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.collection import DataSource, progress, read_sources
from mmtx.data.sample import Media, Sample
from mmtx.data.sources import SkipCounter
from mmtx.data.tokens import load_media, seed_of
from mmtx.errors import InputError
from mmtx.modality.audio import AudioConfig, AudioTokenizer
from mmtx.modality.autoencoder import Codec, Reconstruction
from mmtx.modality.image import ImageConfig, ImageTokenizer, to_float
from mmtx.training.loader import ResumableLoader
from mmtx.training.optimizer import OptimizerConfig, configure


class CodecBatch(NamedTuple):
    """Media of one size, as the codec's `forward` takes them."""

    media: Tensor  # (B, 3, H, W) in [-1, 1] or log-mel (B, F, M)


class CodecBatches(Dataset):
    """Batch k of media, as a pure function of (seed, k, rank)."""

    def __init__(self, media: list[Tensor], cut, finish, batch: int, seed: int, steps: int, rank: int, world: int,
                 weights: Tensor | None):
        """`cut(medium, generator)` gives items of one size, `finish(batch)` what the codec takes."""
        self.media, self.cut, self.finish, self.batch, self.steps = media, cut, finish, batch, steps
        self.seed, self.rank, self.world, self.weights = seed, rank, world, weights

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, k: int) -> CodecBatch:
        generator = torch.Generator().manual_seed(seed_of(self.seed, k, self.rank))
        if self.weights is None:  # validation: each item once, in order
            chosen = range((k * self.world + self.rank) * self.batch, (k * self.world + self.rank + 1) * self.batch)
            chosen = [i for i in chosen if i < len(self.media)]
        else:
            chosen = torch.multinomial(self.weights, self.batch, replacement=True, generator=generator).tolist()
        return CodecBatch(self.finish(torch.stack([self.cut(self.media[i], generator) for i in chosen])))


class CodecData(LightningDataModule):
    """Pictures or sounds, read and checked once before training, cut and augmented by index."""

    def __init__(
        self,
        train: list[DataSource],
        validation: list[DataSource],
        batch: int = 32,
        frames: int = 64,
        image_augmentation: ImageAugmentation | None = None,
        audio_augmentation: AudioAugmentation | None = None,
        workers: int = 0,
        max_bad: float = 0.01,
        seed: int = 0,
    ):
        """
        Args:
            train: what to learn from; only media of the codec's kind are used.
            validation: held-out media.
            batch: pictures or cuts of sound in a step on each device.
            frames: spectrogram frames of a cut; the audio codec only.
            image_augmentation: changes to every second picture, none by default.
            audio_augmentation: changes to every second cut of sound, none by default.
            workers: processes that put batches together.
            max_bad: share of samples that may be unreadable.
            seed: fixes order, cuts and augmentation.
        """
        super().__init__()
        self.train_sources, self.validation_sources = train, validation
        self.batch, self.frames, self.workers, self.max_bad, self.seed = batch, frames, workers, max_bad, seed
        self.image_augmentation, self.audio_augmentation = image_augmentation, audio_augmentation

    def setup(self, stage: str) -> None:
        if hasattr(self, "train_media"):
            return
        self.tokenizer: Codec = self.trainer.lightning_module.tokenizer
        samples, repeats = read_sources(self.train_sources, self.max_bad)
        held_out, _ = read_sources(self.validation_sources, self.max_bad)
        self.validation_media, _ = self._load(held_out, [1] * len(held_out), "read validation")
        self.train_media, self.weights = self._load(samples, repeats, "read train")

    def _load(self, samples: list[Sample], repeats, name: str) -> tuple[list[Tensor], Tensor]:
        skipped, media, weights = SkipCounter(self.max_bad), [], []
        for sample, repeat in progress(name)(list(zip(samples, repeats, strict=True))):
            for part in (part for turn in sample.turns for part in turn.parts if isinstance(part, Media)):
                if part.kind != self.tokenizer.kind:
                    continue
                try:
                    tensor = load_media(part, {part.kind: self.tokenizer})
                except InputError as error:
                    skipped.skip(error)
                    continue
                media.append(tensor)
                # Long sounds have more to show than short ones.
                weights.append(float(repeat) * (tensor.shape[-1] if part.kind == "audio" else 1))
        skipped.check(len(samples))
        if not media:
            raise InputError(f"{name}: no {self.tokenizer.kind} among {len(samples)} samples")
        return media, torch.tensor(weights, dtype=torch.float64)

    def _picture(self, picture: Tensor, generator: torch.Generator, augmentation) -> Tensor:
        if augmentation and torch.rand((), generator=generator) < 0.5:
            picture = augmentation(picture, generator)
        return picture

    def _cut(self, waveform: Tensor, generator: torch.Generator, augmentation) -> Tensor:
        samples = self.frames * self.tokenizer.config.hop
        first = int(torch.randint(max(1, len(waveform) - samples + 1), (), generator=generator))
        cut = waveform[first:first + samples]
        if augmentation and torch.rand((), generator=generator) < 0.5:
            cut = augmentation(cut, self.tokenizer.rate, generator)
        return torch.nn.functional.pad(cut, (0, samples - len(cut)))

    def _loader(self, media: list[Tensor], steps: int, weights: Tensor | None) -> ResumableLoader:
        cut, augmentation, finish = self._cut, self.audio_augmentation, lambda batch: self.tokenizer.spectrogram(batch)
        if self.tokenizer.kind == "image":
            cut, augmentation, finish = self._picture, self.image_augmentation, to_float
            if len({tuple(picture.shape) for picture in media}) > 1:
                raise InputError("pictures of different sizes: training needs `side` with fit \"pad\" or \"crop\"")
        augmentation = augmentation if weights is not None else None
        return ResumableLoader(CodecBatches(
            media, lambda item, generator: cut(item, generator, augmentation), finish, self.batch, self.seed, steps,
            self.trainer.global_rank, self.trainer.world_size, weights), self.workers)

    def train_dataloader(self) -> ResumableLoader:
        steps = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return self._loader(self.train_media, steps, self.weights)

    def val_dataloader(self) -> ResumableLoader:
        steps = len(self.validation_media) // (self.batch * self.trainer.world_size)
        return self._loader(self.validation_media, max(1, steps), None)


class CodecModule(LightningModule):
    """Reconstruction training of a codec: squared error plus a share of absolute error."""

    tokenizer: Codec

    def __init__(self, tokenizer: Codec, optimizer: OptimizerConfig, absolute: float):
        super().__init__()
        self.tokenizer, self.optimizer_config, self.absolute = tokenizer, optimizer, absolute

    def configure_optimizers(self) -> dict:
        return configure(self.tokenizer, self.optimizer_config, self.trainer.max_steps)

    def loss(self, media: Tensor, output: Tensor) -> Tensor:
        error = output - media
        return error.square().mean() + self.absolute * error.abs().mean()

    def on_train_batch_start(self, batch: CodecBatch, index: int) -> None:
        torch.manual_seed(seed_of(self.trainer.datamodule.seed, index, self.global_rank))

    def training_step(self, batch: CodecBatch, index: int) -> Tensor:
        loss = self.loss(batch.media, self.tokenizer(batch.media).output)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.used = torch.zeros(self.tokenizer.size, device=self.device)

    def validation_step(self, batch: CodecBatch, index: int) -> None:
        result = self.tokenizer(batch.media)
        self.used += torch.bincount(result.codes.flatten(), minlength=len(self.used))
        size = len(batch.media)
        self.log("val/loss", self.loss(batch.media, result.output), batch_size=size, sync_dist=True)
        self.log(f"val/{self.quality_name}", self.quality(batch.media, result), prog_bar=True, batch_size=size,
                 sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        used = self.all_gather(self.used).reshape(-1, len(self.used)).sum(0)
        share = used / used.sum()
        self.log("val/perplexity", torch.exp(-torch.xlogy(share, share).sum()), prog_bar=True)
        self.log("val/codes_used", (used > 0).float().mean())

    quality_name: str

    def quality(self, media: Tensor, result: Reconstruction) -> Tensor:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder)


class ImageCodecModule(CodecModule):
    """Training of an image tokenizer."""

    quality_name = "psnr_db"

    def __init__(self, tokenizer: ImageConfig = ImageConfig(), optimizer: OptimizerConfig = OptimizerConfig(),
                 absolute: float = 0.2):
        """
        Args:
            tokenizer: patches, size rules and network.
            optimizer: learning rate and schedule.
            absolute: weight of the absolute error beside the squared one.
        """
        super().__init__(ImageTokenizer(tokenizer), optimizer, absolute)

    def quality(self, media: Tensor, result: Reconstruction) -> Tensor:
        """Peak signal-to-noise ratio in dB, the mean over pictures."""
        error = (result.output.clamp(-1, 1) - media).square().mean((1, 2, 3)) / 4
        return (-10 * error.clamp_min(1e-10).log10()).mean()


class AudioCodecModule(CodecModule):
    """Training of an audio tokenizer."""

    quality_name = "mel_error_db"

    def __init__(self, tokenizer: AudioConfig = AudioConfig(), optimizer: OptimizerConfig = OptimizerConfig(),
                 absolute: float = 0.2):
        """
        Args:
            tokenizer: spectrogram, patches and network.
            optimizer: learning rate and schedule.
            absolute: weight of the absolute error beside the squared one.
        """
        super().__init__(AudioTokenizer(tokenizer), optimizer, absolute)

    def quality(self, media: Tensor, result: Reconstruction) -> Tensor:
        """Mean absolute error of the log-mel spectrogram in dB."""
        return AudioTokenizer.decibels((result.output - media).abs().mean())
