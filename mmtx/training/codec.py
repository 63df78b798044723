"""Training modules of codecs: the base of all, and those of pictures and sounds.

Shapes: B batch, C channels, H height, W width, F frames, M mels, K codes in the codebook.
"""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from mmtx.errors import InputError
from mmtx.modality.audio import AudioConfig, AudioTokenizer
from mmtx.modality.autoencoder import ENCODING, Codec, Reconstruction
from mmtx.modality.base import load_tokenizer
from mmtx.modality.image import ImageConfig, ImageTokenizer
from mmtx.modality.vocoder import hertz
from mmtx.schema import typed, within
from mmtx.shipped_files import find_shipped
from mmtx.training.codec_data import CodecBatch
from mmtx.training.discriminator import MOST_WEIGHT, AdversarialConfig, Discriminator, Perceptual, PerceptualConfig, adaptive_weight
from mmtx.training.module import Means, TrainingModule, sum_over_ranks
from mmtx.training.optimizer import OptimizerConfig, configure

COLLAPSED = 1 / 3  # a codec whose codes carry a smaller share of the bits that they could is reported as collapsed
AT_ONCE = 64       # pictures compared at a time: each needs about a hundred times its size as working memory
WINDOW = 11        # pixels per side of the SSIM window


class CodebookUsage(NamedTuple):
    """How much of a codebook is in use."""

    perplexity: float
    dead: float               # share of codes that never occurred
    levels: tuple[int, ...]   # number of levels in use, for each digit of the codes
    carried: float            # entropy without the most common code, as a share of the most that so many codes could have

    @classmethod
    def of(cls, counts: Tensor, levels: tuple[int, ...]) -> "CodebookUsage":
        """`counts` (K,) of each code; the most common may be silence or blank paper, which is no sign of a collapse."""
        counts = counts.double().cpu()
        rest = counts.clone()
        rest[counts.argmax()] = 0
        most = math.log(max(2, min(len(counts), int(counts.sum()))))
        grid = counts.view(*reversed(levels))
        digits = [grid.movedim(-1 - digit, 0).reshape(levels[digit], -1).sum(1) for digit in range(len(levels))]
        return cls(math.exp(_entropy(counts)), float((counts == 0).double().mean()),
                   tuple(int((digit > 0).sum()) for digit in digits), _entropy(rest) / most)


def _entropy(counts: Tensor) -> float:
    """Entropy in nats."""
    return float(torch.special.entr(counts / counts.sum().clamp_min(1)).sum())


def load_matching(folder: str | Path, like: Codec, name: str) -> Codec:
    """The tokenizer in the folder of option `name`. Raises InputError unless it has the kind and configuration of `like`."""
    tokenizer = cast(Codec, load_tokenizer(find_shipped(folder)))
    if tokenizer.kind != like.kind or tokenizer.config != like.config:
        raise InputError(f"{name}: {folder} holds a tokenizer for {tokenizer.kind} with {tokenizer.config}, "
                         f"expected {like.kind} with {like.config}")
    return tokenizer


class CodecModule(TrainingModule):
    """Training of any codec: squared error plus a share of absolute error and, optionally, the loss of a discriminator.

    Codec and discriminator step together, as parameter groups of one optimizer, so that gradient accumulation, several devices,
    averaged weights and resuming work the same with and without a discriminator.
    """

    tokenizer: Codec
    perceptual: Perceptual | None = None

    @typed
    def __init__(self, tokenizer: Codec, optimizer: OptimizerConfig = OptimizerConfig(), l1_weight: float = 0.2,
                 refine: str | None = None, adversarial: AdversarialConfig | None = None, init_from: str | None = None, *,
                 channels: int = 1):
        """
        Args:
            tokenizer: the codec, for example of a plugin's class.
            optimizer: learning rate and schedule.
            l1_weight: weight of the absolute error relative to the squared error.
            refine: folder of a finished tokenizer of this configuration, of which only the part that decodes is trained
                further. Its codes and fingerprint do not change, so models trained with it remain valid.
            adversarial: a discriminator that learns to tell reconstructions from originals; none by default.
            init_from: folder of a finished tokenizer whose weights to start from, encoder included, so that its codes change;
                rows and columns that its matrices lack start at zero.
            channels: channels of the discriminator's input (B, channels, H, W); 1 for (B, H, W).
        """
        super().__init__()
        within("model.l1_weight", l1_weight, 0, MOST_WEIGHT)
        if refine is not None and init_from is not None:
            raise InputError(f"refine: found {refine} with init_from {init_from}, which would change its codes, expected one of them")
        if init_from is not None:
            grow(tokenizer, cast(Codec, load_tokenizer(find_shipped(init_from))))
        if refine is not None:
            tokenizer = load_matching(refine, tokenizer, "refine").train()
            for name in ENCODING:
                getattr(tokenizer.network, name).requires_grad_(False)
        self.tokenizer, self.optimizer_config, self.l1_weight = tokenizer, optimizer, l1_weight
        self.adversarial = adversarial
        self.discriminator = Discriminator(channels, adversarial) if adversarial else None

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        more = []
        if self.discriminator is not None:
            more.append({"params": list(self.discriminator.parameters()), "lr": self.adversarial.learning_rate,
                         "betas": (0.5, 0.9), "weight_decay": 0.0})
        return configure(self.tokenizer, self.optimizer_config, self.trainer.max_steps, more, precision=self.trainer.precision)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if self.discriminator is None or not gradient_clip_val:
            return super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        # Clipped separately; otherwise steep gradients of the discriminator would scale down the codec's.
        clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
        for groups in (optimizer.param_groups[:-1], optimizer.param_groups[-1:]):
            clip([parameter for group in groups for parameter in group["params"]], gradient_clip_val)

    def restore(self, folder: Path) -> None:
        """Load the finished tokenizer in a folder, which must have this configuration."""
        self.tokenizer = load_matching(folder, self.tokenizer, "output")

    def loss(self, media: Tensor, output: Tensor) -> Tensor:
        return self.distance(media, output)

    def distance(self, media: Tensor, output: Tensor) -> Tensor:
        """Squared error plus a share of absolute error."""
        error = self.shown(output) - self.shown(media)
        return error.square().mean() + self.l1_weight * error.abs().mean()

    def shown(self, media: Tensor) -> Tensor:
        """The part of media that is compared and that the discriminator sees."""
        return media

    def training_step(self, batch: CodecBatch, index: int) -> Tensor:
        output = self.tokenizer(batch.media).output
        loss = self.loss(batch.media, output)
        self.log("train/loss", loss, prog_bar=True)
        if self.perceptual is not None:
            distance = self.perceptual(output, batch.media)
            self.log("train/perceptual", distance)
            loss = loss + self.perceptual.config.weight * distance
        if self.discriminator is not None:
            loss = loss + self._adversarial(loss, output, batch.media)
        return loss

    def _adversarial(self, rest: Tensor, output: Tensor, media: Tensor) -> Tensor:
        """The adversarial losses of codec and discriminator, added; neither has a gradient for the weights of the other."""
        if self.global_step < self.adversarial.start_step:
            return self.discriminator.zero_loss()
        shown = self.shown(output)
        judged, mistake = self.discriminator.generator_loss(shown), self.discriminator.discriminator_loss(shown, self.shown(media))
        scale = adaptive_weight(judged, rest, output)
        self.log_dict({"train/adversarial": judged, "train/discriminator": mistake, "train/adversarial_scale": scale})
        return self.adversarial.weight * scale * judged + mistake

    def on_validation_epoch_start(self) -> None:
        self.used = torch.zeros(self.tokenizer.size, dtype=torch.long, device=self.device)
        self.means = Means()

    def validation_step(self, batch: CodecBatch, index: int) -> None:
        result = self.tokenizer(batch.media)
        if not len(batch.samples):
            return
        self.used += torch.bincount(result.codes.flatten(), minlength=len(self.used))
        for name, (total, count) in self.quality(batch.media, result).items():
            self.means.add(name, total, count)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.figures(self.means.compute()).items():
            self.log(f"{self.split}/{name}", value, prog_bar=name != "loss", sync_dist=True)
        used = sum_over_ranks(self.used)
        usage = CodebookUsage.of(used, self.tokenizer.levels)
        self.log(f"{self.split}/perplexity", usage.perplexity, prog_bar=True, sync_dist=True)
        self.log(f"{self.split}/dead_codes", usage.dead, sync_dist=True)
        if usage.carried < COLLAPSED and self.trainer.is_global_zero:
            print(f"mmtx: step {self.global_step}: {self.tokenizer.kind} codes collapse: {int((used > 0).sum())} of "
                  f"{len(used)} in use on {int(used.sum())} held-out patches, perplexity {usage.perplexity:.1f}, "
                  f"levels in use {usage.levels} of {self.tokenizer.levels}; lower optimizer.learning_rate and "
                  "optimizer.muon_lr, take fewer levels in tokenizer.network.levels, or see whether the data vary enough",
                  file=sys.stderr)

    def quality(self, media: Tensor, result: Reconstruction) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Figures of a batch by name: sum and count."""
        return {"loss": (self.distance(media, result.output) * len(media), len(media))}

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        """Means over all held-out media -> figures to log."""
        return means

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save(folder)


class ImageCodecModule(CodecModule):
    """Training of an image tokenizer."""

    @typed
    def __init__(self, tokenizer: ImageConfig = ImageConfig(), *args: Any, perceptual: PerceptualConfig | None = None,
                 **options: Any):
        """
        Args:
            tokenizer: patches, size rules and network.
            perceptual: a pretrained network in whose features reconstructions are compared with originals; none by default.
            *args: of `CodecModule`.
            **options: of `CodecModule`.
        """
        super().__init__(ImageTokenizer(tokenizer), *args, channels=3, **options)
        self.perceptual = Perceptual(perceptual) if perceptual else None

    def quality(self, media: Tensor, result: Reconstruction) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Loss, peak signal-to-noise ratio in dB and structural similarity."""
        found = {name: (mean * len(media), len(media)) for name, mean in picture_quality(media, result.output).items()}
        return {**super().quality(media, result), **found}


def picture_quality(media: Tensor, output: Tensor) -> dict[str, Tensor]:
    """PSNR in dB, at most 100, and SSIM of pictures (B, 3, H, W) in [-1, 1], as means over pictures.

    Both are computed on intensities in [0, 1]: SSIM's luminance term is meaningless for negative ones. Variances of flat
    regions need double precision, without which SSIM is off there by up to 1e-3. Pictures no larger than its window have none.
    """
    precise = torch.float32 if media.device.type == "mps" else torch.float64
    psnr: list[Tensor] = []
    ssim: list[Tensor] = []
    for some, made in zip(media.split(AT_ONCE), output.split(AT_ONCE), strict=True):
        wanted, found = (some.to(precise) + 1) / 2, (made.to(precise).clamp(-1, 1) + 1) / 2
        psnr.append(peak_signal_noise_ratio(found, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3)).clamp_max(100))
        if min(media.shape[-2:]) > WINDOW:
            alike = structural_similarity_index_measure(found, wanted, data_range=1.0, kernel_size=WINDOW, reduction="none")
            ssim.append(cast(Tensor, alike))
    return {name: torch.cat(values).mean() for name, values in (("psnr_db", psnr), ("ssim", ssim)) if values}


class Pitch(NamedTuple):
    """Sums over the frames of a batch that have a clear pitch."""

    loss: Tensor    # cross-entropy
    wrong: Tensor   # number of frames more than 50 cents off
    frames: Tensor  # number of frames


@torch.no_grad()
def grow(codec: Codec, smaller: Codec) -> None:
    """Give a codec the weights of a finished one, padded with zeros where its own are larger."""
    if smaller.kind != codec.kind:
        raise InputError(f"init_from: found a tokenizer for {smaller.kind}, expected one for {codec.kind}")
    given = smaller.network.state_dict()
    for name, own in codec.network.state_dict().items():
        old = given.get(name)
        if old is None or old.dim() != own.dim() or any(n > m for n, m in zip(old.shape, own.shape)):
            raise InputError(f"init_from: {name} has the shape {None if old is None else list(old.shape)}, "
                             f"expected {list(own.shape)} or smaller")
        own.zero_()[tuple(slice(n) for n in old.shape)] = old


class AudioCodecModule(CodecModule):
    """Training of an audio tokenizer."""

    tokenizer: AudioTokenizer

    @typed
    def __init__(self, tokenizer: AudioConfig = AudioConfig(), *args: Any, pitch_weight: float = 0.1, **options: Any):
        """
        Args:
            tokenizer: spectrogram, patches and network.
            pitch_weight: weight of the cross-entropy of the pitch, for a tokenizer with `pitch`.
            *args: of `CodecModule`.
            **options: of `CodecModule`.
        """
        within("model.pitch_weight", pitch_weight, 0, MOST_WEIGHT)
        super().__init__(AudioTokenizer(tokenizer), *args, channels=1, **options)
        self.pitch_weight = pitch_weight

    def loss(self, media: Tensor, output: Tensor) -> Tensor:
        loss = self.distance(media, output)
        if not self.tokenizer.config.pitch:
            return loss
        pitch = self._pitch(media, output)
        return loss + self.pitch_weight * pitch.loss / pitch.frames.clamp_min(1)

    def shown(self, media: Tensor) -> Tensor:
        return self.tokenizer.mel_part(media)

    def _pitch(self, media: Tensor, output: Tensor) -> Pitch:
        wanted, found = (x[..., self.tokenizer.config.mels:] for x in (media, output))
        clear = wanted.amax(-1) > 0                                                     # (B, F)
        loss = -(wanted.softmax(-1) * found.log_softmax(-1)).sum(-1)
        wrong = (hertz(found) / hertz(wanted)).log2().abs() * 1200 > 50
        return Pitch((loss * clear).sum(), (wrong & clear).sum(), clear.sum())

    def quality(self, media: Tensor, result: Reconstruction) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Loss, mean absolute error of the log-mel spectrogram in dB and, over frames with a clear pitch, errors of the pitch."""
        error = (self.shown(result.output) - self.shown(media)).abs().mean()
        found = {**super().quality(media, result), "mel_error_db": (AudioTokenizer.decibels(error) * len(media), len(media))}
        if self.tokenizer.config.pitch:
            pitch = self._pitch(media, result.output)
            found |= {"pitch_loss": (pitch.loss, pitch.frames), "wrong_pitch": (pitch.wrong, pitch.frames)}
        return found

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        pitch = self.pitch_weight * means.get("pitch_loss", 0.0)
        return {name: value + pitch if name == "loss" else value for name, value in means.items() if name != "pitch_loss"}
