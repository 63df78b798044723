"""The configuration of a decoder: the sizes stored in a model's config.json, and checks that they fit together."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from mmtx.errors import InputError
from mmtx.schema import typed, within

# Fields that files contain only where they differ from the plain Qwen3 family.
OPTIONAL = ("ctc_blocks", "encoders", "qk_norm", "qkv_bias", "rope_scaling")
MOST_COMPOSED = 2**26  # elements of the matrix that composes embedding rows


@typed
@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of rotary positions: pairs that rotate slowly are slowed by `factor`, fast ones are left alone.

    Slow means fewer than `low_frequency` turns in `original_context` tokens, fast more than `high_frequency`; pairs between
    the two are interpolated.
    """

    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_context: int = 8192

    def divisors(self, frequency: Tensor) -> Tensor:
        """Divisors (K/2,) of the rotary frequencies (K/2,), which are in radians per token."""
        turns = self.original_context * frequency / (2 * math.pi)
        share = ((turns - self.low_frequency) / (self.high_frequency - self.low_frequency)).clamp(0, 1)
        return 1 / ((1 - share) / self.factor + share)


@typed
@dataclass(frozen=True)
class CodeRange:
    """Ids [start, start + product of levels), whose codes are mixed-radix numbers of digits with these levels."""

    start: int
    levels: tuple[int, ...]

    def __post_init__(self):
        if self.start < 0 or min(self.levels, default=0) < 1 or math.prod(self.levels) > 2**31:
            raise InputError(f"composed: found start {self.start} and {len(self.levels)} levels, expected a start of 0 or "
                             "more, levels of 1 or more, and 2**31 codes at most")

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.levels)


@typed
@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder trained along with a decoder: `patch` numbers in, `width` out, windows of `chunk` patches a side."""

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


@typed
@dataclass(frozen=True)
class Stage:
    """A stage of an EfficientNet: blocks with `channels` outputs, widened inside by `expansion`; the first has the `stride`."""

    channels: int
    blocks: int
    kernel: int
    stride: int
    expansion: int

    def __post_init__(self):
        for name, most in (("channels", 2**14), ("blocks", 2**8), ("kernel", 31), ("stride", 2), ("expansion", 16)):
            within(f"encoders: stages: {name}", getattr(self, name), 1, most)


@typed
@dataclass(frozen=True)
class EfficientNetShape:
    """An EfficientNet: output channels of its first convolution, the stem, and its stages."""

    stem: int
    stages: tuple[Stage, ...]

    def __post_init__(self):
        within("encoders: stem", self.stem, 1, 2**14)
        within("encoders: stages", len(self.stages), 1, 64)
        within("encoders: blocks of all stages", sum(stage.blocks for stage in self.stages), 1, 2**8)


@typed
@dataclass(frozen=True)
class EfficientNetConfig(EfficientNetShape):
    """Sizes of an EfficientNet trained along with a decoder: patches of `patch` numbers in, `width` features of each out.

    Pictures are enlarged by `scale`, so that a stage of the network has one position per patch.
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
        """Side of a patch in pixels."""
        return math.isqrt(self.patch // 3)

    @property
    def strides(self) -> list[int]:
        """Stride of the network after each stage, in pixels of the enlarged picture."""
        return [2 * math.prod(stage.stride for stage in self.stages[:end]) for end in range(1, len(self.stages) + 1)]

    @property
    def scale(self) -> int:
        """Factor that enlarges patches to 16 pixels a side, a stride that all EfficientNets have; 1 for larger patches."""
        return max(1, min(16, *self.strides[-1:]) // self.side)

    @property
    def fine_stage(self) -> int:
        """Number of stages up to and including the last one with one position per patch."""
        return len(self.strides) - self.strides[::-1].index(self.scale * self.side)

    @property
    def width(self) -> int:
        fine, last = self.stages[self.fine_stage - 1].channels, self.stages[-1].channels
        return fine if self.fine_stage == len(self.stages) else fine + last


@typed
@dataclass(frozen=True)
class SeparableLayer:
    """A layer of a MobileNet: a 3 x 3 depthwise convolution with a `stride`, then a pointwise one with `channels` outputs."""

    channels: int
    stride: int

    def __post_init__(self):
        within("encoders: layers: channels", self.channels, 1, 2**14)
        within("encoders: layers: stride", self.stride, 1, 2)


@typed
@dataclass(frozen=True)
class MobileNetShape:
    """A MobileNet of spectrograms: output channels of its first convolution, the stem, and its layers.

    The spectrograms have `mels` bands from `low` to `high` Hz. `outputs` are the layers whose outputs are features, counted from 0.
    """

    mels: int
    low: float
    high: float
    stem: int
    layers: tuple[SeparableLayer, ...]
    outputs: tuple[int, ...]

    def __post_init__(self):
        within("encoders: mels", self.mels, 1, 2**10)
        within("encoders: low", self.low, 0, 2**20)
        within("encoders: high", self.high, self.low + 1, 2**21)
        within("encoders: stem", self.stem, 1, 2**14)
        within("encoders: layers", len(self.layers), 1, 2**8)
        last = len(self.layers) - 1
        if [*self.outputs] != sorted({*self.outputs}) or not self.outputs or self.outputs[0] < 0 or self.outputs[-1] != last:
            raise InputError(f"encoders: outputs: found {[*self.outputs]}, expected rising numbers of layers that end with {last}")


@typed
@dataclass(frozen=True)
class MobileNetConfig(MobileNetShape):
    """Sizes of a MobileNet beside a patch encoder, trained along with a decoder: the features of both side by side.

    A patch spans `patch_frames` frames and `patch_mels` bands of the tokenizer's spectrogram, which reaches from `from_low` to
    `from_high` Hz.
    """

    patches: EncoderConfig
    patch_frames: int
    patch_mels: int
    from_low: float
    from_high: float

    def __post_init__(self):
        super().__post_init__()
        within("encoders: patch_frames", self.patch_frames, 1, 4096)
        within("encoders: patch_mels", self.patch_mels, 1, 512)
        within("encoders: from_low", self.from_low, 0, 2**20)
        within("encoders: from_high", self.from_high, self.from_low + 1, 2**21)
        if self.patch < self.patch_frames * self.patch_mels:
            raise InputError(f"encoders: patches: found patches of {self.patch} numbers, expected {self.patch_frames} * "
                             f"{self.patch_mels} or more")

    @property
    def patch(self) -> int:
        """Numbers in a patch."""
        return self.patches.patch

    @property
    def width(self) -> int:
        return self.patches.width + sum(self.layers[index].channels for index in self.outputs)


AnyEncoderConfig = EncoderConfig | EfficientNetConfig | MobileNetConfig


@typed
@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; training fills in `vocabulary_size`, `composed`, `features`, `encoders` and `ctc_blocks`.

    Args:
        vocabulary_size: number of ids, from the tokenizers.
        width: of the hidden states.
        depth: number of blocks.
        heads: query heads of each block.
        kv_heads: key and value heads, each shared by heads / kv_heads query heads (grouped-query attention).
        head_dim: width of a head.
        mlp_dim: inner width of the feed-forward half (SwiGLU).
        rope_theta: base of the rotary position embedding: the slowest pair of dimensions turns by about 1 / rope_theta per token.
        norm_eps: what RMSNorm adds to the mean square.
        tied: use the embedding as the output matrix, too.
        composed: id ranges whose embedding rows are composed from the rows of their digits; they end the vocabulary.
        features: for each kind of media, the width of the continuous features that may replace its codes as inputs; of all that
            are one token together, where the vocabulary merges them.
        encoders: kinds that enter as patches instead; the decoder's own encoder makes their features.
        qk_norm: RMSNorm on every query and key head.
        qkv_bias: biases on queries, keys and values, as in Qwen2.
        rope_scaling: how rotary frequencies are stretched for long contexts, as in Llama 3.
        ctc_blocks: hidden states after so many blocks were trained to transcribe sounds with CTC (mmtx/ctc.py); None: without CTC.
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
    encoders: Mapping[str, AnyEncoderConfig] = field(default_factory=dict)
    qk_norm: bool = True
    qkv_bias: bool = False
    rope_scaling: RopeScaling | None = None
    ctc_blocks: int | None = None

    def __post_init__(self):
        for name, most in (("width", 2**16), ("depth", 2**12), ("heads", 2**12), ("kv_heads", 2**12), ("head_dim", 2**12),
                           ("mlp_dim", 2**20)):
            within(name, getattr(self, name), 1, most)
        within("vocabulary_size", self.vocabulary_size, 0, 2**31)
        within("rope_theta", self.rope_theta, 1e-3, 1e12)
        within("norm_eps", self.norm_eps, 0, 1)
        if (scaling := self.rope_scaling) is not None:
            within("rope_scaling.factor", scaling.factor, 1, 1e6)
            within("rope_scaling.low_frequency", scaling.low_frequency, 1e-6, 1e6)
            within("rope_scaling.high_frequency", scaling.high_frequency, scaling.low_frequency + 1e-6, 2e6)
            within("rope_scaling.original_context", scaling.original_context, 1, 2**31)
        if self.ctc_blocks is not None:
            within("ctc_blocks", self.ctc_blocks, 0, self.depth)
        for kind, size in self.features.items():
            within(f"features.{kind[:40]}", size, 1, 2**16)
        for kind, encoder in self.encoders.items():
            if not (width := self.features.get(kind)) or width % encoder.width:
                raise InputError(f"encoders.{kind[:40]}: found width {encoder.width}, expected features of that width, or of several "
                                 "times that width if they are merged")
        digits = sum(level for r in self.composed for level in r.levels)
        within("composed: ids times digits", sum(r.stop - r.start for r in self.composed) * digits, 0, MOST_COMPOSED)
        if self.heads % self.kv_heads:
            raise InputError(f"heads: found {self.heads}, expected a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim: found {self.head_dim}, expected an even number")
        end = self.plain_rows
        for r in self.composed:
            if r.start != end:
                raise InputError(f"composed: found a range at id {r.start}, expected it at {end}")
            end = r.stop

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json stores them."""
        return {f.name: value for f, value in zip(fields(self), asdict(self).values(), strict=True)
                if f.name not in OPTIONAL or value not in (f.default, {})}

    @property
    def plain_rows(self) -> int:
        """Number of ids with an embedding row of their own: [0, plain_rows)."""
        return self.vocabulary_size - sum(r.stop - r.start for r in self.composed)
