"""The KV cache: keys and values of a batch's prompts and generated ids.

Shapes: B batch, G key-value heads, C capacity, K head width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtx.config import DecoderConfig
from mmtx.model import rotary_embedding


class CacheTensors(NamedTuple):
    """The device tensors of a `KVCache`, under the same names."""

    keys: list[Tensor]
    values: list[Tensor]
    seen: Tensor
    slot: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor


@dataclass
class KVCache:
    """Keys and values of a batch. A step writes all rows at the same slot, though their positions may differ.

    Its capacity doubles when it is full, so that memory follows the number of tokens, not the limit.
    """

    config: DecoderConfig
    keys: list[Tensor]             # one per layer, (B, G, C, K)
    values: list[Tensor]           # the same
    seen: Tensor                   # (B, C) bool: slots that hold a token of the row, not padding
    used: int                      # number of used slots, so the one for the next tokens
    slot: Tensor                   # (1,) the same number on the device
    positions: Tensor              # (B,) of the next tokens
    cos: Tensor                    # (C, K) of the rotary angles at each position
    sin: Tensor                    # (C, K), negated in the lower half

    @classmethod
    def of(cls, config: DecoderConfig, lengths: Tensor, used: int, capacity: int, like: Tensor,
           dtype: torch.dtype | None = None) -> "KVCache":
        """A cache for prompts of `lengths` (B,), whose keys and values are still to be written, up to slot `used`.

        They are computed in the dtype of `like` and stored in `dtype`, by default the same.
        """
        c, batch, device = config, len(lengths), like.device
        shape = batch, c.kv_heads, capacity, c.head_dim
        keys, values = ([_empty(like[:0].to(dtype or like.dtype), shape) for _ in range(c.depth)] for _ in range(2))
        seen = torch.arange(capacity, device=device) < lengths[:, None]
        cos, sin = _angles(c, capacity, like)
        return cls(c, keys, values, seen, used, torch.tensor([used], device=device), lengths.clone(), cos, sin)

    @property
    def capacity(self) -> int:
        return self.seen.shape[1]

    @property
    def size(self) -> int:
        """Bytes of its keys and values."""
        return sum(each.nbytes for each in (*self.keys, *self.values))

    def tensors(self) -> CacheTensors:
        return CacheTensors(self.keys, self.values, self.seen, self.slot, self.positions, self.cos, self.sin)

    def restart(self, lengths: Tensor, used: int) -> None:
        """Reset it in place, as `of` makes it, for other prompts."""
        torch._foreach_zero_([*self.keys, *self.values])  # masked slots are read, and must not be NaN
        self.seen.copy_(torch.arange(self.capacity, device=self.seen.device) < lengths[:, None])
        self.used = used
        self.slot.fill_(used)
        self.positions.copy_(lengths)

    def copy_(self, other: "KVCache") -> None:
        """Take over, in place, the tokens of a smaller cache with as many rows."""
        used = self.used = other.used
        for mine, given in ((self.keys, other.keys), (self.values, other.values)):
            for each, smaller in zip(mine, given, strict=True):
                each[:, :, :used] = smaller[:, :, :used]
        self.seen.zero_()
        self.seen[:, :used] = other.seen[:, :used]
        self.slot.fill_(used)
        self.positions.copy_(other.positions)

    def grow(self) -> None:
        """Double the capacity."""
        more = self.capacity
        for tensors in (self.keys, self.values):
            for layer, each in enumerate(tensors):
                tensors[layer] = _empty(each, (*each.shape[:2], 2 * more, each.shape[3]))
                tensors[layer][:, :, :self.used] = each[:, :, :self.used]
        self.seen = F.pad(self.seen, (0, more))
        self.cos, self.sin = _angles(self.config, 2 * more, self.cos)

    def keep(self, rows: Tensor) -> None:
        """Keep only some rows, in ascending order."""
        used = self.used
        for tensors in (self.keys, self.values):
            for layer, each in enumerate(tensors):
                each[:len(rows), :, :used] = each[rows, :, :used]
                tensors[layer] = each[:len(rows)]
        self.seen, self.positions = self.seen[rows], self.positions[rows]

    def close_gaps(self) -> None:
        """Remove the padding from a cache of one row, so that a row left from a batch looks as if it had always been alone."""
        chosen = self.seen[0, :self.used].nonzero()[:, 0]
        if len(chosen) < self.used:
            for each in (*self.keys, *self.values):
                each[:, :, :len(chosen)] = each[:, :, chosen]
            self.seen[:, len(chosen):] = False
            self.seen[:, :len(chosen)] = True
            self.used = len(chosen)
            self.slot.fill_(self.used)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unused slots: zeros on a GPU, where masked slots are read and must not be NaN."""
    return like.new_zeros(shape) if like.is_cuda else like.new_empty(shape)


def _angles(config: DecoderConfig, capacity: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `rotary_embedding`; sine is negated in the lower half, instead of half of a head when it is rotated."""
    cos, sin = rotary_embedding(torch.arange(capacity, device=like.device), config.head_dim, config.rope_theta,
                                config.rope_scaling)
    sin[:, :config.head_dim // 2] *= -1
    return cos.to(like.dtype), sin.to(like.dtype)
