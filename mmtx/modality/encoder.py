"""The encoder of codecs, patches to features; a decoder may have one of its own, which trains along with it.

Shapes: B batch, h rows and w columns of a grid of patches, P numbers in a patch, D width.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmtx.config import AnyEncoderConfig, EfficientNetConfig, EncoderConfig, MobileNetConfig
from mmtx.modality.efficientnet import EfficientNetEncoder
from mmtx.modality.grids import starts_by_size
from mmtx.modality.mobilenet import MobileNet
from mmtx.model import Block, BlockConfig, RMSNorm, rotary_embedding

NORM_EPS = torch.finfo(torch.float32).eps
# Patches at the edges of a window that are taken from its neighbour. Without any, PSNR where windows meet was 2.2 dB lower
# than elsewhere (sheets of starter pictures, 256 pixels a side); with 1 or 2 it was 0.2 dB lower, with 3 0.1 dB.
MARGIN = 1
PATCH_DROPOUT = 0.6


class Window(NamedTuple):
    """A window of a grid that goes through the network, as slices of rows and columns."""

    seen: tuple[slice, slice]    # of the grid: its input
    kept: tuple[slice, slice]    # of the grid: the part of its output that is used
    within: tuple[slice, slice]  # the same, relative to the window's corner


def windows(rows: int, columns: int, chunk: int) -> list[Window]:
    """Windows of at most `chunk` patches a side that cover a grid; each patch is kept from the one where it is further inside."""
    return [Window(*zip(row, column)) for row in _spans(rows, chunk) for column in _spans(columns, chunk)]


def _spans(length: int, chunk: int) -> list[tuple[slice, slice, slice]]:
    """`seen`, `kept` and `within` of the windows along one side of a grid."""
    if length <= chunk:
        return [(slice(0, length),) * 3]
    margin = min(MARGIN, (chunk - 1) // 2)
    count = -(-(length - 2 * margin) // (chunk - 2 * margin))
    starts = [round(i * (length - chunk) / (count - 1)) for i in range(count)]
    cuts = [0, *((a + chunk + b) // 2 for a, b in zip(starts, starts[1:])), length]
    return [(slice(start, start + chunk), slice(a, b), slice(a - start, b - start))
            for start, a, b in zip(starts, cuts, cuts[1:])]


def join(windows: Sequence[Window], parts: Sequence[Tensor]) -> Tensor:
    """Outputs (h, w, ...) of the windows of a grid -> the output for the whole grid."""
    rows, columns = (side.stop for side in windows[-1].kept)
    whole = parts[0].new_empty((rows, columns, *parts[0].shape[2:]))
    for window, part in zip(windows, parts, strict=True):
        whole[window.kept] = part[window.within]
    return whole


class PatchEncoder(nn.Module):
    """Patches -> features: the half of a PatchAutoencoder before the quantizer."""

    def __init__(self, patch_size: int, width: int, heads: int, depth: int):
        super().__init__()
        self.block = BlockConfig(
            width=width,
            heads=heads,
            kv_heads=heads,
            head_dim=width // heads,
            mlp_dim=4 * width * 2 // 3 // 8 * 8,
            causal=False,
        )
        self.embed = nn.Linear(patch_size, width)
        self.encoder = nn.ModuleList(Block(self.block) for _ in range(depth))
        self.encoder_norm = RMSNorm(width, eps=NORM_EPS)

    def features(self, patches: Tensor) -> Tensor:
        """Patches (B, h, w, P) -> encoder features of each, before the quantizer, (B, h, w, D)."""
        return self._run(self.embed(patches), self.encoder, self.encoder_norm)

    def _run(self, x: Tensor, blocks: nn.ModuleList, norm: nn.Module) -> Tensor:
        _, rows, columns, _ = x.shape
        grid = torch.cartesian_prod(torch.arange(rows, device=x.device), torch.arange(columns, device=x.device))
        angles = rotary_embedding(grid[None], self.block.head_dim, theta=100.0)
        x = x.flatten(1, 2)                                     # (B, h*w, D)
        for block in blocks:
            x = block(x, angles)
        return norm(x).unflatten(1, (rows, columns))


class GridEncoder(PatchEncoder):
    """A PatchEncoder for the concatenated grids of a batch, which may have any sizes."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config.patch, config.width, config.heads, config.depth)
        self.chunk = config.chunk

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Patches (n, P) of grids, row by row -> features (n, D); windows of equal size share a pass."""
        seen, kept = defaultdict(list), defaultdict(list)
        for (rows, columns), firsts in starts_by_size(grids).items():
            for part, inside in _places(rows, columns, self.chunk):
                seen[part.shape].append(torch.tensor(firsts)[:, None, None] + part)
                kept[part.shape].append(inside.expand(len(firsts), *inside.shape))
        order, parts = [], []
        # Indices are computed on the CPU: on a GPU, `nonzero` would force a synchronisation.
        there = lambda places: places.to(patches.device, non_blocking=True)
        for shape, members in seen.items():
            places, inside = torch.cat(members), torch.cat(kept[shape]).flatten().nonzero().squeeze(1)
            parts.append(self.features(patches[there(places)]).flatten(0, 2)[there(inside)])
            order.append(places.flatten()[inside])
        return torch.cat(parts)[there(torch.cat(order).argsort())]


class SoundEncoder(nn.Module):
    """A patch encoder, which hears pitch exactly, and a pretrained MobileNet, which knows what sounds alike, side by side.

    In training the patch encoder is left out of a share of the sounds, `PATCH_DROPOUT`; otherwise a decoder that can already tell
    all sounds of the training data by it would never learn to use the MobileNet.
    """

    def __init__(self, config: MobileNetConfig):
        super().__init__()
        self.patches = GridEncoder(config.patches)
        self.network = MobileNet(config)

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Patches (n, P) of grids, row by row -> features (n, D), those of the patch encoder first."""
        heard = self.patches(patches, grids)
        if self.training:
            # By a hash of the sound, and not by a random generator, whose state a resumed run would need.
            counts = torch.tensor([rows * columns for rows, columns in grids])
            means = torch.stack([part.float().mean() for part in patches.split(counts.tolist())])
            kept = ((means * 1e4).frac().abs() >= PATCH_DROPOUT).repeat_interleave(counts.to(means.device))
            heard = heard * kept[:, None]
        return torch.cat([heard, self.network(patches, grids)], 1)


def build_encoder(config: AnyEncoderConfig) -> nn.Module:
    """Build the encoder of a configuration, with random weights."""
    if isinstance(config, EfficientNetConfig):
        return EfficientNetEncoder(config)
    return SoundEncoder(config) if isinstance(config, MobileNetConfig) else GridEncoder(config)


@lru_cache(1024)
def _places(rows: int, columns: int, chunk: int) -> list[tuple[Tensor, Tensor]]:
    """The windows of a grid: indices of the patches that each sees, and a mask of those that it keeps, both (h, w)."""
    places, found = torch.arange(rows * columns).view(rows, columns), []
    for window in windows(rows, columns, chunk):
        part = places[window.seen]
        inside = torch.zeros(part.shape, dtype=torch.bool)
        inside[window.within] = True
        found.append((part, inside))
    return found
