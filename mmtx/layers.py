"""The one Transformer block of mmtx, for the decoder (causal) and for the codecs (not causal).

Shapes: B batch, T tokens, D width, H heads, G key-value heads, K head width, A position axes.

The block is that of Qwen3 (https://arxiv.org/abs/2505.09388): RMSNorm before each half, grouped-query attention
with RMSNorm on every query and key head (QK-norm), rotary positions, SwiGLU, no biases. Without QK-norm it is that of
Llama, with biases on queries, keys and values too that of Qwen2. Projections that read the same input are one matrix.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmtx.kernels import Heads, attend, pad_input, qk_norm_rope, rms_norm, swiglu, unpad_input


@dataclass(frozen=True)
class BlockConfig:
    """Sizes of a block; `mlp_dim` is the inner width of the feed-forward half."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    causal: bool
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3 stretches rotary positions: pairs that turn slowly are slowed by `factor`, fast ones are left alone.

    Slow is less than `low_frequency` turns in `original_context` tokens, fast more than `high_frequency`.
    """

    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_context: int = 8192

    def divisors(self, frequency: Tensor) -> Tensor:
        """What to divide each pair's angle a token (K/2,) by."""
        turns = self.original_context * frequency / (2 * math.pi)
        share = ((turns - self.low_frequency) / (self.high_frequency - self.low_frequency)).clamp(0, 1)
        return 1 / ((1 - share) / self.factor + share)


class Packing(NamedTuple):
    """Where the documents of a packed batch lie, so that attention runs on each document alone.

    Attention then needs no mask of T x T: its cost grows with the documents, and a leak is impossible. Documents go
    in groups of similar length (a factor of two), so that one long document does not make the short ones dear.
    """

    gather: Tensor                       # (slots,) indices into the B*T flat tokens: documents of one length after another,
                                         # the shorter ones of a group padded with 0
    scatter: Tensor                      # (B*T,) the slot of each token
    groups: tuple[tuple[int, int], ...]  # documents and slots of each, for each group

    @classmethod
    def of(cls, documents: Tensor) -> "Packing":
        """Build it from document numbers (B, T): equal neighbours in a row belong together."""
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        first = starts.flatten().nonzero().squeeze(1)                      # (documents,)
        length = torch.diff(first, append=first.new_tensor([documents.numel()]))
        group = length.double().log2().ceil()
        scatter = torch.empty(documents.numel(), dtype=torch.long, device=documents.device)
        gathers, groups, base = [], [], 0
        for number in group.unique():
            begin, size = first[group == number], length[group == number]
            offset = torch.arange(int(size.max()), device=documents.device)
            real = offset < size[:, None]                                  # (documents, longest)
            tokens = begin[:, None] + offset
            slots = base + torch.arange(real.numel(), device=documents.device).view_as(real)
            scatter[tokens[real]] = slots[real]
            gathers.append(torch.where(real, tokens, 0).flatten())
            groups.append((real.shape[0], real.shape[1]))
            base += real.numel()
        return cls(torch.cat(gathers), scatter, tuple(groups))


def rotary_embedding(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., T, K) of the rotary angles (RoPE, https://arxiv.org/abs/2104.09864).

    `positions` is (..., T) for a sequence or (..., T, A) for a grid; each axis turns its own share of the pairs.
    """
    if positions.dim() < 3:
        positions = positions[..., None]
    axes = positions.shape[-1]
    pairs = head_dim // 2 // axes
    frequency = theta ** (-torch.arange(pairs, dtype=torch.float32, device=positions.device) / pairs)
    if scaling is not None:
        frequency = frequency / scaling.divisors(frequency)
    angles = (positions[..., None].float() * frequency).flatten(-2)        # (..., T, K/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


class FusedLinear(nn.Linear):
    """Several projections of the same input in one matrix: (..., D) -> (..., sum(sizes))."""

    def __init__(self, width: int, sizes: tuple[int, ...], bias: bool = False):
        super().__init__(width, sum(sizes), bias=bias)
        self.sizes = sizes


class RMSNorm(nn.RMSNorm):
    """`rms_norm` with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention, by default with QK-norm."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.qkv = FusedLinear(config.width, (query, key, key), config.qkv_bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.query_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,                                  # (B, T, D)
        angles: tuple[Tensor, Tensor],              # (B, T, K) each
        packing: Packing | None = None,
    ) -> Tensor:                                    # (B, T, D)
        query, key, value = self.heads(x, angles)
        if packing is not None:
            y = self._attend_documents(query, key, value, packing)
        else:
            y = attend(query, key, value, self.config.causal)
        return self.out(y.reshape(*x.shape[:2], -1))

    def heads(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Heads:
        """Inputs (B, T, D) -> queries (B, T, H, K), keys and values (B, T, G, K), turned by their positions."""
        c = self.config
        norms = (self.query_norm.weight, self.key_norm.weight) if c.qk_norm else (None, None)
        return qk_norm_rope(self.qkv(x), *norms, *angles, c.heads, c.kv_heads, c.norm_eps)

    def _attend_documents(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        # Causal attention never looks right, so the padding behind a short document is never seen.
        assert self.config.causal, "packed attention needs a causal block"
        sizes = [documents * longest for documents, longest in packing.groups]
        query, key, value = (pad_input(part.flatten(0, 1), packing.gather, packing.scatter).split(sizes)
                             for part in (query, key, value))                            # (slots, H | G, K), by group
        outputs = [attend(q.unflatten(0, group), k.unflatten(0, group), v.unflatten(0, group), causal=True).flatten(0, 1)
                   for group, q, k, v in zip(packing.groups, query, key, value, strict=True)]
        return unpad_input(torch.cat(outputs), packing.scatter)


class FeedForward(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.gate_up = FusedLinear(config.width, (config.mlp_dim, config.mlp_dim))
        self.down = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the stream (B, T, D)."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], packing: Packing | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, packing)
        return x + self.feed_forward(self.feed_forward_norm(x))


def initialise(module: nn.Module, depth: int) -> None:
    """Normal(0, 0.02) weights; matrices that write into the stream are scaled by 1/sqrt(2 * depth) (GPT-2)."""
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            continue
        writes = name.endswith(("out.weight", "down.weight"))
        nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if writes else 0.02)
