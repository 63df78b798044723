"""The network that the image and the audio codec share: patches -> Transformer -> FSQ -> Transformer -> patches.

Shapes: B batch, h rows and w columns of a grid of patches, P numbers in a patch, D width, d quantizer dimensions.
A picture is a grid of rows and columns; a piece of a spectrogram is a grid of time steps and frequency bands.
"""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from mmtx.errors import InputError
from mmtx.files import CONFIG, write_json
from mmtx.layers import Block, BlockConfig, RMSNorm, initialise, rotary_embedding
from mmtx.modality.base import Encoding, MediaTokenizer, read_config
from mmtx.modality.fsq import FSQ
from mmtx.schema import build, within
from mmtx.weights import load_module, to_bytes

NORM_EPS = torch.finfo(torch.float32).eps
MOST_CODES = 2**20  # of a quantizer: tables of this length are made for it
# Patches at the edges of a window that its neighbour sees better. Without any, PSNR where windows meet was 2.2 dB lower
# than elsewhere (sheets of starter pictures, 256 pixels a side); with 1 or 2 it was 0.2 dB lower, with 3 0.1 dB.
MARGIN = 1
ENCODE_BATCH = 64  # grids that go through the network together
ENCODING = ("embed", "encoder", "encoder_norm", "to_latent")  # parts of the network that codes depend on


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the encoder and the decoder, and the quantizer's levels (their product is the codebook)."""

    width: int = 192
    heads: int = 3
    encoder_depth: int = 2
    decoder_depth: int = 3
    levels: tuple[int, ...] = (8, 8, 8, 6, 5)

    def __post_init__(self):
        object.__setattr__(self, "levels", tuple(self.levels))
        for name, least, most in (("width", 1, 2**16), ("heads", 1, 2**10), ("encoder_depth", 0, 2**10), ("decoder_depth", 0, 2**10)):
            within(f"network.{name}", getattr(self, name), least, most)
        within("network.levels", len(self.levels), 1, 64)
        within("network.levels, their product", math.prod(self.levels), 2, MOST_CODES)
        if self.width % (4 * self.heads):
            raise InputError(f"network.width: found {self.width} with {self.heads} heads, "
                             "expected a multiple of 4 * heads")


class Reconstruction(NamedTuple):
    """What a codec makes of a batch: `output` like the input, and `codes` (B, h, w)."""

    output: Tensor
    codes: Tensor


class Window(NamedTuple):
    """A part of a grid that goes through the network, as rows and columns."""

    seen: tuple[slice, slice]    # of the grid: what goes in
    kept: tuple[slice, slice]    # of the grid: what is taken from what comes out
    within: tuple[slice, slice]  # the same, counted from the window's corner


def windows(rows: int, columns: int, chunk: int) -> list[Window]:
    """Windows of at most a chunk a side that cover a grid, each patch kept from the one where it lies further inside."""
    return [Window(*zip(row, column)) for row in _spans(rows, chunk) for column in _spans(columns, chunk)]


def _spans(length: int, chunk: int) -> list[tuple[slice, slice, slice]]:
    """`seen`, `kept` and `within` of the windows along one side."""
    if length <= chunk:
        return [(slice(0, length),) * 3]
    margin = min(MARGIN, (chunk - 1) // 2)
    count = -(-(length - 2 * margin) // (chunk - 2 * margin))
    starts = [round(i * (length - chunk) / (count - 1)) for i in range(count)]
    cuts = [0, *((a + chunk + b) // 2 for a, b in zip(starts, starts[1:])), length]
    return [(slice(start, start + chunk), slice(a, b), slice(a - start, b - start))
            for start, a, b in zip(starts, cuts, cuts[1:])]


def join(windows: Sequence[Window], parts: Sequence[Tensor]) -> Tensor:
    """What came out for each of the windows of a grid, (h, w, ...) -> all of it."""
    rows, columns = (side.stop for side in windows[-1].kept)
    whole = parts[0].new_empty((rows, columns, *parts[0].shape[2:]))
    for window, part in zip(windows, parts, strict=True):
        whole[window.kept] = part[window.within]
    return whole


class PatchEncoder(nn.Module):
    """Patches -> features: the half of a PatchAutoencoder before the quantizer, which a decoder may train along."""

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
        """Patches (B, h, w, P) -> what the encoder makes of each before the quantizer, (B, h, w, D)."""
        return self._run(self.embed(patches), self.encoder, self.encoder_norm)

    def _run(self, x: Tensor, blocks: nn.ModuleList, norm: nn.Module) -> Tensor:
        _, rows, columns, _ = x.shape
        grid = torch.cartesian_prod(torch.arange(rows, device=x.device), torch.arange(columns, device=x.device))
        angles = rotary_embedding(grid[None], self.block.head_dim, theta=100.0)
        x = x.flatten(1, 2)                                     # (B, h*w, D)
        for block in blocks:
            x = block(x, angles)
        return norm(x).unflatten(1, (rows, columns))


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder that a decoder trains along: `patch` numbers in, `width` out, `chunk` patches a side at once."""

    patch: int
    width: int
    heads: int
    depth: int
    chunk: int

    def __post_init__(self):
        for name, least, most in (("patch", 1, 2**16), ("width", 1, 2**16), ("heads", 1, 2**10), ("depth", 0, 2**10),
                                  ("chunk", 1, 4096)):
            within(f"encoders: {name}", getattr(self, name), least, most)
        if self.width % (4 * self.heads):
            raise InputError(f"encoders: width: found {self.width} with {self.heads} heads, expected a multiple of 4 * heads")


class GridEncoder(PatchEncoder):
    """A PatchEncoder over the grids of a batch, which lie one behind another and have any sizes."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config.patch, config.width, config.heads, config.depth)
        self.chunk = config.chunk

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Patches (n, P) of grids, row by row -> features (n, D); windows of equal size share a pass."""
        seen, kept = defaultdict(list), defaultdict(list)
        first = 0
        for rows, columns in grids:
            places = torch.arange(first, first + rows * columns).view(rows, columns)
            for window in windows(rows, columns, self.chunk):
                part = places[window.seen]
                inside = torch.zeros(part.shape, dtype=torch.bool)
                inside[window.within] = True
                seen[part.shape].append(part)
                kept[part.shape].append(inside)
            first += rows * columns
        order, parts = [], []
        for shape, members in seen.items():
            places, inside = torch.stack(members).to(patches.device), torch.stack(kept[shape]).to(patches.device)
            parts.append(self.features(patches[places])[inside])
            order.append(places[inside])
        return torch.cat(parts)[torch.cat(order).argsort()]


class PatchAutoencoder(PatchEncoder):
    """Encoder, quantizer and decoder over grids of patches."""

    def __init__(self, patch_size: int, config: NetworkConfig):
        super().__init__(patch_size, config.width, config.heads, config.encoder_depth)
        self.quantizer = FSQ(config.levels)
        self.to_latent = nn.Linear(config.width, len(config.levels))
        self.from_latent = nn.Linear(len(config.levels), config.width)
        self.decoder = nn.ModuleList(Block(self.block) for _ in range(config.decoder_depth))
        self.decoder_norm = RMSNorm(config.width, eps=NORM_EPS)
        self.to_patch = nn.Linear(config.width, patch_size)
        initialise(self, max(config.encoder_depth, config.decoder_depth))
        # Latents must start with a spread of about one level, or every patch gets the middle code.
        nn.init.normal_(self.to_latent.weight, std=config.width ** -0.5)
        nn.init.normal_(self.from_latent.weight, std=1.0)

    def quantize(self, features: Tensor) -> Tensor:
        """Features (B, h, w, D) -> quantized latents (B, h, w, d) in [-1, 1]."""
        return self.quantizer(self.to_latent(features))

    def encode(self, patches: Tensor) -> Tensor:
        """Patches (B, h, w, P) -> quantized latents (B, h, w, d) in [-1, 1]."""
        return self.quantize(self.features(patches))

    def decode(self, latents: Tensor) -> Tensor:
        """Quantized latents (B, h, w, d) -> patches (B, h, w, P)."""
        return self.to_patch(self._run(self.from_latent(latents), self.decoder, self.decoder_norm))


class Codec(MediaTokenizer, nn.Module):
    """A tokenizer with a PatchAutoencoder in the middle; a subclass turns its medium into grids of patches.

    `mmtx.training.codec` trains any: `piece` cuts media, `batch` puts pieces together, and `forward` is what is learned.
    """

    Config: ClassVar[type]
    config: Any  # a frozen dataclass, an instance of `Config`, with a field `network: NetworkConfig`
    network: PatchAutoencoder
    parts: ClassVar[tuple[str, ...]] = ()  # keys of config.json that are not `config`'s: of what a subclass adds
    later: ClassVar[tuple[str, ...]] = ()  # fields of `config` that are left out while they have their default

    @property
    def size(self) -> int:
        return self.network.quantizer.size

    @property
    def levels(self) -> tuple[int, ...]:  # type: ignore[override]  # the contract lets it be a property
        """Levels of the quantizer: code = mixed-radix number of one digit for each."""
        return self.network.quantizer.levels

    @property
    def feature_width(self) -> int:  # type: ignore[override]  # the contract lets it be a property
        """D of the features of an `Encoding`."""
        return self.network.to_latent.in_features

    @property
    def encoder_config(self) -> EncoderConfig:
        """Of an encoder like this codec's own."""
        network = self.network
        return EncoderConfig(network.embed.in_features, network.embed.out_features, network.block.heads, len(network.encoder),
                             self.config.chunk)

    @abstractmethod
    def forward(self, batch: Tensor) -> Reconstruction:
        """What `batch` gives -> its reconstruction, and codes (B, h, w)."""

    def piece(self, medium: Tensor, generator: torch.Generator) -> Tensor:
        """A piece of a medium for a batch, all of one shape; by default the medium, for those that have one shape."""
        return medium

    def batch(self, pieces: Sequence[Tensor]) -> Tensor:
        """Pieces of one shape -> what `forward` takes."""
        return torch.stack(list(pieces))

    def pictures(self, batch: Tensor) -> list[Tensor]:
        """What `forward` takes or gives -> a picture of each, uint8 (3, H, W), for people to look at; by default none."""
        return []

    @property
    def device(self) -> torch.device:
        return self.network.embed.weight.device

    @torch.no_grad()
    def embed_grids(self, grids: Sequence[Tensor], patches: bool = False, codes: bool = True) -> list[Encoding]:
        """Grids (h, w, P) of any sizes, at most a chunk -> codes and features of each; equal sizes share a pass."""
        def run(batch: Tensor) -> tuple[Tensor, Tensor]:
            if patches and not codes:
                return torch.zeros(batch.shape[:-1], dtype=torch.long), batch.half()
            features = self.network.features(batch)
            found = self.network.quantizer.to_codes(self.network.quantize(features))
            return found, (batch if patches else features).half()
        return [Encoding(found.numpy(), features) for found, features in self._in_batches(grids, run)]

    @torch.no_grad()
    def codes_to_grids(self, codes: Sequence[np.ndarray]) -> list[Tensor]:
        """Codes (h, w) of any sizes, at most a chunk -> grids (h, w, P) of each."""
        for item in codes:
            if item.size and (item.min() < 0 or item.max() >= self.size):
                raise InputError(f"{self.kind} codes: found {item.min()}..{item.max()}, expected 0..{self.size - 1}")
        run = lambda batch: (self.network.decode(self.network.quantizer.to_latents(batch)),)
        return [grid for (grid,) in self._in_batches([torch.tensor(item) for item in codes], run)]

    def _in_batches(self, items: Sequence[Tensor], run: Callable[[Tensor], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        groups = defaultdict(list)
        for index, item in enumerate(items):
            groups[tuple(item.shape)].append(index)
        results: list[tuple[Tensor, ...]] = [()] * len(items)
        for members in groups.values():
            for first in range(0, len(members), ENCODE_BATCH):
                chosen = members[first:first + ENCODE_BATCH]
                outputs = [output.cpu() for output in run(torch.stack([items[i] for i in chosen]).to(self.device))]
                for i, *item in zip(chosen, *outputs, strict=True):
                    results[i] = tuple(item)
        return results

    def values(self) -> dict:
        """What config.json holds."""
        return {"kind": self.kind, **asdict(self.config)}

    def code_files(self) -> dict[str, bytes]:
        return self._files(ENCODING)

    def files(self) -> dict[str, bytes]:
        return self._files(tuple(name for name, _ in self.network.named_children()), to_bytes)

    def _files(self, parts: tuple[str, ...], to_bytes=safetensors.torch.save) -> dict[str, bytes]:
        """The configuration, and the weights of some parts of the network."""
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.network.state_dict(prefix="network.").items()
                   if name.split(".")[1] in parts}
        return {
            "config.json": write_json(self.values()),
            "model.safetensors": to_bytes(weights),
        }

    @classmethod
    def from_folder(cls, folder: Path) -> "Codec":
        folder = Path(folder)
        values = {key: value for key, value in read_config(folder, cls.kind).items() if key not in ("kind", *cls.parts)}
        config: Any = build(cls.Config, values, folder / CONFIG, optional=cls.later)
        return load_module(lambda: cls(config), folder / "model.safetensors").eval()
