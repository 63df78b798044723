"""The audio tokenizer: waveform -> log-mel spectrogram -> spectrogram patches -> codes, and back.

A trained vocoder turns spectrograms back into sound or, without one, Griffin-Lim.

With `pitch`, a spectrogram has PITCHES more columns, the logits of each frame's pitch, so that its patches and codes include
the pitch.

Shapes: B batch, S samples, F frames, M mels, N = M or M + PITCHES columns of a spectrogram, t = F/patch_frames time steps,
bands = M/patch_mels codes in a step.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from mmtx.ambient import neutral, neutral_steps
from mmtx.errors import InputError
from mmtx.files import user_path
from mmtx.json_files import write_json
from mmtx.modality.autoencoder import Codec, NetworkConfig, PatchAutoencoder, Reconstruction
from mmtx.modality.base import Encoding, read_config, wrong_medium
from mmtx.modality.log_mel import CENTRE, FLOOR, SPREAD
from mmtx.modality.vocoder import PITCHES, Vocoder, VocoderConfig, pitch_logits
from mmtx.saved_folder import CONFIG
from mmtx.schema import build, typed, within
from mmtx.weights import load_module, to_bytes, weights_of

GRIFFIN_LIM_ROUNDS = 32
GRIFFIN_LIM_MOMENTUM = 0.99
CHUNKS = 16               # whose spectrogram is computed at a time, so that temporary memory does not grow with the sound


@typed
@dataclass(frozen=True)
class AudioConfig:
    """Spectrogram, patches and network of an audio tokenizer.

    `rate` is in Hz, `window` and `hop` in samples; `low` and `high` in Hz bound the mel bands. A patch spans
    `patch_frames` frames and `patch_mels` mel bands. The network sees `chunk` time steps at once and nothing beyond, so
    its cost is linear in the length of a sound, which can be coded in pieces. `pitch` adds the pitch to the codes, for
    notes that look like their neighbours in mel bands.
    """

    rate: int = 16_000
    window: int = 1024
    hop: int = 256
    mels: int = 80
    low: float = 0.0
    high: float = 8_000.0
    patch_frames: int = 2
    patch_mels: int = 40
    pitch: bool = False
    chunk: int = 64
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self):
        for name, most in (("rate", 2**20), ("window", 2**15), ("hop", 2**15), ("mels", 512), ("patch_frames", 4096),
                           ("patch_mels", 512), ("chunk", 4096)):
            within(name, getattr(self, name), 1, most)
        if self.mels % self.patch_mels:
            raise InputError(f"mels: found {self.mels}, expected a multiple of patch_mels={self.patch_mels}")
        if not 0 <= self.low < self.high <= self.rate / 2:
            raise InputError(f"low, high: found {self.low}, {self.high}, expected 0 <= low < high <= rate / 2 = {self.rate / 2:g}")
        if self.window <= self.hop or self.window % 2:  # without overlap, sound is lost where windows meet
            raise InputError(f"window: found {self.window}, expected an even number of more than hop={self.hop}")


class AudioTokenizer(Codec):
    """Sound, float (S,) at `rate`, to codes (t, bands), and back.

    `vocoder` may be None; it then decodes with Griffin-Lim.
    """

    kind = "audio"
    Config = AudioConfig
    hann: Tensor  # (window,)
    parts = ("vocoder",)
    later = ("pitch",)

    @typed
    def __init__(self, config: AudioConfig = AudioConfig()):
        super().__init__()
        self.config = config
        self.network = PatchAutoencoder(config.patch_frames * config.patch_mels + config.pitch * PITCHES,
                                        config.network)
        self.vocoder: Vocoder | None = None
        self.register_buffer("hann", torch.hann_window(config.window), persistent=False)

    def new_vocoder(self, config: VocoderConfig) -> Vocoder:
        """An untrained vocoder for the spectrograms of this tokenizer."""
        return Vocoder(config, self._mel_matrix, self.rate, self.config.hop)

    def values(self) -> dict:
        values = super().values()
        for name in self.later:  # otherwise older tokenizers would get another fingerprint
            if not values[name]:
                del values[name]
        return values

    def files(self) -> dict[str, bytes]:
        files = super().files()
        if self.vocoder is None:
            return files
        return {
            **files,
            CONFIG: write_json({**self.values(), "vocoder": asdict(self.vocoder.config)}),
            "vocoder.safetensors": to_bytes(weights_of(self.vocoder)),
        }

    @classmethod
    def from_folder(cls, folder: Path) -> "AudioTokenizer":
        folder = user_path(folder)
        tokenizer = cast(AudioTokenizer, super().from_folder(folder))
        if (values := read_config(folder, cls.kind).get("vocoder")) is not None:
            config, matrix = build(VocoderConfig, values, folder / CONFIG, "vocoder"), tokenizer._mel_matrix
            make = lambda: Vocoder(config, matrix, tokenizer.rate, tokenizer.config.hop)
            tokenizer.vocoder = load_module(make, folder / "vocoder.safetensors").eval()
        return tokenizer

    @property
    def rate(self) -> int:
        """Samples per second."""
        return self.config.rate

    @property
    def bands(self) -> int:  # type: ignore[override]  # the contract lets it be a property
        """Codes per time step."""
        return self.config.mels // self.config.patch_mels

    @property
    def codes_per_second(self) -> float:  # type: ignore[override]  # the contract lets it be a property
        return self.rate / self.config.hop / self.config.patch_frames * self.bands

    @cached_property
    def _mel_matrix(self) -> Tensor:
        import torchaudio.functional as AF

        c = self.config
        return AF.melscale_fbanks(c.window // 2 + 1, c.low, c.high, c.mels, c.rate, norm="slaney", mel_scale="slaney")

    def forward(self, mel: Tensor) -> Reconstruction:
        """Log-mel (B, F, N), F a multiple of patch_frames and at most a chunk -> its reconstruction, same shape."""
        latents = self.network.encode(self._to_grid(mel))
        return Reconstruction(self._to_mel(self.network.decode(latents)), self.network.quantizer.to_codes(latents))

    @staticmethod
    def decibels(difference: Tensor) -> Tensor:
        """A difference of scaled log-mel values in dB."""
        return difference * SPREAD * 20 / math.log(10)

    def spectrogram(self, waveform: Tensor) -> Tensor:
        """Waveform (..., S), padded with silence to whole patches -> log-mel (..., F, N), scaled to about [-2, 2]."""
        return self._columns(self._padded(waveform))

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Waveform (..., S) -> its `spectrogram` without pitch columns, (..., F, M)."""
        return self._log_mel(self._padded(waveform))

    def mel_part(self, mel: Tensor) -> Tensor:
        """Spectrogram (..., F, N) -> its mel columns, without pitch (..., F, M)."""
        return mel[..., :self.config.mels]

    def _padded(self, waveform: Tensor) -> Tensor:
        c = self.config
        step = c.hop * c.patch_frames
        frames = max(1, math.ceil(waveform.shape[-1] / step)) * c.patch_frames
        # Frame i is centred on sample i * hop: half a window of silence before the sound, and enough after it.
        missing = frames * c.hop - waveform.shape[-1]
        return torch.nn.functional.pad(waveform, (c.window // 2, missing + c.window // 2 - c.hop))

    def _columns(self, padded: Tensor) -> Tensor:
        """Samples of whole windows (..., (F - 1) * hop + window) -> log-mel, with pitch if configured, (..., F, N)."""
        c = self.config
        mel = self._log_mel(padded)
        return torch.cat([mel, pitch_logits(padded.unfold(-1, c.window, c.hop), c.rate)], -1) if c.pitch else mel

    def _column_pieces(self, padded: Tensor) -> Iterator[Tensor]:
        """`_columns` of one sound, `CHUNKS` chunks at a time."""
        c = self.config
        total, frames = (len(padded) - c.window) // c.hop + 1, CHUNKS * c.chunk * c.patch_frames
        for first in range(0, total, frames):
            last = min(first + frames, total) - 1
            yield self._columns(padded[first * c.hop:last * c.hop + c.window])

    def _log_mel(self, padded: Tensor) -> Tensor:
        """Samples of whole windows (..., (F - 1) * hop + window) -> scaled log-mel (..., F, M)."""
        c = self.config
        spectrum = torch.stft(padded, c.window, c.hop, window=self.hann.to(padded.device), center=False,
                              return_complex=True).abs()                                  # (..., window/2+1, F)
        mel = spectrum.transpose(-1, -2) @ self._mel_matrix.to(padded.device)             # (..., F, M)
        return (mel.clamp_min(FLOOR).log() - CENTRE) / SPREAD

    def to_log(self, mel: Tensor) -> Tensor:
        """Scaled log-mel (..., F, N) -> natural logarithms of mel magnitudes; the pitch stays as it is."""
        mel, pitch = mel.tensor_split([self.config.mels], dim=-1)
        return torch.cat([mel * SPREAD + CENTRE, pitch], -1)

    def waveform(self, mel: Tensor) -> Tensor:
        """Log-mel (F, N) -> waveform (F * hop,) by the vocoder or, without one, by Griffin-Lim."""
        if self.vocoder is None:
            return self.griffin_lim(mel)
        return torch.cat([*self.vocoder.stream([self.to_log(mel)])]).cpu()

    def griffin_lim(self, mel: Tensor) -> Tensor:
        """Log-mel (F, N) -> waveform (F * hop,) by fast Griffin-Lim.

        Griffin and Lim (https://doi.org/10.1109/TASSP.1984.1164317), in the fast form
        (https://doi.org/10.1109/WASPAA.2013.6701851). torchaudio's draws its initial phases from the global generator that all
        threads share; this one does not.
        """
        c = self.config
        magnitude = self.to_log(self.mel_part(mel)).exp()
        spectrum = (magnitude @ torch.linalg.pinv(self._mel_matrix)).clamp_min(0).T       # (window/2+1, F)
        # A sound shorter than half a window is padded with silence, since its edges could not be reflected.
        frames = max(mel.shape[0], c.window // (2 * c.hop) + 1)
        spectrum = torch.nn.functional.pad(spectrum, (0, frames + 1 - mel.shape[0]))
        hann, share = self.hann.cpu(), GRIFFIN_LIM_MOMENTUM / (1 + GRIFFIN_LIM_MOMENTUM)
        phases = torch.rand(spectrum.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
        before = torch.zeros(())
        for _ in range(GRIFFIN_LIM_ROUNDS + 1):
            waveform = torch.istft(spectrum * phases, c.window, c.hop, window=hann, length=frames * c.hop)
            rebuilt = torch.stft(waveform, c.window, c.hop, window=hann, return_complex=True)
            phases = rebuilt - before * share
            phases, before = phases / (phases.abs() + 1e-16), rebuilt
        return waveform[:mel.shape[0] * c.hop]

    def grid(self, waveform: Tensor) -> tuple[int, int]:
        """Time steps and bands of the codes of a waveform (S,)."""
        return max(1, math.ceil(len(waveform) / (self.config.hop * self.config.patch_frames))), self.bands

    def batch(self, waveforms: Sequence[Tensor]) -> Tensor:
        """Waveforms of one length (S,) -> log-mel (B, F, N)."""
        return self.spectrogram(torch.stack(list(waveforms)))

    def pictures(self, batch: Tensor) -> list[Tensor]:
        """Spectrograms as grey pictures: time to the right, low frequencies at the bottom."""
        grey = (self.mel_part(batch).clamp(-1, 3) + 1).div(4).mul(255).to(torch.uint8)
        return [item.T.flip(0).cpu().expand(3, -1, -1) for item in grey]

    @neutral()
    def embed_batch(self, waveforms: Sequence[Tensor], patches: bool = False, codes: bool = True) -> list[Encoding]:
        """Waveforms of any lengths -> codes (t, bands) and features (t, bands, D) or `patches` (t, bands, P) of each."""
        chunks, counts = [], []
        for waveform in waveforms:
            check_waveform(waveform)
            pieces = [piece for columns in self._column_pieces(self._padded(waveform))
                      for piece in self._to_grid(columns).split(self.config.chunk)]
            chunks.extend(pieces)
            counts.append(len(pieces))
        pieces = iter(self.embed_grids(chunks, patches, codes))
        encodings = []
        for count in counts:
            parts, features = zip(*(next(pieces) for _ in range(count)))
            encodings.append(Encoding(np.concatenate(parts), torch.cat(features)))
        return encodings

    @neutral_steps
    @typed
    def encode_stream(self, waveforms: Iterable[Tensor]) -> Iterator[np.ndarray]:
        """One sound in pieces (S,) of any lengths, including 0 -> its codes in pieces (t, bands): those of `encode`.

        Context: the codes of a chunk depend on its own samples, half a window before them and half a window minus a hop
        after them. They are yielded as soon as these samples have arrived, the last ones when the sound ends.
        """
        c = self.config
        frames = c.chunk * c.patch_frames
        seen = max((frames - 1) * c.hop + c.window, frames * c.hop + c.window // 2)
        held, started = self.hann.new_zeros(c.window // 2), False  # samples from half a window before the next chunk
        for waveform in waveforms:
            check_waveform(waveform)
            held = torch.cat([held, waveform.to(held)])
            while len(held) >= seen:
                yield self._encode_grid(self._columns(held[:(frames - 1) * c.hop + c.window]))
                held, started = held[frames * c.hop:], True
        rest = len(held) - c.window // 2
        if rest or not started:
            step = c.hop * c.patch_frames
            count = max(1, math.ceil(rest / step)) * c.patch_frames
            held = torch.nn.functional.pad(held, (0, (count - 1) * c.hop + c.window - len(held)))
            for mel in self._columns(held).split(frames):
                yield self._encode_grid(mel)

    def _encode_grid(self, mel: Tensor) -> np.ndarray:
        return self.embed_grids([self._to_grid(mel)])[0].codes

    @neutral_steps
    def decode_stream(self, codes: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """The codes of one sound in pieces (t, bands) of any lengths -> its waveform in pieces: that of `decode`.

        Context: a chunk of codes, and `vocoder.context` frames (half a window of overlap, and the receptive field of
        the vocoder) on either side. Pieces are yielded as soon as the codes of that context have arrived. Raises
        InputError without a vocoder: Griffin-Lim needs the whole sound.
        """
        if self.vocoder is None:
            raise InputError("audio tokenizer: found no vocoder, decoding in pieces expects one (Griffin-Lim needs the "
                             "whole sound)")
        mels = (self.to_log(self.decode_spectrogram(chunk)) for chunk in in_chunks(codes, self.config.chunk))
        for waveform in self.vocoder.stream(mels):
            yield waveform.clamp(-1, 1).cpu()

    @neutral()
    def decode(self, codes: np.ndarray) -> Tensor:
        """Codes (t, bands) -> waveform (t * patch_frames * hop,)."""
        return self.waveform(self.decode_spectrogram(codes)).clamp(-1, 1)

    def decode_spectrogram(self, codes: np.ndarray) -> Tensor:
        """Codes (t, bands) -> log-mel (F, N)."""
        codes = self.as_grid(codes)
        chunk = self.config.chunk
        pieces = self.codes_to_grids([codes[i:i + chunk] for i in range(0, len(codes), chunk)])
        return self._to_mel(torch.cat(pieces))

    def _to_grid(self, mel: Tensor) -> Tensor:
        """Log-mel (..., F, N) -> patches (..., t, bands, P); each patch of a time step includes the step's pitch."""
        c = self.config
        mel, pitch = mel.tensor_split([c.mels], dim=-1)
        patches = rearrange(mel, "... (t f) (b m) -> ... t b (f m)", f=c.patch_frames, m=c.patch_mels)
        if not c.pitch:
            return patches
        pitch = reduce(pitch, "... (t f) n -> ... t 1 n", "mean", f=c.patch_frames).expand(*patches.shape[:-1], -1)
        return torch.cat([patches, pitch], -1)

    def _to_mel(self, grid: Tensor) -> Tensor:
        """Patches (..., t, bands, P) -> log-mel (..., F, N)."""
        c = self.config
        patches, pitch = grid.tensor_split([c.patch_frames * c.patch_mels], dim=-1)
        mel = rearrange(patches, "... t b (f m) -> ... (t f) (b m)", f=c.patch_frames, m=c.patch_mels)
        if not c.pitch:
            return mel
        return torch.cat([mel, repeat(pitch.mean(-2), "... t n -> ... (t f) n", f=c.patch_frames)], -1)


def check_waveform(waveform: Tensor) -> None:
    """Raise InputError unless it is a float32 tensor (S,) of finite numbers: NaN has no code."""
    if not (isinstance(waveform, Tensor) and waveform.dtype == torch.float32 and waveform.ndim == 1):
        raise wrong_medium("audio", waveform, "a tensor float32 (S,)")
    if not waveform.isfinite().all():
        raise InputError("audio: found NaN or infinite samples, expected a tensor of finite ones, "
                         "as mmtx.data.media.load_audio returns it")


def in_chunks(pieces: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Consecutive pieces of an array along its first axis -> the same in pieces of `size`, except the last."""
    held: np.ndarray | None = None
    for piece in pieces:
        held = np.asarray(piece) if held is None else np.concatenate([held, piece])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held is not None and len(held):
        yield held
