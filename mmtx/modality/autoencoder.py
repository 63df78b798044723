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

from mmtx.config import EncoderConfig
from mmtx.errors import InputError
from mmtx.files import user_path
from mmtx.json_files import write_json
from mmtx.modality.base import Encoding, MediaTokenizer, check_codes, read_config
from mmtx.modality.encoder import NORM_EPS, PatchEncoder
from mmtx.modality.fsq import FSQ
from mmtx.model import Block, RMSNorm, initialise
from mmtx.saved_folder import CONFIG
from mmtx.schema import build, typed, within
from mmtx.weights import load_module, to_bytes, weights_of

MOST_CODES = 2**20  # of a quantizer, which needs tables of this length
ENCODE_BATCH = 64  # grids in one pass of the network
ENCODING = ("embed", "encoder", "encoder_norm", "to_latent")  # parts of the network that codes depend on


@typed
@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the encoder and the decoder, and the quantizer's levels, whose product is the codebook size."""

    width: int = 192
    heads: int = 3
    encoder_depth: int = 2
    decoder_depth: int = 3
    levels: tuple[int, ...] = (8, 8, 8, 6, 5)

    def __post_init__(self):
        for name, least, most in (("width", 1, 2**16), ("heads", 1, 2**10), ("encoder_depth", 0, 2**10), ("decoder_depth", 0, 2**10)):
            within(f"network.{name}", getattr(self, name), least, most)
        within("network.levels", len(self.levels), 1, 64)
        within("network.levels, their product", math.prod(self.levels), 2, MOST_CODES)
        if self.width % (4 * self.heads):
            raise InputError(f"network.width: found {self.width} with {self.heads} heads, "
                             "expected a multiple of 4 * heads")


class Reconstruction(NamedTuple):
    """A codec's reconstruction of a batch: `output` of the input's shape, and `codes` (B, h, w)."""

    output: Tensor
    codes: Tensor


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
    """A tokenizer built on a PatchAutoencoder; a subclass turns its media into grids of patches.

    `mmtx.training.codec` trains any of them: `piece` crops media, `batch` collates the pieces, and `forward` reconstructs them.
    """

    Config: ClassVar[type]
    config: Any  # a frozen dataclass, an instance of `Config`, with a field `network: NetworkConfig`
    network: PatchAutoencoder
    parts: ClassVar[tuple[str, ...]] = ()  # keys of config.json that a subclass adds to those of `config`
    later: ClassVar[tuple[str, ...]] = ()  # fields of `config` that files omit while they have their default

    @property
    def size(self) -> int:
        return self.network.quantizer.size

    @property
    def levels(self) -> tuple[int, ...]:  # type: ignore[override]  # the contract lets it be a property
        """Levels of the quantizer; a code is the mixed-radix number of one digit per level."""
        return self.network.quantizer.levels

    @property
    def feature_width(self) -> int:  # type: ignore[override]  # the contract lets it be a property
        """D of the features of an `Encoding`."""
        return self.network.to_latent.in_features

    @property
    def encoder_config(self) -> EncoderConfig:
        """The configuration of an encoder like this codec's own."""
        network = self.network
        return EncoderConfig(network.embed.in_features, network.embed.out_features, network.block.heads, len(network.encoder),
                             self.config.chunk)

    @abstractmethod
    def forward(self, batch: Tensor) -> Reconstruction:
        """The output of `batch` -> its reconstruction and codes (B, h, w)."""

    def piece(self, medium: Tensor, generator: torch.Generator) -> Tensor:
        """Crop a medium for a batch, to the same shape for all; by default the whole medium, for media of one shape."""
        return medium

    def batch(self, pieces: Sequence[Tensor]) -> Tensor:
        """Pieces of one shape -> the input of `forward`."""
        return torch.stack(list(pieces))

    def pictures(self, batch: Tensor) -> list[Tensor]:
        """Inputs or outputs of `forward` -> a picture of each, uint8 (3, H, W), for people to look at; by default none."""
        return []

    @property
    def device(self) -> torch.device:
        return self.network.embed.weight.device

    @torch.no_grad()
    def embed_grids(self, grids: Sequence[Tensor], patches: bool = False, codes: bool = True) -> list[Encoding]:
        """Grids (h, w, P) of any sizes up to a chunk -> codes and features of each; equal sizes share a pass.

        With `patches` the features are the patches; if then `codes` is False, the network does not run and all codes are 0.
        """
        if patches and not codes:
            return [Encoding(np.zeros(grid.shape[:2], np.int64), grid.half().cpu()) for grid in grids]

        def run(batch: Tensor) -> tuple[Tensor, Tensor]:
            features = self.network.features(batch)
            found = self.network.quantizer.to_codes(self.network.quantize(features))
            return found, (batch if patches else features).half()
        return [Encoding(found.numpy(), features) for found, features in self._in_batches(grids, run)]

    @torch.no_grad()
    def codes_to_grids(self, codes: Sequence[np.ndarray]) -> list[Tensor]:
        """Codes (h, w) of any sizes up to a chunk -> grids (h, w, P). Raises InputError on a code outside [0, size)."""
        for item in codes:
            check_codes(item, range(self.size), f"{self.kind} codes")
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
        """The content of config.json."""
        return {"kind": self.kind, **asdict(self.config)}

    def code_files(self) -> dict[str, bytes]:
        return self._files(ENCODING)

    def files(self) -> dict[str, bytes]:
        return self._files(None, to_bytes)

    def _files(self, parts: tuple[str, ...] | None, to_bytes=safetensors.torch.save) -> dict[str, bytes]:
        """The configuration, and the weights of some parts of the network, or of all."""
        weights = {name: tensor.contiguous().cpu() for name, tensor in weights_of(self.network, "network.").items()
                   if parts is None or name.split(".")[1] in parts}
        return {
            CONFIG: write_json(self.values()),
            "model.safetensors": to_bytes(weights),
        }

    @classmethod
    def from_folder(cls, folder: Path) -> "Codec":
        folder = user_path(folder)
        values = {key: value for key, value in read_config(folder, cls.kind).items() if key not in ("kind", *cls.parts)}
        config: Any = build(cls.Config, values, folder / CONFIG, optional=cls.later)
        return load_module(lambda: cls(config), folder / "model.safetensors").eval()
