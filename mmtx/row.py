"""Decoding one row on a CPU: the step of `decoding.step` in NumPy, and the best id without reading all of the output matrix.

One token has so little to compute that a step costs what reading the weights and starting operations cost. Starting one
in NumPy takes a third of the time. It works on the same memory as the torch tensors. Tests compare it with the torch path.

Shapes: D width, H heads, G key-value heads, K head width, C capacity of the cache, T tokens in it, R rows of the output.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtx.decoding import KVCache, Norm, Weights

FEW_ROWS = 4096   # output matrices up to here are read as a whole
SHORT = 9216      # numbers of a head's keys up to here are read by NumPy's products, which then stay on one thread
SLACK = 1e-5      # what float32 rounds away in a score, as a share of the longest that it could be


def lay_out(decoder: nn.Module) -> None:
    """Store the matrices of the blocks so that their longer side is contiguous, which changes no value: it then is read in
    long streams.

    Measured in fp32 for 384 -> 2048 (one core of an AMD EPYC): 26 GB/s, and 13 GB/s the other way.
    """
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 2 and name.startswith("blocks") and parameter.shape[0] > parameter.shape[1]:
            parameter.data = parameter.data.T.contiguous().T


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


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


def _product(matrix: Tensor, x: np.ndarray, out: np.ndarray) -> Callable[[], object]:
    """What puts the product of a matrix (O, I), as it is then, and `x` (I,) into `out` (O,) when it is called.

    One thread of NumPy's (OpenBLAS) reads memory at up to 1.3 times the rate of torch's (MKL), on an AMD EPYC; on an Intel
    Xeon they are equal. Threads of both would wait for more to do on cores that the other needs, so many are torch's only:
    on two cores of that Xeon, 384 x 6, 91 ids a second with NumPy's and 294 so.
    """
    if torch.get_num_threads() == 1:
        return partial(np.dot, _array(matrix), x, out)
    return partial(torch.mv, matrix.detach(), torch.from_numpy(x), out=torch.from_numpy(out))


class _Layer(NamedTuple):
    """The weights of one block, with matrices as their products."""

    attention_norm: _Norm
    qkv: Callable[[], object]
    head_norm: _Norm        # weight (H + G, K), that of queries over sqrt(K)
    out: Callable[[], object]
    feed_forward_norm: _Norm
    gate_up: Callable[[], object]
    down: Callable[[], object]


class _Slots(NamedTuple):
    """One layer's part of the cache."""

    keys: Tensor            # (1, G, C, K)
    values: Tensor          # the same
    key_array: np.ndarray   # (G, C, K), the same memory: NumPy writes a slot in a fifth of the time
    value_array: np.ndarray


class Row:
    """One row's way through the decoder, token by token."""

    def __init__(self, weights: Weights, cache: KVCache):
        """Go on from a cache of one row, which is its own from now on."""
        c = self.config = weights.config
        self.cache = cache
        cache.close_gaps()
        self._bind()
        turning, half = c.heads + c.kv_heads, c.head_width // 2
        # Where the operations put what they make.
        empty = lambda *shape: np.empty(shape, np.float32)  # noqa: E731
        self.normed, self.added, self.hidden = empty(c.width), empty(c.width), empty(c.width)
        self.qkv, self.found = empty((turning + c.kv_heads) * c.head_width), empty(c.heads * c.head_width)
        self.gate_up, self.gate = empty(2 * c.hidden), empty(c.hidden)
        self.turned, self.swapped = empty(turning, 2, half), empty(turning, 2, half)
        self.square, self.length = empty(turning, c.head_width), empty(turning, 1)
        self.ones = np.ones((c.head_width, 1), np.float32)
        scale = np.ones((turning, 1), np.float32)
        scale[:c.heads] = c.head_width ** -0.5
        self.layers = []
        for layer in weights.layers:
            head_norm = _Norm.of(layer.head_norm)
            self.layers.append(_Layer(
                _Norm.of(layer.attention_norm), _product(layer.qkv.T, self.normed, self.qkv),
                head_norm._replace(weight=head_norm.weight * scale),
                _product(layer.out.T, self.found, self.added), _Norm.of(layer.feed_forward_norm),
                _product(layer.gate_up.T, self.normed, self.gate_up), _product(layer.down.T, self.gate, self.added)))
        self.norm, self.table = _Norm.of(weights.norm), weights.output.detach()                    # (R, D)
        self.screens = weights.screens if Screen.pays() else None
        self.allowed = self.forbidden = None

    def _bind(self) -> None:
        """Look at the cache where it now lies."""
        cache = self.cache
        self.cos, self.sin = (each.numpy().reshape(-1, 2, self.config.head_width // 2) for each in (cache.cos, cache.sin))
        self.slots = [_Slots(keys, values, keys[0].numpy(), values[0].numpy())
                      for keys, values in zip(cache.keys, cache.values, strict=True)]

    @staticmethod
    def takes(weights: Weights, cache: KVCache) -> bool:
        """Whether decoding may go on here."""
        return len(cache.positions) == 1 and weights.output.device.type == "cpu" and weights.output.dtype == torch.float32

    def best(self, hidden: Tensor, allowed: Tensor) -> Tensor:
        """Hidden state (1, D), and which of the first ids, all with a row of their own, may be chosen (1, R) -> the best."""
        if allowed is not self.allowed:
            self.allowed, self.forbidden = allowed, np.where(allowed.numpy()[0], np.float32(0), np.float32(-np.inf))
        table, (hidden,) = self.table[:allowed.shape[1]], hidden
        if self.screens is None or len(table) <= FEW_ROWS:
            return torch.tensor([(torch.mv(table, hidden).numpy() + self.forbidden).argmax()])
        if len(table) not in self.screens:
            self.screens[len(table)] = Screen.of(table)
        few = torch.from_numpy(self.screens[len(table)].candidates(hidden.numpy(), self.forbidden))
        return few[torch.mv(table[few], hidden).argmax(keepdim=True)]

    def step(self, x: Tensor) -> Tensor:
        """Feed one more token, as its input (1, D) -> its hidden state (1, D), good until the next step."""
        x = x.numpy()[0].copy()
        if self.cache.used == self.cache.capacity:
            self.cache.grow()
            self._bind()
        c, slot, turning = self.config, self.cache.used, self.config.heads + self.config.kv_heads  # the slot is the position
        self.cache.used += 1
        heads = self.qkv.reshape(-1, c.head_width)
        raw, value = heads[:turning], heads[turning:]
        turned, swapped, length, square = self.turned, self.swapped, self.length, self.square
        flat, back = turned.reshape(turning, c.head_width), turned[:, ::-1]
        # The queries of a group share keys and values: they take the place of tokens, as in `decoding.attend`.
        shape = c.kv_heads, c.heads // c.kv_heads, c.head_width
        query, key, found = flat[:c.heads].reshape(shape), flat[c.heads:], self.found.reshape(shape)
        gate, up = self.gate_up[:c.hidden], self.gate_up[c.hidden:]
        cos, sin = self.cos[slot], self.sin[slot]
        short = (slot + 1) * c.head_width <= SHORT
        with np.errstate(over="ignore"):
            for layer, slots in zip(self.layers, self.slots, strict=True):
                layer.attention_norm(x, self.normed)
                layer.qkv()
                np.multiply(raw, raw, out=square)
                np.dot(square, self.ones, out=length)
                length += layer.head_norm.floor
                np.sqrt(length, out=length)
                np.divide(raw, length, out=flat)
                flat *= layer.head_norm.weight
                np.multiply(back, sin, out=swapped)
                turned *= cos
                turned += swapped
                slots.key_array[:, slot], slots.value_array[:, slot] = key, value
                if short:
                    scores = np.matmul(query, slots.key_array[:, :slot + 1].transpose(0, 2, 1))     # (G, H / G, T)
                    scores -= scores.max(2, keepdims=True)
                    np.exp(scores, out=scores)
                    scores /= scores.sum(2, keepdims=True)
                    np.matmul(scores, slots.value_array[:, :slot + 1], out=found)
                else:
                    keys, values = slots.keys.narrow(2, 0, slot + 1), slots.values.narrow(2, 0, slot + 1)
                    found[:] = F.scaled_dot_product_attention(torch.from_numpy(query)[None], keys, values, scale=1.0)[0]
                layer.out()
                x += self.added
                layer.feed_forward_norm(x, self.normed)
                layer.gate_up()
                # up * silu(gate); where exp overflows, silu is 0.
                np.negative(gate, out=self.gate)
                np.exp(self.gate, out=self.gate)
                self.gate += 1
                np.divide(gate, self.gate, out=self.gate)
                self.gate *= up
                layer.down()
                x += self.added
        return torch.from_numpy(self.norm(x, self.hidden))[None]


class Screen(NamedTuple):
    """The first rows of an output matrix in 8 bits, and the error that this makes: says which few can score best."""

    packed: Tensor        # (R, D) of int8, as oneDNN lays it out
    scale: Tensor         # (R,) a row is about its codes times this
    zero: Tensor          # (R,) of zeros
    length: np.ndarray    # (R,) of what a row is about
    error: np.ndarray     # (R,) length of what it lacks, and SLACK of its own length

    @staticmethod
    def pays() -> bool:
        """Whether the processor has instructions for products of 8 bits (VNNI): with others, reading all is as fast."""
        has = torch.cpu.get_capabilities()
        return torch.backends.mkldnn.is_available() and any(has.get(name) for name in ("avx512_vnni", "avx_vnni"))

    @classmethod
    def of(cls, rows: Tensor) -> "Screen":
        """Of a matrix (R, D)."""
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        codes = (rows / scale).round_()
        near = codes * scale
        length = torch.linalg.vector_norm(near, dim=1)
        error = torch.linalg.vector_norm(near.sub_(rows), dim=1) + SLACK * length
        packed = torch.ops.onednn.qlinear_prepack(codes.to(torch.int8), [1, rows.shape[1]])
        return cls(packed, scale[:, 0], torch.zeros(len(rows), dtype=torch.long), length.numpy(), error.numpy())

    def scores(self, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """About what each row scores (R,) for a hidden state (D,), and how far from the truth that may be (R,).

        With w a row, v what is here of it, h the hidden state and g what 7 bits keep of that, the score w h differs from
        v g by no more than |w - v| |h| + |v| |h - g|.
        """
        # 7 bits, from 0 on: where oneDNN keeps to AVX2, it adds two products in 16 bits, which two of 255 and 127 do not fit.
        scale = float(max(hidden.max(), -hidden.min(), 1e-30)) / 63
        codes = np.rint(hidden / scale)
        lack = hidden - codes * scale
        given = torch.from_numpy((codes + 64).astype(np.uint8))[None]
        scores = torch.ops.onednn.qlinear_pointwise(
            given, scale, 64, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], "")[0].numpy()
        bound = self.error * math.sqrt(hidden.dot(hidden))
        bound += self.length * math.sqrt(lack.dot(lack))
        return scores, bound

    def candidates(self, hidden: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
        """Which rows can score best among those whose `forbidden` (R,) is 0 and not -inf."""
        scores, bound = self.scores(hidden)
        scores += forbidden
        best = scores.argmax()
        least = scores[best] - bound[best]
        scores += bound
        return np.flatnonzero(scores >= least)
