"""What a decoder is made of: the sizes that config.json of a model holds, and what of them goes together."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from mmtx.errors import InputError
from mmtx.schema import within

# What files say only where it is not as in the plain Qwen3 family.
OPTIONAL = ("ctc_blocks", "encoders", "qk_norm", "qkv_bias", "rope_scaling")
MOST_COMPOSED = 2**26  # entries of the table that composes them


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


@dataclass(frozen=True)
class Stage:
    """Blocks of an EfficientNet with the same `channels` out; the first of them has the `stride`, and they are wider inside."""

    channels: int
    blocks: int
    kernel: int
    stride: int
    expansion: int

    def __post_init__(self):
        for name, most in (("channels", 2**14), ("blocks", 2**8), ("kernel", 31), ("stride", 2), ("expansion", 16)):
            within(f"encoders: stages: {name}", getattr(self, name), 1, most)


@dataclass(frozen=True)
class EfficientNetShape:
    """Channels of an EfficientNet behind its first convolution, the stem, and its stages."""

    stem: int
    stages: tuple[Stage, ...]

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(s if isinstance(s, Stage) else Stage(**s) for s in self.stages))
        within("encoders: stem", self.stem, 1, 2**14)
        within("encoders: stages", len(self.stages), 1, 64)
        within("encoders: blocks of all stages", sum(stage.blocks for stage in self.stages), 1, 2**8)


@dataclass(frozen=True)
class EfficientNetConfig(EfficientNetShape):
    """Sizes of an EfficientNet that a decoder trains along: pictures in patches of `patch` numbers in, `width` numbers of each out.

    Pictures enter so much larger (`scale`) that a stage of the network has one place for each patch.
    """

    patch: int

    def __post_init__(self):
        super().__post_init__()
        within("encoders: patch", self.patch, 3, 2**16)
        if 3 * self.side ** 2 != self.patch or self.side & self.side - 1:
            raise InputError(f"encoders: patch: found {self.patch}, expected 3 * side**2 of patches whose side is a power of 2")
        if (seen := self.scale * self.side) not in self.strides:
            raise InputError(f"encoders: stages: found places of {self.strides} pixels, expected {seen} among them")

    @property
    def side(self) -> int:
        """Pixels of a patch."""
        return math.isqrt(self.patch // 3)

    @property
    def strides(self) -> list[int]:
        """Pixels, as they enter, from one place to the next behind each stage."""
        return [2 * math.prod(stage.stride for stage in self.stages[:end]) for end in range(1, len(self.stages) + 1)]

    @property
    def scale(self) -> int:
        """How much larger pictures enter: patches of 16 pixels, as a stage of all EfficientNets sees them, or more."""
        return max(1, min(16, *self.strides[-1:]) // self.side)

    @property
    def fine_stage(self) -> int:
        """How many stages there are to the last one with a place for each patch."""
        return len(self.strides) - self.strides[::-1].index(self.scale * self.side)

    @property
    def width(self) -> int:
        fine, last = self.stages[self.fine_stage - 1].channels, self.stages[-1].channels
        return fine if self.fine_stage == len(self.stages) else fine + last


def encoder_config(given: "EncoderConfig | EfficientNetConfig | Mapping[str, Any]") -> EncoderConfig | EfficientNetConfig:
    """What a configuration says of an encoder."""
    if isinstance(given, Mapping):
        return EfficientNetConfig(**given) if "stages" in given else EncoderConfig(**given)
    return given


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; training fills in `vocabulary_size` and `composed` from the tokenizers, and `ctc_blocks`.

    `composed` lists the id ranges whose rows are composed from digits; they end the vocabulary. `features` gives the
    width of the continuous features of each kind of media that may stand in for their codes as inputs. Of the kinds in
    `encoders` it is given patches instead, and has an encoder of its own that makes features of them. Behind `ctc_blocks` blocks
    it was trained to write down sounds by CTC (`mmtx/ctc.py`).
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
    encoders: Mapping[str, EncoderConfig | EfficientNetConfig] = field(default_factory=dict)
    qk_norm: bool = True
    qkv_bias: bool = False
    rope_scaling: RopeScaling | None = None
    ctc_blocks: int | None = None

    def __post_init__(self):
        ranges = tuple(r if isinstance(r, CodeRange) else CodeRange(r["start"], tuple(r["levels"])) for r in self.composed)
        object.__setattr__(self, "composed", ranges)
        object.__setattr__(self, "encoders", {kind: encoder_config(given) for kind, given in self.encoders.items()})
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
        if self.ctc_blocks is not None:
            within("ctc_blocks", self.ctc_blocks, 0, self.depth)
        for kind, size in self.features.items():
            within(f"features.{kind[:40]}", size, 1, 2**16)
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

    def to_dict(self) -> dict[str, Any]:
        """The fields as a file has them."""
        return {f.name: value for f, value in zip(fields(self), asdict(self).values(), strict=True)
                if f.name not in OPTIONAL or value not in (f.default, {})}

    @property
    def plain_rows(self) -> int:
        """Number of ids that have a row of their own: [0, plain_rows)."""
        return self.vocabulary_size - sum(r.stop - r.start for r in self.composed)
