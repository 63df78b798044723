"""The image tokenizer: RGB pixels -> patches -> codes, and back.

Shapes: B batch, C=3 channels, H height and W width in pixels, h = H/patch rows, w = W/patch columns of codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mmtx.errors import InputError
from mmtx.modality.autoencoder import Codec, NetworkConfig, PatchAutoencoder, Reconstruction

MAX_ROWS = 64  # the stream has size tokens <h:1>..<h:64> and <w:1>..<w:64>


@dataclass(frozen=True)
class ImageConfig:
    """Size rules and network of an image tokenizer.

    `side` is the size in pixels that pictures are brought to, `fit` says how: "pad" keeps the whole picture in the
    middle of a white square, "crop" fills the square and cuts the middle out, "resize" keeps the shape (nearly: each
    side goes to the nearest multiple of `patch`) with `side` as the longer one. With `side: null` pictures keep their
    own size up to 64 patches a side, and are only brought to the nearest multiple of `patch`.
    """

    patch: int = 8
    side: int | None = 64
    fit: Literal["pad", "crop", "resize"] = "pad"
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self):
        if self.patch < 1:
            raise InputError(f"patch: found {self.patch}, expected 1 or more")
        if self.side is not None and (self.side % self.patch or not 1 <= self.side // self.patch <= MAX_ROWS):
            raise InputError(f"side: found {self.side}, expected a multiple of patch={self.patch} "
                             f"up to {MAX_ROWS * self.patch}")
        if self.fit not in ("pad", "crop", "resize"):
            raise InputError(f"fit: found {self.fit!r}, expected 'pad', 'crop' or 'resize'")


class ImageTokenizer(Codec):
    """Pictures, uint8 (3, H, W), to codes (h, w), and back to pictures of patch*h x patch*w pixels."""

    kind = "image"
    Config = ImageConfig

    def __init__(self, config: ImageConfig = ImageConfig()):
        super().__init__()
        self.config = config
        self.network = PatchAutoencoder(3 * config.patch ** 2, config.network)

    def forward(self, pictures: Tensor) -> Reconstruction:
        """Pictures (B, 3, H, W) in [-1, 1], sides multiples of `patch` -> their reconstruction, same shape."""
        latents = self.network.encode(self._to_grid(pictures))
        return Reconstruction(self._to_pixels(self.network.decode(latents)), self.network.quantizer.to_codes(latents))

    def fit(self, picture: Tensor) -> Tensor:
        """Bring a picture, uint8 (3, H, W), to a size that this tokenizer reads, by the rules of the config."""
        side, patch = self.config.side, self.config.patch
        height, width = picture.shape[-2:]
        if side is None or self.config.fit == "resize":
            longest = min(side or max(height, width), MAX_ROWS * patch)
            scale = longest / max(height, width) if side or max(height, width) > longest else 1.0
            size = [max(1, round(edge * scale / patch)) * patch for edge in (height, width)]
            return _resize(picture, *size)
        if self.config.fit == "crop":
            short = min(height, width)
            top, left = (height - short) // 2, (width - short) // 2
            return _resize(picture[:, top:top + short, left:left + short], side, side)
        scale = side / max(height, width)
        picture = _resize(picture, max(1, round(height * scale)), max(1, round(width * scale)))
        height, width = picture.shape[-2:]
        top, left = (side - height + 1) // 2, (side - width + 1) // 2
        canvas = torch.full((3, side, side), 255, dtype=torch.uint8)
        canvas[:, top:top + height, left:left + width] = picture
        return canvas

    def encode(self, picture: Tensor) -> np.ndarray:
        """A picture, uint8 (3, H, W) of any size -> codes (h, w)."""
        return self.encode_batch([picture])[0]

    def encode_batch(self, pictures: Sequence[Tensor]) -> list[np.ndarray]:
        """Pictures of any sizes -> codes (h, w) of each."""
        return self.grids_to_codes([self._to_grid(to_float(self.fit(picture))) for picture in pictures])

    def decode(self, codes: np.ndarray) -> Tensor:
        """Codes (h, w) -> a picture, uint8 (3, patch*h, patch*w)."""
        pixels = self._to_pixels(self.codes_to_grids([np.asarray(codes)])[0])
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def _to_grid(self, pictures: Tensor) -> Tensor:
        p = self.config.patch
        return rearrange(pictures, "... c (h p) (w q) -> ... h w (p q c)", p=p, q=p)

    def _to_pixels(self, grid: Tensor) -> Tensor:
        p = self.config.patch
        return rearrange(grid, "... h w (p q c) -> ... c (h p) (w q)", p=p, q=p)


def to_float(pictures: Tensor) -> Tensor:
    """uint8 0..255 -> float -1..1, the range in which the networks see pictures."""
    return pictures.float() / 127.5 - 1


def _resize(picture: Tensor, height: int, width: int) -> Tensor:
    if picture.shape[-2:] == (height, width):
        return picture
    resized = F.interpolate(picture[None].float(), (height, width), mode="bicubic", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)
