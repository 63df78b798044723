"""Data and training module of the vocoder, which learns to synthesise sound from the spectrograms that a finished codec decodes.

Shapes: B batch, S samples, F frames, M mels.
"""

import math
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Generator, Tensor

from mmtx.errors import InputError
from mmtx.modality.audio import AudioTokenizer
from mmtx.modality.base import load_tokenizer
from mmtx.modality.vocoder import CENTS, CLARITY, LOWEST, PITCHES, VocoderConfig, hertz, track_frames
from mmtx.schema import typed, within
from mmtx.shipped_files import find_shipped
from mmtx.training.codec_data import CodecBatch, CodecData
from mmtx.training.discriminator import MOST_WEIGHT
from mmtx.training.module import Means, TrainingModule
from mmtx.training.optimizer import OptimizerConfig, configure

# (FFT size, hop, window) in samples. PUBLISHED are those of Parallel WaveGAN (https://arxiv.org/abs/1910.11480).
PUBLISHED = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
TRAINING = ((512, 128, 512), (1024, 256, 1024), (2048, 512, 2048))  # a third of the work


class VocoderData(CodecData):
    """Cuts of sound as waveforms, (B, S)."""

    def __init__(self, *args, steps: int = 32, **kwargs):
        """
        Args:
            steps: time steps of the codec per cut, at most its chunk.
        """
        super().__init__(*args, **kwargs)
        within("data.steps", steps, 1, 2**24)
        self.steps = steps

    def setup(self, stage: str) -> None:
        within("data.steps", self.steps, 1, cast(VocoderModule, self.required_loop().module).tokenizer.config.chunk)
        super().setup(stage)

    def _sounds(self, waveforms: list[Tensor], generator: Generator) -> Tensor:
        return self._augmented_cuts(waveforms, self.steps, generator)

    def held_out_steps(self) -> int:
        return self.steps

    def held_out(self, cuts: list[Tensor], generator: Generator) -> Tensor:
        return torch.stack(cuts)


class VocoderModule(TrainingModule):
    """Trains a vocoder for an audio tokenizer, and saves the tokenizer including the vocoder."""

    @typed
    def __init__(self, tokenizer: str, vocoder: VocoderConfig = VocoderConfig(),
                 optimizer: OptimizerConfig = OptimizerConfig(), clean_prob: float = 0.25,
                 mel_weight: float = 1.0, pitch_weight: float = 0.3, init_from: str | None = None):
        """
        Args:
            tokenizer: folder of the audio tokenizer, whose codec stays frozen.
            vocoder: sizes of the network.
            optimizer: learning rate and schedule.
            clean_prob: share of cuts whose spectrogram bypasses the codec.
            mel_weight: weight of the log-mel error relative to the multi-resolution STFT distance.
            pitch_weight: weight of the cross-entropy of the pitch.
            init_from: folder of an audio tokenizer with a vocoder of these sizes, whose weights to start from.
        """
        super().__init__()
        within("model.clean_prob", clean_prob, 0, 1)
        for name, weight in (("mel_weight", mel_weight), ("pitch_weight", pitch_weight)):
            within(f"model.{name}", weight, 0, MOST_WEIGHT)
        codec = load_tokenizer(find_shipped(tokenizer))
        if not isinstance(codec, AudioTokenizer):
            raise InputError(f"tokenizer: {tokenizer} is of kind {codec.kind!r}, expected 'audio'")
        # `train` changes nothing in what the codec computes, but Lightning warns about modules in eval mode.
        self.tokenizer = codec.requires_grad_(False).train()
        codec.vocoder = codec.new_vocoder(vocoder)
        if init_from is not None:
            codec.vocoder.load_state_dict(load_matching(init_from, vocoder, "init_from").vocoder.state_dict())
        self.optimizer_config, self.clean_prob = optimizer, clean_prob
        self.mel_weight, self.pitch_weight = mel_weight, pitch_weight
        self.griffin_lim: float | None = None  # its STFT distance on the held-out cuts, once known

    def restore(self, folder: Path) -> None:
        """Load the finished tokenizer in a folder, which must have this fingerprint and a vocoder of this configuration."""
        found, expected = load_matching(folder, self.tokenizer.vocoder.config, "output"), self.tokenizer.fingerprint
        if found.fingerprint != expected:
            raise InputError(f"output: {folder} holds a tokenizer of fingerprint {found.fingerprint[:12]}, expected "
                             f"{expected[:12]}, model.init_args.tokenizer")
        self.tokenizer = found

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return configure(self.tokenizer.vocoder, self.optimizer_config, self.trainer.max_steps, precision=self.trainer.precision)

    def training_step(self, batch: CodecBatch, index: int) -> Tensor:
        true, vocoder = batch.media, self.tokenizer.vocoder
        with torch.no_grad():
            clean = self.tokenizer.spectrogram(true)
            coded = self.tokenizer(clean).output
            keep = torch.rand(len(true), 1, 1, device=self.device) < self.clean_prob
            heard = torch.where(keep, clean, coded)
            cents, clarity = track(true, self.tokenizer.rate, self.tokenizer.config.hop)
        filters = vocoder.filters(self.tokenizer.to_log(heard))
        output = vocoder.sound(filters).waveform
        parts = {
            "stft": stft_distance(output, true, TRAINING),
            "mel": (self.tokenizer.log_mel(output) - self.tokenizer.mel_part(clean)).abs().mean(),
            "pitch": pitch_loss(filters.pitch, cents, clarity > CLARITY),
        }
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, prog_bar=True)
        return parts["stft"] + self.mel_weight * parts["mel"] + self.pitch_weight * parts["pitch"]

    def on_validation_epoch_start(self) -> None:
        self.first_validation = self.griffin_lim is None and not self.trainer.sanity_checking
        self.means = Means()

    def validation_step(self, batch: CodecBatch, index: int) -> None:
        true = batch.media
        mel = self.tokenizer(self.tokenizer.spectrogram(true)).output
        filters = self.tokenizer.vocoder.filters(self.tokenizer.to_log(mel))
        output = self.tokenizer.vocoder.sound(filters).waveform
        cents, clarity = track(true, self.tokenizer.rate, self.tokenizer.config.hop)
        wrong = (1200 * (hertz(filters.pitch) / LOWEST).log2() - cents).abs() > 50
        clear, count = clarity > CLARITY, len(batch.samples)
        if not count:
            return
        error = AudioTokenizer.decibels((self.tokenizer.log_mel(output) - self.tokenizer.mel_part(mel)).abs().mean())
        self.means.add("stft_distance", stft_distance(output, true) * count, count)
        self.means.add("mel_error_db", error * count, count)
        self.means.add("wrong_pitch", (wrong & clear).sum(), clear.sum())
        if self.first_validation:
            with torch.autocast("cpu", enabled=False):
                fallback = torch.stack([self.tokenizer.griffin_lim(item) for item in mel.float().cpu()]).to(true)
            self.means.add("griffin_lim_stft_distance", stft_distance(fallback, true) * count, count)

    def on_validation_epoch_end(self) -> None:
        figures = self.means.compute()
        if self.first_validation:
            self.griffin_lim = figures.pop("griffin_lim_stft_distance", None)
        self.log_dict({f"{self.split}/{name}": value for name, value in figures.items()}, prog_bar=True, sync_dist=True)
        if self.griffin_lim is not None:
            self.log(f"{self.split}/griffin_lim_stft_distance", self.griffin_lim, sync_dist=True)

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save(folder)


def load_matching(folder: str | Path, config: VocoderConfig, name: str) -> AudioTokenizer:
    """The tokenizer in the folder of option `name`. Raises InputError unless it has a vocoder of this configuration."""
    tokenizer = load_tokenizer(find_shipped(folder))
    vocoder = getattr(tokenizer, "vocoder", None)
    if vocoder is None or vocoder.config != config:
        raise InputError(f"{name}: {folder} has {'no vocoder' if vocoder is None else vocoder.config}, expected {config}")
    return cast(AudioTokenizer, tokenizer)


def stft_distance(output: Tensor, true: Tensor, resolutions=PUBLISHED) -> Tensor:
    """Multi-resolution STFT distance of waveforms (B, S): spectral convergence plus log magnitude error, as a mean."""
    total = output.new_zeros(())
    for size, hop, window in resolutions:
        hann = torch.hann_window(window, device=output.device)
        found, wanted = (
            torch.view_as_real(torch.stft(x, size, hop, window, hann, return_complex=True)).square().sum(-1)
            .clamp_min(1e-7).sqrt() for x in (output, true))                                # (B, K, F)
        convergence = (found - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))
        total = total + convergence.mean() + (found.log() - wanted.log()).abs().mean()
    return total / len(resolutions)


def pitch_loss(logits: Tensor, cents: Tensor, voiced: Tensor) -> Tensor:
    """Cross-entropy of pitch logits (B, F, PITCHES) over `voiced` frames (B, F); `cents` (B, F) are split between two bins."""
    place = (cents / CENTS).clamp(0, PITCHES - 1.001)
    low = place.floor().long()
    share = (place - low)[..., None]
    found = logits.log_softmax(-1)
    of = found.gather(-1, low[..., None]) * (1 - share) + found.gather(-1, low[..., None] + 1) * share
    return -(of[..., 0] * voiced).sum() / voiced.sum().clamp_min(1)


def track(waveform: Tensor, rate: int, hop: int) -> tuple[Tensor, Tensor]:
    """Waveform (B, S) -> pitch in cents above the vocoder's lowest, and its clarity in [0, 1], both (B, F = S / hop).

    Frames are centred on their hop.
    """
    window = 2 * math.ceil(rate / LOWEST)
    frames = F.pad(waveform, (window // 2, window // 2)).unfold(-1, window, hop)[:, :waveform.shape[-1] // hop]
    return track_frames(frames, rate)
