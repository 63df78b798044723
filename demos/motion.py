"""A custom modality in one file: time series of several sensors, (channels, time), with what they record as captions.

    python demos/motion.py data runs/motion/data                # 40 + 40 series of BasicMotions, which come in the package aeon
    mmtx fit --plugin demos/motion.py --config configs/motion/tokenizer.yaml --output runs/motion/tokenizer
    mmtx fit --plugin demos/motion.py --config configs/motion/decoder.yaml --output runs/motion/decoder
    mmtx evaluate --plugin demos/motion.py --config configs/motion/decoder.yaml --model runs/motion/decoder/model

Shapes: B batch, C channels, T samples in time, t = T / step time steps of codes, bands = C / sensors codes in each.
"""

import importlib.util
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Generator, Tensor

from mmtx.ambient import neutral
from mmtx.errors import InputError
from mmtx.modality.autoencoder import Codec, NetworkConfig, PatchAutoencoder, Reconstruction
from mmtx.modality.base import Encoding
from mmtx.modality.registry import Modality, register
from mmtx.schema import within


@dataclass(frozen=True)
class MotionConfig:
    """A code stands for `sensors` adjacent ones of the `channels`, over `step` samples; the network sees `chunk` steps.

    `scale` brings values to about [-1, 1]; asinh compresses those beyond.
    """

    channels: int = 6
    sensors: int = 3
    step: int = 5
    chunk: int = 20
    scale: float = 4.0
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self):
        for name, least, most in (("channels", 1, 256), ("sensors", 1, 256), ("step", 1, 4096), ("chunk", 1, 4096),
                                  ("scale", 1e-6, 1e6)):
            within(name, getattr(self, name), least, most)
        if self.channels % self.sensors:
            raise InputError(f"channels: found {self.channels}, expected a multiple of sensors={self.sensors}")


class MotionTokenizer(Codec):
    """Series, float (C, T), to codes (t, bands), and back."""

    kind = "motion"
    Config = MotionConfig

    def __init__(self, config: MotionConfig = MotionConfig()):
        super().__init__()
        self.config, self.bands = config, config.channels // config.sensors
        self.network = PatchAutoencoder(config.sensors * config.step, config.network)

    def forward(self, batch: Tensor) -> Reconstruction:
        """A batch (B, C, T), as `batch` returns it -> its reconstruction."""
        latents = self.network.encode(self._to_grid(batch))
        return Reconstruction(self._to_series(self.network.decode(latents)), self.network.quantizer.to_codes(latents))

    def piece(self, series: Tensor, generator: Generator) -> Tensor:
        """A random crop of one chunk, padded with zeros."""
        length = self.config.chunk * self.config.step
        first = int(torch.randint(max(1, series.shape[1] - length + 1), (), generator=generator))
        cut = series[:, first:first + length]
        return torch.nn.functional.pad(cut, (0, length - cut.shape[1]))

    def batch(self, pieces: Sequence[Tensor]) -> Tensor:
        return torch.asinh(torch.stack(list(pieces)) / self.config.scale)

    def grid(self, series: Tensor) -> tuple[int, int]:
        return -(-series.shape[1] // self.config.step), self.bands

    @neutral()
    def embed_batch(self, media: Sequence[Tensor], patches: bool = False, codes: bool = True) -> list[Encoding]:
        found = []
        for series in media:
            missing = -series.shape[1] % self.config.step
            grid = self._to_grid(self.batch([torch.nn.functional.pad(series, (0, missing))])[0])
            parts, features = zip(*self.embed_grids(grid.split(self.config.chunk), patches, codes))
            found.append(Encoding(np.concatenate(parts), torch.cat(features)))
        return found

    @neutral()
    def decode(self, codes: np.ndarray) -> Tensor:
        codes, chunk = np.asarray(codes), self.config.chunk
        grid = torch.cat(self.codes_to_grids([codes[i:i + chunk] for i in range(0, len(codes), chunk)]))
        return self._to_series(grid).clamp(-5, 5).sinh() * self.config.scale

    def _to_grid(self, series: Tensor) -> Tensor:
        """(..., C, T) -> patches (..., t, bands, sensors * step)."""
        return rearrange(series, "... (b s) (t p) -> ... t b (s p)", s=self.config.sensors, p=self.config.step)

    def _to_series(self, grid: Tensor) -> Tensor:
        """The inverse of `_to_grid`."""
        return rearrange(grid, "... t b (s p) -> ... (b s) (t p)", s=self.config.sensors)


def read(tokenizer: MotionTokenizer | None, data: bytes | np.ndarray, name: str | None) -> Tensor:
    """A .npy file or an array (C, T) -> float32 (C, T)."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False) if isinstance(data, bytes) else np.asarray(data)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{name or 'motion'}: not a whole .npy file ({' '.join(str(error).split())[:80]})") from None
    channels = "C" if tokenizer is None else tokenizer.config.channels
    if array.dtype.kind not in "fiu" or array.ndim != 2 or channels not in ("C", len(array)) or not 0 < array.shape[1] <= 2**16:
        raise InputError(f"{name or 'motion'}: found {array.dtype} of shape {array.shape}, expected numbers ({channels}, T)")
    if not np.isfinite(array).all():
        raise InputError(f"{name or 'motion'}: found NaN or infinite values, expected finite ones")
    return torch.from_numpy(array.astype(np.float32))


def controls(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Two sets of features of the first 100 samples: their values, and the strength of each frequency, whenever it occurs."""
    series = torch.nn.functional.pad(read(None, data, name)[:, :100], (0, 100))[:, :100].double().numpy()
    return {"series": series.ravel(), "spectrum": np.log1p(np.abs(np.fft.rfft(series))).ravel()}


register(Modality("motion", "steps", {"motion": MotionTokenizer}, read=read, controls=controls, extensions=(".npy",),
                  sniff=lambda data: data.startswith(b"\x93NUMPY")))


def write_data(folder: Path) -> None:
    """Write the series of BasicMotions as FOLDER/{train,test}/NUMBER.npy with captions beside them, without importing aeon."""
    if (package := importlib.util.find_spec("aeon")) is None:
        raise SystemExit("aeon is not installed, expected pip install --no-deps aeon")
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        source = Path(package.submodule_search_locations[0]) / f"datasets/data/BasicMotions/BasicMotions_{part.upper()}.ts"
        rows = [line for line in source.read_text().splitlines() if line and line[0] not in "@#"]
        for number, row in enumerate(rows):
            *channels, label = row.split(":")
            np.save(folder / part / f"{number:03}.npy", np.array([line.split(",") for line in channels], np.float32))
            (folder / part / f"{number:03}.txt").write_text(label.lower() + "\n")
        print(f"{folder / part}: {len(rows)} series")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "data":
        raise SystemExit("usage: python demos/motion.py data FOLDER")
    write_data(Path(sys.argv[2]))
