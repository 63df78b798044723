"""The image tokenizer: RGB pixels -> patches -> codes, and back.

Shapes: B batch, C=3 channels, H height and W width in pixels, h = H/patch rows, w = W/patch columns of codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mmtx.ambient import neutral
from mmtx.errors import InputError
from mmtx.modality.autoencoder import Codec, NetworkConfig, PatchAutoencoder, Reconstruction
from mmtx.modality.base import Encoding, Tokenizer, wrong_medium
from mmtx.modality.encoder import Window, join, windows
from mmtx.schema import typed, within

LARGE = 2 ** 22  # elements of a picture
MAX_ROWS = 64  # the stream has size tokens <h:1>..<h:64> and <w:1>..<w:64>


@typed
@dataclass(frozen=True)
class ImageConfig:
    """Size rules and network of an image tokenizer.

    `side` is the size in pixels to which pictures are resized, `fit` how: "pad" centres the whole picture on a white
    square, "crop" takes the central square, "resize" keeps the aspect ratio (nearly: each side is rounded to a multiple
    of `patch`) with `side` as the longer side. With `side: null` pictures keep their own size up to 64 patches a side,
    rounded to multiples of `patch`.

    The network sees squares of `chunk` x `chunk` patches. Larger pictures are coded in overlapping windows of that size,
    each patch in the window where it is further from the edges: at linear cost, and without seams.
    """

    patch: int = 8
    chunk: int = 8
    side: int | None = 64
    fit: Literal["pad", "crop", "resize"] = "pad"
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self):
        within("patch", self.patch, 1, 128)
        within("chunk", self.chunk, 1, 4096)
        if self.side is not None and (self.side % self.patch or not 1 <= self.side // self.patch <= MAX_ROWS):
            raise InputError(f"side: found {self.side}, expected a multiple of patch={self.patch} "
                             f"up to {MAX_ROWS * self.patch}")
        if self.fit not in ("pad", "crop", "resize"):
            raise InputError(f"fit: found {self.fit!r}, expected 'pad', 'crop' or 'resize'")


class ImageTokenizer(Codec):
    """Pictures, uint8 (3, H, W), to codes (h, w), and back to pictures of patch*h x patch*w pixels."""

    kind = "image"
    Config = ImageConfig

    @typed
    def __init__(self, config: ImageConfig = ImageConfig()):
        super().__init__()
        self.config = config
        self.network = PatchAutoencoder(3 * config.patch ** 2, config.network)

    @typed
    def at(self, side: int | None, fit: Literal["pad", "crop", "resize"] | None = None) -> "ImageTokenizer":
        """The same codec for pictures of another size, without training: it shares this one's weights.

        With `tokenizer.at(512, "resize")` pictures have up to 64 x 64 codes; `at(None)` keeps their own size. Codes mean
        the same patches of pixels, but the fingerprint differs, since a decoder learns with one size rule: save the result
        to a folder of its own, and train the decoder with that.
        """
        other = ImageTokenizer(replace(self.config, side=side, fit=fit or self.config.fit))
        other.network = self.network
        return other.train(self.training)

    def forward(self, pictures: Tensor) -> Reconstruction:
        """Pictures (B, 3, H, W) in [-1, 1], sides multiples of `patch` up to a chunk -> their reconstruction."""
        latents = self.network.encode(self._to_grid(pictures))
        return Reconstruction(self._to_pixels(self.network.decode(latents)), self.network.quantizer.to_codes(latents))

    def fit(self, picture: Tensor) -> Tensor:
        """Resize a picture, uint8 (3, H, W), to a size that this tokenizer reads, by the rules of the config."""
        coloured = isinstance(picture, Tensor) and picture.dtype == torch.uint8 and picture.ndim == 3 and len(picture) == 3
        if not coloured or not picture.numel():
            raise wrong_medium("image", picture, "a tensor uint8 (3, H, W)")
        side, patch = self.config.side, self.config.patch
        height, width = picture.shape[-2:]
        if side is None or self.config.fit == "resize":
            longest = min(side or max(height, width), MAX_ROWS * patch)
            scale = longest / max(height, width) if side or max(height, width) > longest else 1.0
            size = [max(1, round(edge * scale / patch)) * patch for edge in (height, width)]
            return resize(picture, *size)
        if self.config.fit == "crop":
            short = min(height, width)
            top, left = (height - short) // 2, (width - short) // 2
            return resize(picture[:, top:top + short, left:left + short], side, side)
        scale = side / max(height, width)
        picture = resize(picture, max(1, round(height * scale)), max(1, round(width * scale)))
        height, width = picture.shape[-2:]
        top, left = (side - height + 1) // 2, (side - width + 1) // 2
        canvas = torch.full((3, side, side), 255, dtype=torch.uint8)
        canvas[:, top:top + height, left:left + width] = picture
        return canvas

    def grid(self, picture: Tensor) -> tuple[int, int]:
        """Rows and columns of the codes of a picture that `fit` returned."""
        return picture.shape[-2] // self.config.patch, picture.shape[-1] // self.config.patch

    def batch(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pictures of one size, uint8 (3, H, W) -> (B, 3, H, W) in [-1, 1]."""
        return to_float(torch.stack(list(pictures)))

    def pictures(self, batch: Tensor) -> list[Tensor]:
        return list(to_uint8(batch).cpu())

    @neutral()
    def embed_batch(self, pictures: Sequence[Tensor], patches: bool = False, codes: bool = True) -> list[Encoding]:
        """Pictures, uint8 (3, H, W) of any sizes -> codes (h, w) and features (h, w, D) or `patches` (h, w, P) of each."""
        grids = [self._to_grid(to_float(self.fit(picture))) for picture in pictures]
        plans = [self.windows(*grid.shape[:2]) for grid in grids]
        found = iter(self.embed_grids([grid[window.seen] for grid, plan in zip(grids, plans) for window in plan], patches, codes))
        encodings = []
        for plan in plans:
            parts, features = zip(*(next(found) for _ in plan))
            whole = join(plan, [torch.from_numpy(item) for item in parts])
            encodings.append(Encoding(whole.numpy(), join(plan, features)))
        return encodings

    @neutral()
    def decode(self, codes: np.ndarray) -> Tensor:
        """Codes (h, w) -> a picture, uint8 (3, patch*h, patch*w)."""
        codes = self.as_grid(codes)
        plan = self.windows(*codes.shape)
        pixels = self._to_pixels(join(plan, self.codes_to_grids([codes[window.seen] for window in plan])))
        return to_uint8(pixels)

    def windows(self, rows: int, columns: int) -> list[Window]:
        """The windows in which the network sees a grid of patches, each at most a chunk a side."""
        return windows(rows, columns, self.config.chunk)

    def _to_grid(self, pictures: Tensor) -> Tensor:
        p = self.config.patch
        return rearrange(pictures, "... c (h p) (w q) -> ... h w (p q c)", p=p, q=p)

    def _to_pixels(self, grid: Tensor) -> Tensor:
        p = self.config.patch
        return rearrange(grid, "... h w (p q c) -> ... c (h p) (w q)", p=p, q=p)


def to_picture(tokenizer: Tokenizer, codes: np.ndarray) -> Tensor:
    """Codes (h, w) of a picture -> the picture, uint8 (3, H, W)."""
    return tokenizer.decode(codes)


def to_float(pictures: Tensor) -> Tensor:
    """uint8 0..255 -> float -1..1, the input range of the networks."""
    return pictures.float() / 127.5 - 1


def to_uint8(pictures: Tensor) -> Tensor:
    """Outputs of the networks -> uint8, clipped to -1..1 and rounded."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def resize(picture: Tensor, height: int, width: int) -> Tensor:
    """Resize a picture, uint8 (3, H, W), with antialiased bicubic interpolation."""
    if picture.shape[-2:] == (height, width):
        return picture
    # As floats a photograph takes four times its memory, so large ones are resized a channel at a time.
    parts = picture.split(1) if picture.numel() > LARGE else [picture]
    resized = torch.cat([F.interpolate(part[None].float(), (height, width), mode="bicubic", antialias=True)[0]
                         for part in parts])
    return resized.round().clamp(0, 255).to(torch.uint8)
