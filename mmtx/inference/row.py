"""The engine for one row on a CPU: the torch engine's decode step in NumPy, and the best id from a `Screen`.

One token needs so little computation that a step is bound by reading the weights and launching operations. Launching one
in NumPy takes a third of the time. It works on the same memory as the torch tensors.

Shapes: D width, H heads, G key-value heads, K head width, C capacity of the cache, T tokens in it, R rows of the output.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtx.ambient import run_single_threaded
from mmtx.config import DecoderConfig
from mmtx.inference.cached_attention import decode_attention_numpy
from mmtx.inference.int8 import Int8Matrix
from mmtx.inference.packed import PackedMatrix, PackedSwiGLU
from mmtx.inference.torch_engine import ROOM, TorchEngine
from mmtx.inference.weights import Layer, Matrix, Norm, Weights, multiply
from mmtx.sequence import Prompt

SHORT = 9216      # elements of a head's keys up to which attention takes one thread even if threads share the step


def prepack_weights(decoder: nn.Module) -> None:
    """Store the matrices of the blocks with their longer side contiguous, to be read in long streams; values do not change.

    Measured in fp32 for 384 -> 2048 (one core of an AMD EPYC): 26 GB/s, and 13 GB/s the other way.
    """
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 2 and name.startswith("blocks") and parameter.shape[0] > parameter.shape[1]:
            parameter.data = parameter.data.T.contiguous().T


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor as a float32 array, which shares its memory if the tensor is float32."""
    return tensor.detach().float().numpy()


class _Norm(NamedTuple):
    weight: np.ndarray
    floor: float       # n * eps

    @classmethod
    def of(cls, norm: Norm) -> "_Norm":
        return cls(_array(norm.weight), float(norm.floor) ** 2)

    def __call__(self, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        np.multiply(x, self.weight, out=out)
        out *= 1 / math.sqrt(x.dot(x) + self.floor)
        return out


def _product(shared: bool, matrix: Tensor | Int8Matrix | PackedMatrix, x: np.ndarray, out: np.ndarray) -> Callable[[], object]:
    """A function that writes the product of `x` (I,), as it is then, and a matrix (I, O) to `out` (O,).

    One NumPy thread (OpenBLAS) reads memory at up to twice the rate of a torch thread (MKL) on an AMD EPYC; on an Intel Xeon
    they are equal. Idle threads of either pool would spin on cores that the other needs, so products that threads share are
    torch's or, for packed matrices, oneDNN's: on two cores of that Xeon, width 384 and 6 blocks, 91 ids a second with NumPy's,
    294 with torch's.
    """
    if not isinstance(matrix, Tensor):
        return partial(multiply, torch.from_numpy(x)[None], matrix, torch.from_numpy(out)[None])
    if shared:
        return partial(torch.mv, matrix.detach().T, torch.from_numpy(x), out=torch.from_numpy(out))
    return partial(np.dot, _array(matrix.T), x, out)


def _swiglu(shared: bool, gate_up: Matrix | PackedSwiGLU, b: "_Buffers") -> Callable[[], object]:
    """A function that writes up * silu(gate) of the normed token to `b.inner`."""
    if isinstance(gate_up, PackedSwiGLU):
        x, out = torch.from_numpy(b.normed)[None], torch.from_numpy(b.inner)[None]
        return lambda: out.copy_(gate_up(x))
    product = _product(shared, gate_up, b.normed, b.gate_up)

    def run() -> None:
        product()
        np.negative(b.gate, out=b.inner)
        np.exp(b.inner, out=b.inner)  # where it overflows, silu is 0
        b.inner += 1
        np.divide(b.gate, b.inner, out=b.inner)
        b.inner *= b.up

    return run


class _Buffers:
    """Preallocated results of the operations, and views of them."""

    def __init__(self, config: DecoderConfig):
        c, half, turning = config, config.head_dim // 2, config.heads + config.kv_heads
        empty = lambda *shape: np.empty(shape, np.float32)
        self.normed, self.added, self.hidden = empty(c.width), empty(c.width), empty(c.width)
        self.qkv, self.found = empty((turning + c.kv_heads) * c.head_dim), empty(c.heads * c.head_dim)
        heads = self.qkv.reshape(-1, c.head_dim)
        self.raw, self.value = heads[:turning], heads[turning:]                                    # (H + G, K), (G, K)
        self.turned, self.swapped = empty(turning, 2, half), empty(turning, 2, half)
        self.flat, self.back = self.turned.reshape(turning, c.head_dim), self.turned[:, ::-1]
        self.square, self.length = empty(turning, c.head_dim), empty(turning, 1)
        self.ones = np.ones((c.head_dim, 1), np.float32)
        # The queries of a group share keys and values, and are multiplied one by one: OpenBLAS is slow for a few together.
        grouped = c.kv_heads, c.heads // c.kv_heads, 1, c.head_dim
        self.query, self.key = self.flat[:c.heads].reshape(grouped), self.flat[c.heads:]           # (G, H / G, 1, K), (G, K)
        self.given = self.found.reshape(grouped)
        self.gate_up, self.inner = empty(2 * c.mlp_dim), empty(c.mlp_dim)
        self.gate, self.up = self.gate_up[:c.mlp_dim], self.gate_up[c.mlp_dim:]


class _Layer(NamedTuple):
    """One block: its weights, with matrices as functions that multiply by them, and its computation around attention.

    The only place here that knows its architecture.
    """

    attention_norm: _Norm
    qkv: Callable[[], object]
    qkv_bias: np.ndarray | None
    head_norm: _Norm | None # weight (H + G, K), divided by sqrt(K) for queries
    head_scale: np.ndarray  # (H + G, 1): factor without a norm, 1 / sqrt(K) for queries, 1 for keys
    out: Callable[[], object]
    feed_forward_norm: _Norm
    swiglu: Callable[[], object]
    down: Callable[[], object]

    @classmethod
    def of(cls, layer: Layer, config: DecoderConfig, b: _Buffers, shared: bool) -> "_Layer":
        product: Any = partial(_product, shared)
        scale = np.ones((len(b.raw), 1), np.float32)
        scale[:config.heads] = config.head_dim ** -0.5
        norm = None if layer.head_norm is None else _Norm.of(layer.head_norm)
        return cls(
            _Norm.of(layer.attention_norm), product(layer.qkv, b.normed, b.qkv),
            None if layer.qkv_bias is None else _array(layer.qkv_bias),
            None if norm is None else norm._replace(weight=norm.weight * scale), scale, product(layer.out, b.found, b.added),
            _Norm.of(layer.feed_forward_norm), _swiglu(shared, layer.gate_up, b),
            product(layer.down, b.inner, b.added))

    def project(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, b: _Buffers) -> None:
        """A token (D,), cosines and sines of its angles (2, K / 2) -> query, key and value in the buffers."""
        self.attention_norm(x, b.normed)
        self.qkv()
        if self.qkv_bias is not None:
            b.qkv += self.qkv_bias
        if self.head_norm is None:
            np.multiply(b.raw, self.head_scale, out=b.flat)
        else:
            np.multiply(b.raw, b.raw, out=b.square)
            np.dot(b.square, b.ones, out=b.length)
            b.length += self.head_norm.floor
            np.sqrt(b.length, out=b.length)
            np.divide(b.raw, b.length, out=b.flat)
            b.flat *= self.head_norm.weight
        np.multiply(b.back, sin, out=b.swapped)
        b.turned *= cos
        b.turned += b.swapped

    def finish(self, x: np.ndarray, b: _Buffers) -> None:
        """A token (D,), with its attention output in the buffers -> the token for the next layer, in place."""
        self.out()
        x += b.added
        self.feed_forward_norm(x, b.normed)
        self.swiglu()
        self.down()
        x += b.added


class _Slots(NamedTuple):
    """One layer's part of the cache."""

    keys: Tensor            # (1, G, C, K)
    values: Tensor          # the same
    key_array: np.ndarray   # (G, C, K), the same memory: NumPy writes a slot in a fifth of the time
    value_array: np.ndarray

    def attend(self, slot: int, b: _Buffers, shared: bool) -> None:
        """Write key and value of the buffers to a slot, and the query's attention over all slots up to it to the buffers."""
        self.key_array[:, slot], self.value_array[:, slot] = b.key, b.value
        if not shared or (slot + 1) * b.key.shape[1] <= SHORT:
            keys, values = self.key_array[:, None, :slot + 1], self.value_array[:, None, :slot + 1]  # (G, 1, T, K)
            decode_attention_numpy(b.query, keys, values, b.given)
        else:
            query, keys, values = torch.from_numpy(b.query[None, :, :, 0]), *(
                each.narrow(2, 0, slot + 1) for each in (self.keys, self.values))
            b.given[:, :, 0] = F.scaled_dot_product_attention(query, keys, values, scale=1.0)[0]


class RowEngine(TorchEngine):
    """One row on a CPU, in float32 except for the matrices, which may be in bfloat16 or 8 bits.

    Prefill is the torch engine's.
    """

    @staticmethod
    def fits(weights: Weights) -> bool:
        """Whether it supports a decoder with these weights."""
        dtype = weights.output.dtype
        packed = dtype == torch.bfloat16 and (weights.packed is not None or weights.in_8_bits)
        return weights.output.device.type == "cpu" and (packed or dtype == torch.float32)

    @classmethod
    def of(cls, engine: TorchEngine) -> "RowEngine":
        """Continue for an engine that has one row, and take over its state."""
        row = cls(engine.decoder, engine.weights)
        row.cache, row.hidden = engine.cache, engine.hidden
        row._begin()
        return row

    def prefill(self, prompts: Sequence[Prompt], room: int = ROOM) -> None:
        def read(shared: bool) -> None:
            super(RowEngine, self).prefill(prompts, room)

        if torch.get_num_threads() > 1:
            self.weights.prompt_tuner.run(read, len(prompts[0].ids))
        else:
            read(False)
        self._begin()

    def _begin(self) -> None:
        weights = self.weights
        self.buffers = _Buffers(weights.config)
        self.several = torch.get_num_threads() > 1
        self.layers = {shared: [_Layer.of(layer, weights.config, self.buffers, shared) for layer in weights.row_layers(shared)]
                       for shared in ((True, False) if self.several else (False,))}
        self.norm, self.table = _Norm.of(weights.norm), weights.output.detach()                    # (R, D)
        self.cache.close_gaps()
        self.cache.cos, self.cache.sin = self.cache.cos.float(), self.cache.sin.float()
        self.hidden = self.hidden.float()
        self._bind()

    def _bind(self) -> None:
        """Make views of the cache's present memory."""
        cache, half = self.cache, self.weights.config.head_dim // 2
        self.cos, self.sin = (each.numpy().reshape(-1, 2, half) for each in (cache.cos, cache.sin))
        self.slots = [_Slots(keys, values, keys[0].numpy(), values[0].numpy())
                      for keys, values in zip(cache.keys, cache.values, strict=True)]

    def step(self, ids: Tensor) -> None:
        if self.several:
            self.weights.step_tuner.run(lambda shared: self._step(ids, shared))
        else:
            self._step(ids, False)

    def best(self, allowed: Tensor) -> Tensor:
        if self.several and not self.weights.step_tuner.shared:
            return run_single_threaded(lambda: self._best(allowed))
        return self._best(allowed)

    def _step(self, ids: Tensor, shared: bool) -> None:
        if self.cache.used == self.cache.capacity:
            self.cache.grow()
            self._bind()
        x, b, slot = self.decoder.embedding(ids).float().numpy()[0].copy(), self.buffers, self.cache.used
        cos, sin = self.cos[slot], self.sin[slot]      # without gaps in the cache the slot is the position
        with np.errstate(over="ignore"):
            for layer, slots in zip(self.layers[shared], self.slots, strict=True):
                layer.project(x, cos, sin, b)
                slots.attend(slot, b, shared)
                layer.finish(x, b)
        self.cache.used += 1
        self.hidden = torch.from_numpy(self.norm(x, b.hidden))[None]

    def _best(self, allowed: Tensor) -> Tensor:
        table, (hidden,) = self.table[:allowed.shape[1]], self.hidden
        if allowed.shape[1] > self.weights.plain or not hidden.dot(hidden).isfinite():
            return super().best(allowed)
        forbidden, screen = self._forbidden(allowed)[0], self.weights.screen(len(table))
        if screen is None:
            return torch.tensor([(self.scores(len(table))[0].float().numpy() + forbidden).argmax()])
        few = torch.from_numpy(screen.candidates(hidden.numpy(), forbidden))
        return few[torch.mv(table[few].float(), hidden).argmax(keepdim=True)]
