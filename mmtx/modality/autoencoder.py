"""The network that the image and the audio codec share: patches -> Transformer -> FSQ -> Transformer -> patches.

Shapes: B batch, h rows and w columns of a grid of patches, P numbers in a patch, D width, d quantizer dimensions.
A picture is a grid of rows and columns; a piece of a spectrogram is a grid of time steps and frequency bands.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from mmtx.errors import InputError
from mmtx.layers import Block, BlockConfig, initialise, rotary
from mmtx.modality.base import Tokenizer, read_json, write_json
from mmtx.modality.fsq import FSQ

ENCODE_BATCH = 64  # grids that go through the network together


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
        if self.heads < 1 or self.width % (4 * self.heads):
            raise InputError(f"network.width: found {self.width} with {self.heads} heads, "
                             "expected a multiple of 4 * heads")


class Reconstruction(NamedTuple):
    """What a codec makes of a batch: `output` like the input, and `codes` (B, h, w)."""

    output: Tensor
    codes: Tensor


class PatchAutoencoder(nn.Module):
    """Encoder, quantizer and decoder over grids of patches."""

    def __init__(self, patch_size: int, config: NetworkConfig):
        super().__init__()
        block = BlockConfig(
            width=config.width,
            heads=config.heads,
            kv_heads=config.heads,
            head_width=config.width // config.heads,
            hidden=4 * config.width * 2 // 3 // 8 * 8,
            causal=False,
        )
        self.head_width = block.head_width
        self.quantizer = FSQ(config.levels)
        self.embed = nn.Linear(patch_size, config.width)
        self.encoder = nn.ModuleList(Block(block) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.RMSNorm(config.width)
        self.to_latent = nn.Linear(config.width, len(config.levels))
        self.from_latent = nn.Linear(len(config.levels), config.width)
        self.decoder = nn.ModuleList(Block(block) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.RMSNorm(config.width)
        self.to_patch = nn.Linear(config.width, patch_size)
        initialise(self, max(config.encoder_depth, config.decoder_depth))
        # Latents must start with a spread of about one level, or every patch gets the middle code.
        nn.init.normal_(self.to_latent.weight, std=config.width ** -0.5)
        nn.init.normal_(self.from_latent.weight, std=1.0)

    def encode(self, patches: Tensor) -> Tensor:
        """Patches (B, h, w, P) -> quantized latents (B, h, w, d) in [-1, 1]."""
        return self.quantizer(self.to_latent(self._run(self.embed(patches), self.encoder, self.encoder_norm)))

    def decode(self, latents: Tensor) -> Tensor:
        """Quantized latents (B, h, w, d) -> patches (B, h, w, P)."""
        return self.to_patch(self._run(self.from_latent(latents), self.decoder, self.decoder_norm))

    def _run(self, x: Tensor, blocks: nn.ModuleList, norm: nn.Module) -> Tensor:
        _, rows, columns, _ = x.shape
        grid = torch.cartesian_prod(torch.arange(rows, device=x.device), torch.arange(columns, device=x.device))
        angles = rotary(grid[None], self.head_width, theta=100.0)
        x = x.flatten(1, 2)                                     # (B, h*w, D)
        for block in blocks:
            x = block(x, angles)
        return norm(x).unflatten(1, (rows, columns))


class Codec(Tokenizer, nn.Module):
    """A tokenizer with a PatchAutoencoder in the middle; a subclass turns its medium into grids of patches."""

    config: "object"  # a frozen dataclass with a field `network: NetworkConfig`
    network: PatchAutoencoder

    @property
    def size(self) -> int:
        return self.network.quantizer.size

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of the quantizer: code = mixed-radix number of one digit for each."""
        return self.network.quantizer.levels

    @property
    def device(self) -> torch.device:
        return self.network.embed.weight.device

    @torch.no_grad()
    def grids_to_codes(self, grids: Sequence[Tensor]) -> list[np.ndarray]:
        """Grids (h, w, P) of any sizes -> codes (h, w) of each; equal sizes share a pass."""
        run = lambda batch: self.network.quantizer.to_codes(self.network.encode(batch))  # noqa: E731
        return [codes.numpy() for codes in self._in_batches(grids, run)]

    @torch.no_grad()
    def codes_to_grids(self, codes: Sequence[np.ndarray]) -> list[Tensor]:
        """Codes (h, w) of any sizes -> grids (h, w, P) of each."""
        for item in codes:
            if item.size and (item.min() < 0 or item.max() >= self.size):
                raise InputError(f"{self.kind} codes: found {item.min()}..{item.max()}, expected 0..{self.size - 1}")
        run = lambda batch: self.network.decode(self.network.quantizer.to_latents(batch))  # noqa: E731
        return self._in_batches([torch.tensor(item) for item in codes], run)

    def _in_batches(self, items: Sequence[Tensor], run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        groups = defaultdict(list)
        for index, item in enumerate(items):
            groups[tuple(item.shape)].append(index)
        results: list[Tensor] = [None] * len(items)
        for members in groups.values():
            for first in range(0, len(members), ENCODE_BATCH):
                chosen = members[first:first + ENCODE_BATCH]
                output = run(torch.stack([items[i] for i in chosen]).to(self.device)).cpu()
                for i, item in zip(chosen, output, strict=True):
                    results[i] = item
        return results

    def files(self) -> dict[str, bytes]:
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        return {
            "config.json": write_json({"kind": self.kind, **asdict(self.config)}),
            "model.safetensors": safetensors.torch.save(weights),
        }

    @classmethod
    def from_folder(cls, folder: Path) -> "Codec":
        folder = Path(folder)
        values = read_json(folder / "config.json")
        values.pop("kind", None)
        try:
            tokenizer = cls(cls.Config(**{**values, "network": NetworkConfig(**values["network"])}))
            weights = safetensors.torch.load((folder / "model.safetensors").read_bytes())
            tokenizer.load_state_dict(weights)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{folder}: not a whole {cls.kind} tokenizer ({str(error).splitlines()[0]})") from None
        return tokenizer.eval()
