"""The decoder's data and training module.

Shapes: N tokens of a batch, M supervised tokens, V vocabulary.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor

from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.collection import DataSource, progress, read_sources
from mmtx.data.packing import Batch, PackedBatches
from mmtx.data.tokens import Augmentation, Documents, seed_of
from mmtx.errors import InputError
from mmtx.modality.base import load_tokenizer
from mmtx.model import CodeRange, Decoder, DecoderConfig
from mmtx.pipeline import Model, find_shipped
from mmtx.training.loader import ResumableLoader
from mmtx.training.optimizer import OptimizerConfig, configure
from mmtx.vocabulary import MODALITIES, Vocabulary


@dataclass(frozen=True)
class TokenizerFolders:
    """Where the tokenizers lie; leave out image or audio for a model without it."""

    text: str
    image: str | None = None
    audio: str | None = None


class DecoderData(LightningDataModule):
    """Samples -> documents of codes and features -> packed batches."""

    def __init__(
        self,
        tokenizers: TokenizerFolders,
        train: list[DataSource],
        validation: list[DataSource],
        tokens: int = 4096,
        context: int = 1024,
        image_augmentation: ImageAugmentation | None = None,
        audio_augmentation: AudioAugmentation | None = None,
        workers: int = 0,
        max_bad: float = 0.01,
        seed: int = 0,
    ):
        """
        Args:
            tokenizers: folders of the tokenizers.
            train: what to learn from.
            validation: held-out samples, for losses and shown captions.
            tokens: tokens of a batch on each device.
            context: longest document in tokens.
            image_augmentation: changes to pictures, new ones each time; none by default.
            audio_augmentation: changes to sounds, new ones each time; none by default.
            workers: processes that read and encode media and put batches together.
            max_bad: share of samples that may be unreadable.
            seed: fixes order and augmentation.
        """
        super().__init__()
        self.context, self.tokens, self.workers = context, tokens, workers
        self.max_bad, self.seed = max_bad, seed
        self.train_sources, self.validation_sources = train, validation
        self.augmentation = Augmentation(image_augmentation, audio_augmentation)
        folders = {kind: folder for kind, folder in asdict(tokenizers).items() if folder is not None}
        self.tokenizers = {kind: load_tokenizer(find_shipped(folder)) for kind, folder in folders.items()}
        for kind, tokenizer in self.tokenizers.items():
            if tokenizer.kind != kind:
                raise InputError(f"tokenizers.{kind}: {folders[kind]} holds a tokenizer for {tokenizer.kind}")
        self.vocabulary = Vocabulary.build(self.tokenizers)

    def setup(self, stage: str) -> None:
        if hasattr(self, "train_documents"):
            return
        samples, repeats = read_sources(self.train_sources, self.max_bad)
        self.held_out, _ = read_sources(self.validation_sources, self.max_bad)
        common = dict(context=self.context, seed=self.seed, max_bad=self.max_bad)
        self.validation_documents = Documents(
            self.held_out, self.tokenizers, self.vocabulary, progress=progress("read validation"), **common)
        self.train_documents = Documents(
            samples, self.tokenizers, self.vocabulary, augmentation=self.augmentation, progress=progress("read train"),
            **common)
        self.repeats = [repeats[number] for number in self.train_documents.numbers]

    def sample_names(self, batch: Batch) -> list[str]:
        """File and row of each sample of a training batch."""
        return [self.train_documents.samples[number].where for number in batch.samples.tolist()]

    def train_dataloader(self) -> ResumableLoader:
        trainer = self.trainer
        batches = PackedBatches(
            self.train_documents, self.vocabulary, self.tokens, repeats=self.repeats, seed=self.seed,
            steps=trainer.max_steps * trainer.accumulate_grad_batches, rank=trainer.global_rank,
            world=trainer.world_size)
        return ResumableLoader(batches, self.workers)

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader(PackedBatches(
            self.validation_documents, self.vocabulary, self.tokens, shuffle=False,
            rank=self.trainer.global_rank, world=self.trainer.world_size))


class DecoderModule(LightningModule):
    """Next-token training of the decoder; sizes that follow from the tokenizers are filled in from the data."""

    def __init__(
        self,
        decoder: DecoderConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        z_loss: float = 1e-5,
        continuous: bool = False,
    ):
        """
        Args:
            decoder: sizes of the network; `vocabulary_size`, `composed` and `features` come from the tokenizers.
            optimizer: learning rate and schedule.
            z_loss: weight of the squared log-sum-exp of the scores, which keeps them from drifting.
            continuous: let pictures and sounds of user turns enter as the features that their encoder saw before the
                quantizer. What is generated is made of codes either way.
        """
        super().__init__()
        self.config, self.optimizer_config = decoder, optimizer
        self.z_loss, self.continuous = z_loss, continuous
        self.decoder: Decoder | None = None

    def configure_model(self) -> None:
        if self.decoder is not None:
            return
        data = self.trainer.datamodule
        vocabulary = data.vocabulary
        ranges = [CodeRange(vocabulary.range(kind).start, levels) for kind in vocabulary.kinds
                  if (levels := vocabulary.levels(kind))]
        widths = {kind: data.tokenizers[kind].feature_width for kind in vocabulary.kinds if vocabulary.levels(kind)}
        self.config = replace(self.config, vocabulary_size=vocabulary.size, composed=tuple(ranges),
                              features=widths if self.continuous else {})
        self.decoder = Decoder(self.config)

    def configure_optimizers(self) -> dict:
        return configure(self.decoder, self.optimizer_config, self.trainer.max_steps)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss, log_sum = self._losses(batch)
        self.seen = loss.detach(), log_sum.detach()  # for telemetry
        self.count += len(batch.targets)
        self.log("train/loss", loss.detach().mean(), prog_bar=True)
        # The sum, not the mean: `on_before_optimizer_step` divides by all targets of the step at once.
        return (loss + self.z_loss * log_sum.square()).sum() * self.trainer.accumulate_grad_batches

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        if index % self.trainer.accumulate_grad_batches == 0:
            self.count = torch.zeros((), device=self.device)
        torch.manual_seed(seed_of(self.trainer.datamodule.seed, index, self.global_rank))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Ranks average their gradients; the right divisor is the number of targets of all ranks.
        world = self.trainer.world_size
        count = self.all_gather(self.count).sum() if world > 1 else self.count
        self.gradient_scale = world / count.clamp_min(1)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.gradient_scale)

    def validation_step(self, batch: Batch, index: int) -> None:
        loss, _ = self._losses(batch)
        self.log("val/loss", loss.mean(), batch_size=len(loss), sync_dist=True)
        for number in self.trainer.datamodule.validation_documents.modalities:
            chosen = batch.modality == number
            if chosen.any():
                self.log(f"val/loss_{MODALITIES[number]}", loss[chosen].mean(), batch_size=int(chosen.sum()),
                         prog_bar=True)

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and log-sum-exp of the scores of each target, (M,) both.

        Where the grammar allows no code, the scores of codes are left out of the softmax: they are most of the
        vocabulary, and generation never looks at them there.
        """
        hidden = self.decoder(batch.ids, batch.positions, batch.packing, batch.features).flatten(0, 1)[batch.supervised]
        losses, sums = [], []
        for states, targets, plain in (
            (hidden[:batch.plain], batch.targets[:batch.plain], True),
            (hidden[batch.plain:], batch.targets[batch.plain:], False),
        ):
            if len(targets):
                scores = self.decoder.logits(states, self.decoder.output_matrix(plain)).float()
                log_sum = scores.logsumexp(-1)
                sums.append(log_sum)
                losses.append(log_sum - scores.gather(1, targets[:, None]).squeeze(1))
        return torch.cat(losses), torch.cat(sums)

    def model(self) -> Model:
        """The decoder with its tokenizers, for captions during training and for saving."""
        data = self.trainer.datamodule
        return Model(self.decoder, data.vocabulary, data.tokenizers)

    def save(self, folder: Path) -> None:
        self.model().save(folder)
