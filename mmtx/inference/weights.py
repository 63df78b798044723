"""A decoder's weights as engines with a KV cache read them, and the network before and after attention.

At batch 1 a step is bound by reading the weights and launching operations, so there are as few operations as possible: no
modules, a norm in four operations, and every result goes to a preallocated buffer.

Shapes: B batch, N tokens of all rows, D width, H heads, G key-value heads, K head width, R rows of the embedding, V
vocabulary.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtx.config import DecoderConfig
from mmtx.inference.captured import CachePool
from mmtx.inference.int8 import Int8Matrix
from mmtx.inference.packed import LARGEST, PackedMatrix, PackedSwiGLU, has_operators
from mmtx.inference.screen import FEW_ROWS, Screen
from mmtx.inference.thread_tuner import ThreadTuner
from mmtx.model import Block, Decoder

Matrix = Tensor | Int8Matrix | PackedMatrix
MANY = 64   # tokens of prompts from which packed matrices pay off: oneDNN takes 2 ms for a number of tokens that is new to it


SMALL = 200_000  # elements of a matrix that are read in float32 in the time that a oneDNN product takes to start, 12 microseconds


def precise(like: Tensor) -> torch.dtype:
    """The dtype in which norms are computed."""
    return torch.promote_types(like.dtype, torch.float32)


class Norm(NamedTuple):
    """RMSNorm over the last n elements, as x / hypot(|x|, floor) * weight: half the operations of torch's on a CPU."""

    weight: Tensor  # sqrt(n) times the norm's weight, in float32 or wider
    floor: Tensor   # sqrt(n * eps), ()
    gain: Tensor    # the norm's weight itself
    eps: float

    @classmethod
    def of(cls, gain: Tensor, eps: float) -> "Norm":
        weight, n = gain.to(precise(gain)), gain.shape[-1]
        return cls(weight * n ** 0.5, weight.new_tensor((n * eps) ** 0.5), gain, eps)

    def __call__(self, x: Tensor, length: Tensor, out: Tensor) -> Tensor:
        torch.linalg.vector_norm(x, 2, -1, True, dtype=length.dtype, out=length)
        return torch.div(x, torch.hypot(length, self.floor, out=length), out=out).mul_(self.weight)

    def fused(self, x: Tensor) -> Tensor:
        """The same in the one operation that GPUs have for it, or two if each head has a weight of its own."""
        width = self.gain.shape[-1:]
        if self.gain.dim() == 1:
            return F.rms_norm(x, width, self.gain, self.eps)
        return F.rms_norm(x, width, None, self.eps) * self.gain


class Scratch(NamedTuple):
    """Preallocated results of the operations on N tokens, and views of them."""

    normed: Tensor        # (N, D)
    length: Tensor        # (N, 1)
    qkv: Tensor           # (N, (H + 2G) * K)
    raw: Tensor           # (N, H + G, K), the queries and keys of `qkv`
    value: Tensor         # (N, G, K), the values of `qkv`
    head_length: Tensor   # (N, H + G, 1)
    turned: Tensor        # (N, H + G, K)
    query: Tensor         # (N, H, K), the queries of `turned`
    key: Tensor           # (N, G, K), the keys of `turned`
    high: Tensor          # (N, H + G, K / 2), the upper halves of `turned`
    low: Tensor           # (N, H + G, K / 2), the lower halves
    swapped: Tensor       # (N, H + G, K)
    gate_up: Tensor       # (N, 2 * hidden)
    gate: Tensor          # (N, hidden)
    up: Tensor            # (N, hidden)

    @classmethod
    def of(cls, config: DecoderConfig, tokens: int, like: Tensor) -> "Scratch":
        c, turning = config, config.heads + config.kv_heads
        qkv = like.new_empty(tokens, (turning + c.kv_heads) * c.head_dim)
        heads = qkv.view(tokens, -1, c.head_dim)
        turned, swapped = (like.new_empty(tokens, turning, c.head_dim) for _ in range(2))
        low, high = turned.chunk(2, dim=-1)
        gate_up = like.new_empty(tokens, 2 * c.mlp_dim)
        return cls(
            like.new_empty(tokens, c.width), like.new_empty(tokens, 1, dtype=precise(like)),
            qkv, heads[:, :turning], heads[:, turning:], like.new_empty(tokens, turning, 1, dtype=precise(like)),
            turned, turned[:, :c.heads], turned[:, c.heads:], high, low, swapped, gate_up, *gate_up.chunk(2, dim=1))

    def keep(self, tokens: int) -> "Scratch":
        """The scratch for fewer tokens."""
        return Scratch(*(each[:tokens] for each in self))


class Layer(NamedTuple):
    """One block: its weights, and its computation around attention. The only place here that knows its architecture."""

    attention_norm: Norm
    qkv: Matrix               # (D, (H + 2G) * K)
    qkv_bias: Tensor | None   # ((H + 2G) * K,)
    head_norm: Norm | None    # weight (H + G, K)
    out: Matrix               # (H * K, D)
    feed_forward_norm: Norm
    gate_up: Matrix | PackedSwiGLU  # (D, 2 * hidden)
    down: Matrix              # (hidden, D)

    @classmethod
    def of(cls, block: Block, config: DecoderConfig) -> "Layer":
        attention, feed_forward, eps = block.attention, block.feed_forward, config.norm_eps
        norm = None if not config.qk_norm else Norm.of(torch.cat([
            attention.query_norm.weight.expand(config.heads, -1), attention.key_norm.weight.expand(config.kv_heads, -1)]), eps)
        return cls(
            Norm.of(block.attention_norm.weight, eps), attention.qkv.weight.T, attention.qkv.bias, norm,
            attention.out.weight.T, Norm.of(block.feed_forward_norm.weight, eps), feed_forward.gate_up.weight.T,
            feed_forward.down.weight.T)

    def in_8_bits(self) -> "Layer":
        """The same layer with its matrices in 8 bits."""
        made: dict[str, Any] = {name: Int8Matrix.of(getattr(self, name)) for name in ("qkv", "out", "gate_up", "down")}
        return self._replace(**made)

    def packed(self) -> "Layer":
        """The same layer with its matrices packed for many tokens."""
        made: dict[str, Any] = {name: PackedMatrix.of(getattr(self, name)) for name in ("qkv", "out", "down")}
        return self._replace(gate_up=PackedSwiGLU.of(cast(Tensor, self.gate_up)), **made)

    def mixed(self, packed: "Layer") -> "Layer":
        """The same layer with small matrices in float32, and the others from `packed`: the fastest for one row in bfloat16."""
        made: dict[str, Any] = {}
        for name in ("qkv", "out", "gate_up", "down"):
            matrix = cast(Tensor, getattr(self, name))
            made[name] = matrix.T.float().T if matrix.numel() < SMALL else getattr(packed, name)
        return self._replace(**made)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, s: Scratch) -> None:
        """Tokens (N, D), cosines and sines of their angles (N, 1, K) -> queries, keys and values in the scratch."""
        multiply(self.attention_norm(x, s.length, s.normed), self.qkv, s.qkv)
        if self.qkv_bias is not None:
            s.qkv.add_(self.qkv_bias)
        if self.head_norm is None:
            s.turned.copy_(s.raw)
        else:
            self.head_norm(s.raw, s.head_length, s.turned)
        torch.cat((s.high, s.low), dim=-1, out=s.swapped)
        s.turned.mul_(cos).addcmul_(s.swapped, sin)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor, Tensor]:
        """`project` to new tensors, for a GPU: queries (N, H, K), keys and values (N, G, K)."""
        qkv = F.linear(self.attention_norm.fused(x), cast(Tensor, self.qkv).T, self.qkv_bias).unflatten(1, (-1, config.head_dim))
        raw, value = qkv.split([config.heads + config.kv_heads, config.kv_heads], dim=1)
        turning = raw if self.head_norm is None else self.head_norm.fused(raw)
        low, high = turning.chunk(2, dim=-1)
        turned = turning * cos + torch.cat((high, low), dim=-1) * sin
        return *turned.split([config.heads, config.kv_heads], dim=1), value

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """`finish` to a new tensor, for a GPU."""
        x = torch.addmm(x, y, cast(Tensor, self.out))
        gate, up = (self.feed_forward_norm.fused(x) @ cast(Tensor, self.gate_up)).chunk(2, dim=1)
        return torch.addmm(x, F.silu(gate) * up, cast(Tensor, self.down))

    def finish(self, x: Tensor, y: Tensor, s: Scratch) -> None:
        """Tokens (N, D) and their attention outputs (N, H * K) -> tokens for the next layer, in place."""
        add_product(x, y, self.out)
        normed = self.feed_forward_norm(x, s.length, s.normed)
        if isinstance(self.gate_up, PackedSwiGLU):
            inner = self.gate_up(normed)
        else:
            multiply(normed, self.gate_up, s.gate_up)
            inner = F.silu(s.gate, inplace=True).mul_(s.up)
        add_product(x, inner, self.down)


def _packs(layers: tuple[Layer, ...]) -> bool:
    """Whether the matrices of layers can be packed, and are small enough to be held twice."""
    matrices = [each for layer in layers for each in layer if isinstance(each, Tensor) and each.dim() == 2]
    return (all(each.device.type == "cpu" and has_operators(each.dtype) for each in matrices)
            and sum(each.nbytes for each in matrices) <= LARGEST)


def multiply(x: Tensor, matrix: Matrix, out: Tensor) -> None:
    """Write the product of inputs (N, I) and a matrix (I, O) to `out` (N, O)."""
    if isinstance(matrix, Tensor):
        torch.mm(x, matrix, out=out)
    else:
        out.copy_(matrix.product(x))


def add_product(out: Tensor, x: Tensor, matrix: Matrix) -> None:
    """Add the product of inputs (N, I) and a matrix (I, O) to `out` (N, O)."""
    if isinstance(matrix, Tensor):
        out.addmm_(x, matrix)
    elif isinstance(matrix, PackedMatrix):
        out.copy_(matrix.product_plus(x, out))
    else:
        out.add_(matrix.product(x))


class Weights(NamedTuple):
    """A decoder's weights as engines read them: views of its parameters, except norms and 8-bit, packed and mixed copies."""

    config: DecoderConfig
    layers: tuple[Layer, ...]             # for prompts
    step_layers: tuple[Layer, ...]        # for decode steps: the same, or in 8 bits
    packed: tuple[Layer, ...] | None      # `layers`, packed for many tokens; None if that does not pay off, or values may change
    mixed: tuple[Layer, ...] | None       # for decode steps of one row in bfloat16, if there are packed ones
    norm: Norm
    output: Tensor                        # (R, D)
    groups: tuple[tuple[int, ...], ...]   # numbers of rows: plain ids, then each digit of each composed range
    screens: dict[int, Screen] | None     # by their number of rows; None if values may still change
    step_tuner: ThreadTuner               # for single rows on a CPU
    prompt_tuner: ThreadTuner             # for their prompts, per token
    kept: CachePool                       # caches with captured steps that read these weights, on a GPU

    @classmethod
    def of(cls, decoder: Decoder, fixed: bool = False, load_in_8bit: bool = False) -> "Weights":
        """The weights of a decoder; `fixed` promises that its values will not change while these are in use.

        `load_in_8bit` uses 8-bit matrices in decode steps. Prompts and logits use the decoder's own: prefill is not bound by
        reading the matrices, and for logits a `Screen` reads 8 bits and finds the same id.
        """
        c, table = decoder.config, decoder.output or decoder.embedding
        layers = tuple(Layer.of(block, c) for block in decoder.blocks)
        small = tuple(layer.in_8_bits() for layer in layers) if load_in_8bit else layers
        packed = tuple(layer.packed() for layer in layers) if fixed and _packs(layers) else None
        mixed = None
        if packed is not None and table.weight.dtype != torch.float32:
            mixed = tuple(layer.mixed(other) for layer, other in zip(layers, packed, strict=True))
        screened = fixed and table.weight.device.type == "cpu" and table.weight.dtype in (torch.float32, torch.bfloat16)
        screens: dict | None = {} if screened else None
        norm = Norm.of(decoder.norm.weight, c.norm_eps)
        return cls(c, layers, small, packed, mixed, norm, table.weight, table.groups, screens, ThreadTuner(), ThreadTuner(),
                   CachePool())

    @property
    def in_8_bits(self) -> bool:
        return self.step_layers is not self.layers

    def layers_for(self, tokens: int) -> tuple[Layer, ...]:
        """The layers for prompts of so many tokens in all."""
        return self.packed if self.packed is not None and tokens >= MANY else self.layers

    @property
    def batch_layers(self) -> tuple[Layer, ...]:
        """The layers for decode steps of several rows."""
        return self.step_layers if self.in_8_bits or self.packed is None else self.packed

    def row_layers(self, shared: bool) -> tuple[Layer, ...]:
        """The layers for decode steps of one row, on threads that share it or on one.

        GB/s of one core of an AMD EPYC, 640 -> 1728 in float32: NumPy 33, packed 27, torch 16; of two cores: packed 36, torch
        16. In bfloat16: packed 29, torch 7.
        """
        if self.in_8_bits or self.packed is None:
            return self.step_layers
        return self.packed if shared else self.mixed or self.layers

    @property
    def plain(self) -> int:
        """Number of leading ids that have a row of their own."""
        return self.groups[0][0]

    def screen(self, first: int) -> Screen | None:
        """A `Screen` for the `first` ids, None if reading all their rows is as fast."""
        if self.screens is None or not FEW_ROWS < first <= self.plain or not Screen.pays():
            return None
        if first not in self.screens:
            self.screens[first] = Screen.of(self.output.detach()[:first].float())
        return self.screens[first]

    def scores(self, hidden: Tensor, first: int | None = None) -> Tensor:
        """Hidden states (B, D) -> logits of every id (B, V), or only of the `first` ones (B, first).

        The logit of a composed id is the sum of the logits of its digits, so its range needs no matrix.
        """
        hidden = hidden.to(self.output.dtype)
        plain, ranges = self.plain, self.groups[1:]
        if first is not None and first <= plain:
            return F.linear(hidden, self.output[:first])
        rows = F.linear(hidden, self.output)
        if not ranges:
            return rows
        parts = rows.split([plain, *(level for levels in ranges for level in levels)], dim=1)
        scores, digits = [parts[0]], iter(parts[1:])
        for levels in ranges:
            total = next(digits)
            for _ in levels[1:]:
                total = (next(digits)[:, :, None] + total[:, None]).flatten(1)
            scores.append(total)
        return torch.cat(scores, dim=1)[:, :first]
