"""The vocoder: log-mel spectrogram -> waveform, by a convolutional network that ends in an inverse STFT.

The network is that of Vocos (https://arxiv.org/abs/2306.00814), but it does not predict phases freely: it sees only a few
frames, so for a held note it would predict the same phases in every frame, and the sound would repeat with every hop,
whatever the pitch. As in neural source-filter models (https://arxiv.org/abs/1904.12088), the network instead predicts the
pitch of each frame, from which a pulse train with continuous phase is made. The magnitudes and phases that it predicts are
those of filters: magnitude and phase for the pulses, magnitude for noise.

A spectrogram may include pitch logits, in columns after its mel bands (those of `pitch_logits`, or a codec's reconstruction
of them): a few frames of mel bands do not distinguish a low note from its neighbours. The network then corrects them.

Shapes: B batch, S samples, F frames, M mels, D width, K = window/2 + 1 frequencies.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtx.errors import InputError
from mmtx.schema import typed, within

SILENCE = -7.0            # log magnitude of silence, assumed beyond the ends of a sound
LOWEST = 27.5             # Hz, of the first pitch bin: A0
PITCHES = 7 * 48 + 25     # pitch bins, a quarter of a semitone each: up to 5 kHz
CENTS = 25.0              # between two bins
GRID = 5.0                # cents to which the pitch is rounded, so that rounding errors of the network do not accumulate
NOISE_FRAMES = 128        # period of the noise
AT_ONCE = 1024            # frames of a long sound in one pass of the network
MAX_GAIN = 6.0            # nepers by which a filter may exceed or fall below the spectral envelope
LOWPASS_CUTOFF = 1500.0   # Hz, cutoff of the pitch tracker's low-pass filter
CLARITY = 0.8             # share of a frame's energy that its period must explain for it to have a pitch
PITCH_LOGIT = 12.0        # logit at the pitch of a frame that has one, falling to 0 a semitone away


@typed
@dataclass(frozen=True)
class VocoderConfig:
    """Sizes of the network. `kernel` is in frames, odd; `expansion` is the ratio of the hidden width of a block to `width`."""

    width: int = 192
    depth: int = 4
    kernel: int = 7
    expansion: int = 3

    def __post_init__(self):
        for name, most in (("width", 2**14), ("depth", 2**10), ("kernel", 2**10), ("expansion", 2**6)):
            within(f"vocoder.{name}", getattr(self, name), 1, most)
        if self.kernel % 2 == 0:
            raise InputError(f"vocoder.kernel: found {self.kernel}, expected an odd number")


class ConvNeXtBlock(nn.Module):
    """A ConvNeXt block over frames (https://arxiv.org/abs/2201.03545)."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        c = config
        self.mix = nn.Conv1d(c.width, c.width, c.kernel, padding=c.kernel // 2, groups=c.width)
        self.norm = nn.LayerNorm(c.width)
        self.up = nn.Linear(c.width, c.expansion * c.width)
        self.down = nn.Linear(c.expansion * c.width, c.width)
        self.gain = nn.Parameter(torch.full((c.width,), 1 / c.depth))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) -> (B, F, D)."""
        mixed = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x + self.gain * self.down(F.gelu(self.up(self.norm(mixed))))


class Filters(NamedTuple):
    """The network's outputs for each frame: `pitch` logits (B, F, PITCHES), and the filters of pulses and noise."""

    pitch: Tensor
    pulses: Tensor  # complex (B, F, K)
    noise: Tensor   # (B, F, K)


class Synthesized(NamedTuple):
    """`waveform` (B, F * hop); `cycles` (B, F), double: number of pulse periods up to each frame."""

    waveform: Tensor
    cycles: Tensor


class Vocoder(nn.Module):
    """Log-mel (B, F, M), natural logarithms of magnitudes, to a waveform (B, F * hop)."""

    hann: Tensor    # (window,)
    shares: Tensor  # (K, M)
    total: Tensor   # (M,)
    noise: Tensor   # (NOISE_FRAMES, K)

    def __init__(self, config: VocoderConfig, mel_matrix: Tensor, rate: int, hop: int):
        """`mel_matrix` (K, M) maps spectral to mel magnitudes, `rate` is in Hz, `hop` in samples: all as in the codec."""
        super().__init__()
        self.config, self.rate, self.hop = config, rate, hop
        frequencies, mels = mel_matrix.shape
        self.window = 2 * (frequencies - 1)
        if self.window < 2 * hop:
            raise InputError(f"window: found {self.window}, a vocoder expects at least 2 * hop={2 * hop}")
        self.embed = nn.Conv1d(mels, config.width, config.kernel, padding=config.kernel // 2)
        self.embed_norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(ConvNeXtBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.to_pitch = nn.Linear(config.width, PITCHES)
        self.to_filters = nn.Linear(config.width, 3 * frequencies)
        nn.init.normal_(self.to_filters.weight, std=0.02 / math.sqrt(config.width))
        nn.init.zeros_(self.to_filters.bias)
        hann = torch.hann_window(self.window)
        self.register_buffer("hann", hann, persistent=False)
        # The filters start as the spectral envelope of the mel bands, which the network corrects.
        total = mel_matrix.sum(0)
        shares = mel_matrix / total
        bins = torch.arange(frequencies)
        nearest = (bins - (shares * bins[:, None]).sum(0)[:, None]).abs().argmin(0)
        shares = torch.where(shares.sum(1, keepdim=True) > 0, shares, F.one_hot(nearest, mels).float())
        self.register_buffer("shares", shares / shares.sum(1, keepdim=True), persistent=False)    # (K, M)
        self.register_buffer("total", total.log(), persistent=False)                              # (M,)
        noise = torch.randn(NOISE_FRAMES * hop, generator=torch.Generator().manual_seed(0))
        noise = torch.cat([noise[-self.window // 2:], noise, noise[:self.window // 2]])
        spectrum = torch.stft(noise, self.window, hop, window=hann, center=False, return_complex=True).T
        self.loudness = float(hann.square().sum().sqrt())  # of the spectrum of noise of RMS 1
        self.register_buffer("noise", spectrum[:NOISE_FRAMES] / self.loudness, persistent=False)

    @property
    def overlap(self) -> int:
        """Number of frames on either side of a frame whose windows reach it."""
        return math.ceil(self.window / 2 / self.hop)

    @property
    def context(self) -> int:
        """Receptive field: number of frames on either side of a frame that its `hop` samples depend on."""
        return (self.config.depth + 1) * (self.config.kernel // 2) + 2 * self.overlap + 1

    def forward(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, F, M), or with pitch logits (B, F, M + PITCHES) -> waveform (B, F * hop)."""
        return self.sound(self.filters(log_mel)).waveform

    @torch.no_grad()
    def stream(self, log_mels: Iterable[Tensor]) -> Iterator[Tensor]:
        """Log-mel (F, M) in pieces of any numbers of frames -> waveform in pieces: that of `forward` for the whole.

        A frame is synthesised once `context` more frames have arrived, or the last one; memory does not grow with the sound.
        """
        held = None  # frames from index `first` on; those before `done` have been synthesised
        first, done, cycles = 0, 0, 0.0
        for log_mel in chain(log_mels, (None,)):
            if log_mel is not None:
                log_mel = log_mel.to(self.hann)
                held = log_mel if held is None else torch.cat([held, log_mel])
            if held is None:
                return
            end = first + len(held)
            ready = end - (self.context if log_mel is not None else 0)
            while done < ready:
                stop = min(done + AT_ONCE, ready)
                piece = held[None, :stop + self.context - first]
                sound = self.sound(self.filters(piece), first, done - first, cycles)
                yield sound.waveform[0, (done - first) * self.hop:(stop - first) * self.hop]
                if stop < end:
                    cycles = sound.cycles[:, stop - first]
                held, first, done = held[max(0, stop - self.context - first):], max(first, stop - self.context), stop

    def filters(self, log_mel: Tensor) -> Filters:
        """Log-mel (B, F, M or M + PITCHES) -> pitch and filters of each frame."""
        log_mel, given = log_mel.tensor_split([len(self.total)], dim=-1)
        x = self.embed_norm(self.embed(log_mel.transpose(1, 2) - SILENCE).transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        envelope = F.linear(log_mel - self.total, self.shares)                         # (B, F, K)
        pulses, phase, noise = self.to_filters(x).chunk(3, dim=-1)
        gain = (envelope + pulses.clamp(-MAX_GAIN, MAX_GAIN)).exp()
        pitch = self.to_pitch(x)
        if given.shape[-1]:
            pitch = pitch + given
        return Filters(pitch, torch.polar(gain, phase), (envelope + noise.clamp(-MAX_GAIN, MAX_GAIN)).exp())

    def sound(self, filters: Filters, first: int = 0, anchor: int = 0, cycles: Tensor | float = 0.0) -> Synthesized:
        """Filters of F frames -> their sound.

        For a piece of a longer sound: `first` is the index of its first frame, and `cycles` (B,) the number of pulse periods
        up to its frame `anchor`.
        """
        frames = filters.noise.shape[1]
        with torch.no_grad():
            pitch = hertz(filters.pitch).double()                                       # (B, F)
            passed = (pitch[:, 1:] + pitch[:, :-1]).cumsum(1) * (self.hop / 2 / self.rate)
            passed = F.pad(passed, (1, 0))
            passed = passed - passed[:, anchor, None] + torch.as_tensor(cycles).to(passed).view(-1, 1)
            pulses = torch.stft(self._pulses(pitch, passed), self.window, self.hop, window=self.hann, center=False,
                                return_complex=True).transpose(1, 2) / self.loudness   # (B, F, K)
            numbers = (first + torch.arange(frames, device=pulses.device)) % NOISE_FRAMES
        spectrum = filters.pulses * pulses + filters.noise * self.noise[numbers]
        waveform = torch.istft(spectrum.transpose(1, 2), self.window, self.hop, window=self.hann,
                               length=frames * self.hop)
        return Synthesized(waveform, passed)

    def _pulses(self, pitch: Tensor, passed: Tensor) -> Tensor:
        """Pitch in Hz and cycles at each frame, (B, F) -> band-limited pulses of RMS 1 over all windows, (B, S).

        The pitch is interpolated linearly between frames, and constant before the first and after the last.
        """
        e, hop, rate = self.overlap, self.hop, self.rate
        before = torch.arange(-e, 0, device=pitch.device) * hop / rate * pitch[:, :1]
        after = torch.arange(1, e + 1, device=pitch.device) * hop / rate * pitch[:, -1:]
        passed = torch.cat([passed[:, :1] + before, passed, passed[:, -1:] + after], 1)
        pitch = torch.cat([pitch[:, :1].expand(-1, e), pitch, pitch[:, -1:].expand(-1, e)], 1)
        start, rise = pitch[:, :-1, None], pitch.diff(dim=1)[..., None]
        time = torch.arange(hop, device=pitch.device, dtype=torch.double)
        cycles = passed[:, :-1, None] + (start * time + rise * time.square() / (2 * hop)) / rate
        angle = (cycles.remainder(1) * 2 * torch.pi).flatten(1)                         # (B, S)
        harmonics = (rate / 2 / (start + rise * time / hop)).floor().flatten(1)
        # Sum of cos(h * angle), h = 1..harmonics, in closed form; its limit where the angle is 0.
        below = torch.sin(angle / 2)
        flat = below.abs() < 1e-6
        total = (torch.sin((harmonics + 0.5) * angle) / torch.where(flat, 1.0, below) - 1) / 2
        pulses = (torch.where(flat, harmonics, total) / (harmonics / 2).sqrt()).float()
        skipped = e * hop - self.window // 2
        return pulses[:, skipped:skipped + (pitch.shape[1] - 2 * e - 1) * hop + self.window]


def hertz(logits: Tensor) -> Tensor:
    """Pitch logits (..., PITCHES) -> Hz (...): the weighted mean of the bins around the best one, rounded to 5 cents."""
    best = logits.argmax(-1, keepdim=True)
    near = (best + torch.arange(-2, 3, device=logits.device)).clamp(0, PITCHES - 1)
    cents = CENTS * (logits.gather(-1, near).softmax(-1) * near).sum(-1)
    return LOWEST * 2 ** ((cents / GRID).round() * GRID / 1200)


def track_frames(frames: Tensor, rate: int) -> tuple[Tensor, Tensor]:
    """Windows of sound (..., window) -> pitch in cents above `LOWEST`, and its clarity in [0, 1], (...) both.

    The method of McLeod and Wyvill (A smarter way to find pitch, ICMC 2005): the first peak of the normalised
    autocorrelation that is nearly as high as the highest.
    """
    window = frames.shape[-1]
    longest = min(math.ceil(rate / LOWEST), window * 5 // 8)  # beyond that too little is left to compare
    size = 2 ** math.ceil(math.log2(2 * window))
    # Low-pass filtered: peaks of bright sounds are narrower than a sample, and one between two samples would be missed.
    tones = torch.fft.rfftfreq(size, 1 / rate, device=frames.device)
    frames = torch.fft.irfft(torch.fft.rfft(frames, size) / (1 + (tones / LOWPASS_CUTOFF) ** 2), size)[..., :window]
    product = torch.fft.irfft(torch.fft.rfft(frames, size).abs().square(), size)[..., :longest + 1]
    energy = F.pad(frames.square().cumsum(-1), (1, 0))
    lags = torch.arange(longest + 1, device=frames.device)
    both = energy[..., -1:] - energy[..., lags] + energy[..., window - lags]
    nsdf = 2 * product / both.clamp_min(1e-6)                                           # (..., longest + 1)
    middle, left, right = nsdf[..., 1:-1], nsdf[..., :-2], nsdf[..., 2:]
    shortest = rate / (LOWEST * 2 ** (CENTS * (PITCHES - 1) / 1200))
    peak = (middle > left) & (middle >= right) & (lags[1:-1] >= shortest)
    heights = middle - (left - right).square() / (8 * (left - 2 * middle + right)).clamp_max(-1e-6)
    heights = torch.where(peak, heights, 0.0)
    best = heights.amax(-1, keepdim=True)
    chosen = (peak & (heights >= 0.9 * best)).int().argmax(-1, keepdim=True)
    a, b, c = (x.gather(-1, chosen) for x in (left, middle, right))
    lag = chosen + 1 + ((a - c) / (2 * (a - 2 * b + c)).clamp_max(-1e-6)).clamp(-0.5, 0.5)
    return 1200 * torch.log2(rate / lag / LOWEST)[..., 0], best[..., 0]


def pitch_logits(frames: Tensor, rate: int) -> Tensor:
    """Windows of sound (..., window) -> logits of their pitch (..., PITCHES), all 0 if it is not clear."""
    cents, clarity = track_frames(frames, rate)
    away = (torch.arange(PITCHES, device=frames.device) - cents[..., None] / CENTS).abs() * CENTS / 100
    return PITCH_LOGIT * (1 - away).clamp_min(0) * (clarity > CLARITY)[..., None]
