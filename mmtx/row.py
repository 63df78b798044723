"""Decoding one row on a CPU: the step of `decoding.step` in NumPy, and the best id without reading all of the output matrix.

One token has so little to compute that a step costs what reading the weights and starting operations cost. Starting one
in NumPy takes a third of the time, and its product of a vector and a matrix (OpenBLAS) reads memory at up to twice the
rate of torch's (MKL) on the machines that we measured. It works on the same memory as the torch tensors. Tests compare it
with the torch path.

Shapes: D width, H heads, G key-value heads, K head width, C capacity of the cache, T tokens in it, R rows of the output.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmtx.decoding import KVCache, Norm, Weights

FEW_ROWS = 4096   # output matrices up to here are read as a whole
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


class _Layer(NamedTuple):
    """The weights of one block; matrices as (out, in), whichever side is contiguous."""

    attention_norm: _Norm
    qkv: np.ndarray
    head_norm: _Norm        # weight (H + G, K), that of queries over sqrt(K)
    out: np.ndarray
    feed_forward_norm: _Norm
    gate_up: np.ndarray
    down: np.ndarray


class Row:
    """One row's way through the decoder, token by token."""

    def __init__(self, weights: Weights, cache: KVCache):
        """Go on from a cache of one row."""
        c = self.config = weights.config
        self.used, self.position = int(cache.slot), int(cache.positions[0])
        # A row that comes out of a batch of prompts of many lengths has padding between its prompt and its answer.
        self.gap = np.flatnonzero(~cache.seen[0, :self.used].numpy())
        self.keys, self.values = ([each[0].numpy() for each in many] for many in (cache.keys, cache.values))
        turning, half = c.heads + c.kv_heads, c.head_width // 2
        self.cos, self.sin = (each.numpy().reshape(-1, 2, half) for each in (cache.cos, cache.sin))
        scale = np.ones((turning, 1), np.float32)
        scale[:c.heads] = c.head_width ** -0.5
        self.layers = []
        for layer in weights.layers:
            head_norm = _Norm.of(layer.head_norm)
            self.layers.append(_Layer(
                _Norm.of(layer.attention_norm), _array(layer.qkv.T), head_norm._replace(weight=head_norm.weight * scale),
                _array(layer.out.T), _Norm.of(layer.feed_forward_norm), _array(layer.gate_up.T), _array(layer.down.T)))
        self.norm, self.table = _Norm.of(weights.norm), _array(weights.output)                    # (R, D)
        self.screens = weights.screens
        self.allowed = self.forbidden = None
        # Where the operations put what they make.
        empty = lambda *shape: np.empty(shape, np.float32)  # noqa: E731
        self.normed, self.added, self.hidden = empty(c.width), empty(c.width), empty(c.width)
        self.qkv, self.gate_up, self.gate = empty((turning + c.kv_heads) * c.head_width), empty(2 * c.hidden), empty(c.hidden)
        self.turned, self.swapped = empty(turning, 2, half), empty(turning, 2, half)
        self.square, self.length = empty(turning, c.head_width), empty(turning, 1)
        self.ones = np.ones((c.head_width, 1), np.float32)

    @staticmethod
    def takes(weights: Weights, cache: KVCache) -> bool:
        """Whether decoding may go on here."""
        return len(cache.positions) == 1 and weights.output.device.type == "cpu" and weights.output.dtype == torch.float32

    def best(self, hidden: Tensor, allowed: Tensor) -> Tensor:
        """Hidden state (1, D), and which of the first ids, all with a row of their own, may be chosen (1, R) -> the best."""
        if allowed is not self.allowed:
            self.allowed, self.forbidden = allowed, np.where(allowed.numpy()[0], np.float32(0), np.float32(-np.inf))
        hidden, table = hidden.numpy()[0], self.table[:allowed.shape[1]]
        if self.screens is None or len(table) <= FEW_ROWS:
            return torch.tensor([(table @ hidden + self.forbidden).argmax()])
        if len(table) not in self.screens:
            self.screens[len(table)] = Screen.of(torch.from_numpy(table))
        few = self.screens[len(table)].candidates(hidden, self.forbidden)
        return torch.from_numpy(few[(table[few] @ hidden).argmax(keepdims=True)])

    def step(self, x: Tensor) -> Tensor:
        """Feed one more token, as its input (1, D) -> its hidden state (1, D), good until the next step."""
        x = x.numpy()[0].copy()
        c, slot = self.config, self.used
        self.used, turning = slot + 1, c.heads + c.kv_heads
        heads = self.qkv.reshape(-1, c.head_width)
        raw, value = heads[:turning], heads[turning:]
        turned, swapped, length, square = self.turned, self.swapped, self.length, self.square
        flat = turned.reshape(turning, c.head_width)
        back, key = turned[:, ::-1], flat[c.heads:]
        query = flat[:c.heads].reshape(c.kv_heads, -1, c.head_width).transpose(0, 2, 1)           # (G, K, H / G)
        gate, up = self.gate_up[:c.hidden], self.gate_up[c.hidden:]
        cos, sin, gap = self.cos[self.position], self.sin[self.position], self.gap
        self.position += 1
        with np.errstate(over="ignore"):
            for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
                np.dot(layer.qkv, layer.attention_norm(x, self.normed), out=self.qkv)
                np.multiply(raw, raw, out=square)
                np.dot(square, self.ones, out=length)
                length += layer.head_norm.floor
                np.sqrt(length, out=length)
                np.divide(raw, length, out=flat)
                flat *= layer.head_norm.weight
                np.multiply(back, sin, out=swapped)
                turned *= cos
                turned += swapped
                keys[:, slot], values[:, slot] = key, value
                scores = np.matmul(keys[:, :slot + 1], query)                                     # (G, T, H / G)
                if len(gap):
                    scores[:, gap] = -np.inf
                scores -= scores.max(1, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(1, keepdims=True)
                found = np.matmul(scores.transpose(0, 2, 1), values[:, :slot + 1])                # (G, H / G, K)
                x += np.dot(layer.out, found.reshape(-1), out=self.added)
                np.dot(layer.gate_up, layer.feed_forward_norm(x, self.normed), out=self.gate_up)
                # up * silu(gate); where exp overflows, silu is 0.
                np.negative(gate, out=self.gate)
                np.exp(self.gate, out=self.gate)
                self.gate += 1
                np.divide(gate, self.gate, out=self.gate)
                self.gate *= up
                x += np.dot(layer.down, self.gate, out=self.added)
        return torch.from_numpy(self.norm(x, self.hidden))[None]


class Screen(NamedTuple):
    """The first rows of an output matrix in 8 bits, and the error that this makes: says which few can score best."""

    codes: Tensor         # (R, D) int8
    scale: Tensor         # (R,) a row is about its codes times this
    length: np.ndarray    # (R,) of that
    error: np.ndarray     # (R,) length of what it lacks, and SLACK of its own length

    @classmethod
    def of(cls, rows: Tensor) -> "Screen":
        """Of a matrix (R, D)."""
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        codes = (rows / scale).round_()
        near = codes * scale
        length = torch.linalg.vector_norm(near, dim=1)
        error = torch.linalg.vector_norm(near.sub_(rows), dim=1) + SLACK * length
        return cls(codes.to(torch.int8), scale[:, 0], length.numpy(), error.numpy())

    def scores(self, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """About what each row scores (R,) for a hidden state (D,), and how far from the truth that may be (R,).

        With w a row, v what is here of it, h the hidden state and g what 8 bits keep of that, the score w h differs from
        v g by no more than |w - v| |h| + |v| |h - g|.
        """
        scale = float(max(hidden.max(), -hidden.min(), 1e-30)) / 127
        codes = np.rint(hidden / scale)
        lack = hidden - codes * scale
        given = torch.from_numpy(codes.astype(np.int8))[None]
        # On one thread: torch's, waiting for more to do, would take cores from NumPy's, and the other way round. Two cores of
        # an AMD EPYC, 384 x 6: 221 ids a second so, 109 on all threads where torch was imported before mmtx.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            scores = torch._int_mm(given, self.codes.T)[0].mul(self.scale).numpy()
        finally:
            torch.set_num_threads(threads)
        scores *= scale
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
