"""The decoder: token ids in, scores of the next id out. It is Qwen3's dense architecture over a longer vocabulary, or
with other options that of Llama or Qwen2.

Shapes: B batch, T tokens, D width, H heads, G key-value heads, K head width, V vocabulary.

Most ids have a row of the embedding of their own. The codes of a scalar quantizer can be composed from the rows of
their digits instead, so that a code never seen in training has a meaning. And where a picture or sound is given, not
generated, what its encoder saw before the quantizer can enter in place of its codes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtx.errors import InputError
from mmtx.layers import Block, BlockConfig, Packing, RMSNorm, RopeScaling, initialise, rotary_embedding
from mmtx.modality.autoencoder import EncoderConfig, GridEncoder
from mmtx.modality.modality import MODALITIES, unknown
from mmtx.schema import within
from mmtx.sequence import Features

# What files say only where it is not as in the plain Qwen3 family.
OPTIONAL = ("encoders", "qk_norm", "qkv_bias", "rope_scaling")
MOST_COMPOSED = 2**26  # entries of the table that composes them


@dataclass(frozen=True)
class CodeRange:
    """Ids [start, start + product of levels) whose code is the mixed-radix number of digits with these levels."""

    start: int
    levels: tuple[int, ...]

    def __post_init__(self):
        if self.start < 0 or min(self.levels, default=0) < 1 or math.prod(self.levels) > 2**31:
            raise InputError(f"composed: found start {self.start} and {len(self.levels)} levels, expected a start of 0 or "
                             "more, levels of 1 or more, and 2**31 codes at most")

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.levels)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; training fills in `vocabulary_size` and `composed` from the tokenizers.

    `composed` lists the id ranges whose rows are composed from digits; they end the vocabulary. `features` gives the
    width of the continuous features of each kind of media that may stand in for their codes as inputs. Of the kinds in
    `encoders` it is given patches instead, and has an encoder of its own that makes features of them.
    """

    vocabulary_size: int = 0
    width: int = 192
    depth: int = 4
    heads: int = 3
    kv_heads: int = 3
    head_dim: int = 64
    mlp_dim: int = 512
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True
    composed: tuple[CodeRange, ...] = ()
    features: Mapping[str, int] = field(default_factory=dict)
    encoders: Mapping[str, EncoderConfig] = field(default_factory=dict)
    qk_norm: bool = True
    qkv_bias: bool = False
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        ranges = tuple(r if isinstance(r, CodeRange) else CodeRange(r["start"], tuple(r["levels"])) for r in self.composed)
        object.__setattr__(self, "composed", ranges)
        object.__setattr__(self, "encoders", {kind: given if isinstance(given, EncoderConfig) else EncoderConfig(**given)
                                              for kind, given in self.encoders.items()})
        for name, most in (("width", 2**16), ("depth", 2**12), ("heads", 2**12), ("kv_heads", 2**12), ("head_dim", 2**12),
                           ("mlp_dim", 2**20)):
            within(name, getattr(self, name), 1, most)
        within("vocabulary_size", self.vocabulary_size, 0, 2**31)
        within("rope_theta", self.rope_theta, 1e-3, 1e12)
        within("norm_eps", self.norm_eps, 0, 1)
        if (scaling := self.rope_scaling) is not None:
            if isinstance(scaling, Mapping):
                object.__setattr__(self, "rope_scaling", scaling := RopeScaling(**scaling))
            within("rope_scaling.factor", scaling.factor, 1, 1e6)
            within("rope_scaling.low_frequency", scaling.low_frequency, 1e-6, 1e6)
            within("rope_scaling.high_frequency", scaling.high_frequency, scaling.low_frequency + 1e-6, 2e6)
            within("rope_scaling.original_context", scaling.original_context, 1, 2**31)
        for kind, size in self.features.items():
            if kind not in MODALITIES:
                raise unknown(kind, "features")
            within(f"features.{kind}", size, 1, 2**16)
        for kind, encoder in self.encoders.items():
            if encoder.width != self.features.get(kind):
                raise InputError(f"encoders.{kind[:40]}: found width {encoder.width}, expected features of that width")
        digits = sum(level for r in ranges for level in r.levels)
        within("composed: ids times digits", sum(r.stop - r.start for r in ranges) * digits, 0, MOST_COMPOSED)
        if self.heads % self.kv_heads:
            raise InputError(f"heads: found {self.heads}, expected a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim: found {self.head_dim}, expected an even number")
        end = self.plain_rows
        for r in ranges:
            if r.start != end:
                raise InputError(f"composed: found a range at id {r.start}, expected it at {end}")
            end = r.stop

    def told(self) -> dict[str, Any]:
        """The fields as a file has them."""
        return {f.name: value for f, value in zip(fields(self), asdict(self).values(), strict=True)
                if f.name not in OPTIONAL or value not in (f.default, {})}

    @property
    def plain_rows(self) -> int:
        """Number of ids that have a row of their own: [0, plain_rows)."""
        return self.vocabulary_size - sum(r.stop - r.start for r in self.composed)


class TokenEmbedding(nn.Module):
    """One table: a row for each plain id, then a row for each digit value of each composed range."""

    parts: Tensor  # (V, digits) rows of each id
    basis: Tensor  # (composed ids, digit rows)

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.plain = config.plain_rows
        rows = self.plain + sum(sum(r.levels) for r in config.composed)
        self.weight = nn.Parameter(torch.empty(rows, config.width))
        longest = max((len(r.levels) for r in config.composed), default=1)
        # parts[id] are the rows whose sum is the embedding of `id`; `rows` stands for none.
        parts = torch.full((config.vocabulary_size, longest), rows)
        parts[:self.plain, 0] = torch.arange(self.plain)
        first = self.plain
        for r in config.composed:
            codes, step = torch.arange(r.stop - r.start), 1
            for place, level in enumerate(r.levels):
                parts[r.start:r.stop, place] = first + codes // step % level
                step, first = step * level, first + level
        # How the rows lie: those of the plain ids, then those of each digit of each range.
        self.groups = ((self.plain,), *(r.levels for r in config.composed))
        self.register_buffer("parts", parts, persistent=False)
        self.register_buffer("basis", self._basis(rows), persistent=False)

    def _basis(self, rows: int) -> Tensor:
        """0/1 matrix (composed ids, digit rows): a product is much faster than gathering every row of the vocabulary."""
        parts = self.parts[self.plain:] - self.plain
        basis = torch.zeros(len(parts), rows - self.plain + 1)
        return basis.scatter_(1, parts, 1.0)[:, :-1].contiguous()

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> embeddings (B, T, D)."""
        if not len(self.basis):
            return F.embedding(ids, self.weight)
        # Only the rows of digits are copied: there are few of them, and a plain table may be large.
        digits = F.pad(self.weight[self.plain:], (0, 0, 0, 1))
        composed = F.embedding((self.parts[ids] - self.plain).clamp_min(0), digits).sum(-2)
        plain = F.embedding(ids.clamp_max(self.plain - 1), self.weight)
        return torch.where((ids < self.plain)[..., None], plain, composed)

    def matrix(self, plain: bool = False) -> Tensor:
        """The embedding of every id (V, D), or of those before the composed ranges only."""
        if not len(self.basis):
            return self.weight
        if plain:
            return self.weight[:self.plain]
        return torch.cat([self.weight[:self.plain], self.basis.to(self.weight.dtype) @ self.weight[self.plain:]])


class Decoder(nn.Module):
    """A stack of causal blocks between an embedding and, by default, the same matrix as output."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # compute blocks again on the way back
        block = BlockConfig(config.width, config.heads, config.kv_heads, config.head_dim, config.mlp_dim,
                            causal=True, norm_eps=config.norm_eps, qk_norm=config.qk_norm, qkv_bias=config.qkv_bias)
        self.embedding = TokenEmbedding(config)
        self.projections = nn.ModuleDict({kind: nn.Linear(size, config.width) for kind, size in config.features.items()})
        self.encoders = nn.ModuleDict({kind: GridEncoder(encoder) for kind, encoder in config.encoders.items()})
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(block) for _ in range(config.depth)))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.output = None if config.tied else TokenEmbedding(config)
        initialise(self, config.depth)

    def forward(self, ids: Tensor, positions: Tensor, packing: Packing | None = None,
                features: Mapping[str, Features] | None = None) -> Tensor:
        """Ids and their positions (B, T) -> hidden states (B, T, D); documents of a packed batch do not see each other."""
        x = self.embed(ids, features)
        angles = rotary_embedding(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, angles, packing, use_reentrant=False) if again else block(x, angles, packing)
        return self.norm(x)

    def embed(self, ids: Tensor, features: Mapping[str, Features] | None = None) -> Tensor:
        """Inputs (B, T, D) of the first block: the embedding of each id, or its features where the model takes them."""
        x = self.embedding(ids)
        for kind, given in (features or {}).items():
            if kind in self.projections:
                values = given.values.to(self.embedding.weight.dtype)
                if kind in self.encoders:
                    values = self.encoders[kind](values, given.grids)
                values = self.projections[kind](values)
                x = x.flatten(0, 1).index_copy(0, given.places, values.to(x.dtype)).view_as(x)
        return x

    def logits(self, hidden: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Hidden states (..., D) -> scores of every id (..., V); `matrix` saves composing it again."""
        return hidden @ (self.output_matrix() if matrix is None else matrix).to(hidden.dtype).T

    def output_matrix(self, plain: bool = False) -> Tensor:
        """The output matrix (V, D), composed where the embedding is; `plain` leaves the composed ids out."""
        return (self.output or self.embedding).matrix(plain)
