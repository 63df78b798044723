"""The decoder: token ids in, logits of the next id out.

Shapes: B batch, T tokens, D width, H heads, G key-value heads, K head width, V vocabulary, A position axes.

It is Qwen3's dense architecture (https://arxiv.org/abs/2505.09388) over a longer vocabulary: pre-norm blocks with RMSNorm,
grouped-query attention with RMSNorm on every query and key head (QK-norm), rotary positions, SwiGLU, no biases. Without
QK-norm it is Llama's, and with biases on queries, keys and values as well, Qwen2's. Projections of the same input are fused
into one matrix. The codecs use the same block without the causal mask. A picture or sound that is an input, not generated,
can enter as features instead of codes: those of its codec before the quantizer, or of an encoder of the decoder's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtx.config import AnyEncoderConfig, DecoderConfig, RopeScaling
from mmtx.embedding import Features, TokenEmbedding
from mmtx.kernels import Heads, attend, qk_norm_rope, rms_norm, swiglu
from mmtx.varlen import Packing, attend_documents


@dataclass(frozen=True)
class BlockConfig:
    """Sizes of a block; `mlp_dim` is the hidden width of the feed-forward layer."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    causal: bool
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False


def rotary_frequencies(pairs: int, theta: float, device: torch.device | None = None) -> Tensor:
    """The angle of each pair in radians per token, (pairs,), from 1 down to almost 1 / theta."""
    return theta ** (-torch.arange(pairs, dtype=torch.float32, device=device) / pairs)


def rotary_embedding(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., T, K) of the rotary angles (RoPE, https://arxiv.org/abs/2104.09864).

    `positions` is (..., T) for a sequence or (..., T, A) for a grid, where each axis rotates its own share of the pairs.
    """
    if positions.dim() < 3:
        positions = positions[..., None]
    axes = positions.shape[-1]
    frequency = rotary_frequencies(head_dim // 2 // axes, theta, positions.device)
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
    """`rms_norm` as a module with its weight."""

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
        attention_fn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:                                    # (B, T, D)
        """`attention_fn` replaces causal attention, for another mask or a KV cache: queries, keys and values -> (B, T, H, K)."""
        query, key, value = self.heads(x, angles)
        if attention_fn is not None:
            y = attention_fn(query, key, value)
        elif packing is not None:
            assert self.config.causal, "packed attention needs a causal block"
            y = attend_documents(query, key, value, packing)
        else:
            y = attend(query, key, value, self.config.causal)
        return self.out(y.reshape(*x.shape[:2], self.config.heads * self.config.head_dim))

    def heads(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Heads:
        """Inputs (B, T, D) -> queries (B, T, H, K), keys and values (B, T, G, K), with rotary positions applied."""
        c = self.config
        norms = (self.query_norm.weight, self.key_norm.weight) if c.qk_norm else (None, None)
        return qk_norm_rope(self.qkv(x), *norms, *angles, c.heads, c.kv_heads, c.norm_eps)


class FeedForward(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.gate_up = FusedLinear(config.width, (config.mlp_dim, config.mlp_dim))
        self.down = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Block(nn.Module):
    """Attention and feed-forward, each with pre-norm and added to the residual stream (B, T, D)."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], packing: Packing | None = None,
                attention_fn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, packing, attention_fn)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """A stack of causal blocks between an embedding and an output matrix, which are tied by default."""

    def __init__(self, config: DecoderConfig, encoder: Callable[[AnyEncoderConfig], nn.Module] | None = None):
        """`encoder` builds the encoders that a configuration may have: `build_encoder` of mmtx/modality/encoder.py."""
        super().__init__()
        if config.encoders and encoder is None:
            raise TypeError("Decoder: found a configuration with encoders, expected build_encoder as the second argument")
        self.config = config
        self.gradient_checkpointing = False  # recompute blocks in the backward pass
        block = BlockConfig(config.width, config.heads, config.kv_heads, config.head_dim, config.mlp_dim,
                            causal=True, norm_eps=config.norm_eps, qk_norm=config.qk_norm, qkv_bias=config.qkv_bias)
        self.embedding = TokenEmbedding(config)
        self.projections = nn.ModuleDict({kind: nn.Linear(size, config.width) for kind, size in config.features.items()})
        self.encoders = nn.ModuleDict({kind: cast(Callable, encoder)(sizes) for kind, sizes in config.encoders.items()})
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(block) for _ in range(config.depth)))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.output = None if config.tied else TokenEmbedding(config)
        initialise(self, config.depth)

    def forward(self, ids: Tensor, positions: Tensor, packing: Packing | None = None,
                features: Mapping[str, Features] | None = None) -> Tensor:
        """Ids and their positions (B, T) -> hidden states (B, T, D); with `packing`, each document attends only to itself."""
        x = self.embed(ids, features)
        angles = rotary_embedding(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, angles, packing, use_reentrant=False) if again else block(x, angles, packing)
        return self.norm(x)

    def embed(self, ids: Tensor, features: Mapping[str, Features] | None = None) -> Tensor:
        """Inputs (B, T, D) of the first block: embeddings of the ids, or features of media whose kind the model takes."""
        x = self.embedding(ids)
        for kind, given in (features or {}).items():
            if kind in self.projections:
                given = given._replace(values=given.values.to(self.embedding.weight.dtype))
                values = given.encoded(self.encoders[kind]) if kind in self.encoders else given.values
                values = self.projections[kind](values)
                x = x.flatten(0, 1).index_copy(0, given.places, values.to(x.dtype)).view_as(x)
        return x

    def logits(self, hidden: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Hidden states (..., D) -> logits of every id (..., V); passing `matrix` saves composing it again."""
        return hidden @ (self.output_matrix() if matrix is None else matrix).to(hidden.dtype).T

    def output_matrix(self, plain: bool = False) -> Tensor:
        """The output matrix (V, D), composed where the embedding is; `plain` leaves the composed ids out."""
        return (self.output or self.embedding).matrix(plain)


def initialise(module: nn.Module, depth: int) -> None:
    """Normal(0, 0.02) weights; matrices that write to the residual stream are scaled by 1/sqrt(2 * depth) (GPT-2)."""
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            continue
        writes = name.endswith(("out.weight", "down.weight"))
        nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if writes else 0.02)
