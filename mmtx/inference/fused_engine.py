"""The GPU engine with Triton kernels: five per layer in a decode step of few rows.

With few rows a step is bound by reading the matrices. Norms, rotary positions, gates and residuals are fused into the kernels that
have the values at hand, each kernel reads a matrix in one wave of blocks, and a block starts loading its part of the matrix before
the preceding kernel has ended (programmatic dependent launch): only what depends on that kernel waits. With more rows, the matrix
products are torch's, and a layer takes eight operations.

Shapes: B batch, I inputs, O outputs, H heads, G key-value heads, C capacity, K head width.
"""

import warnings
from collections.abc import Callable
from functools import cache
from subprocess import CalledProcessError
from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmtx.inference.cache import KVCache
from mmtx.inference.graph_engine import GraphEngine
from mmtx.inference.weights import Layer, Weights
from mmtx.model import Decoder

MOST_ROWS = 8       # with more, matrix products are torch's, with tensor cores
SIZE = 1024         # outputs per block of the separate SwiGLU kernel then
TILES = {"qkv": (2 ** 13, 4), "out": (2 ** 13, 4), "gate_up": (2 ** 13, 4), "down": (2 ** 13, 4), "output": (2 ** 14, 8)}
# For each matrix: elements that a block reads, approximately, and its number of warps; tuned on an H100, as all constants here
AHEAD = 0           # matrices prefetched into L2 before their kernel begins: to be measured (benchmarks/tune_decoding.py)
MOST_AHEAD = 2 ** 23  # bytes of the output matrix that are prefetched, too
SLOTS, SLOT_WARPS = 32, 4  # cache slots that attention processes at a time, and its warps
WIDEST = 2 ** 15    # inputs of a matrix: a block reads a whole row at once
PART = 64           # cache slots per block of attention, approximately
MOST_PARTS = 32     # into which attention splits the cache
LEAST = 16          # rows and columns of the smallest product in Triton


@triton.jit
def _wait(EARLY: tl.constexpr):
    """Let the next kernel start, and wait for the previous one. Before this call, only read what no kernel writes."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _fetch(ahead_ptr, ahead, LANES: tl.constexpr):
    """Prefetch this block's share of `ahead` bytes into L2, without waiting."""
    if LANES > 0:
        share = tl.maximum(tl.cdiv(tl.cdiv(ahead, tl.num_programs(0) * LANES), 128) * 128, 1024)
        first = (tl.program_id(0) * LANES + tl.arange(0, LANES)).to(tl.int64) * share
        size = (tl.maximum(tl.minimum(share, ahead - first), 0) // 16 * 16).to(tl.int32)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [ahead_ptr.to(tl.int64) + first, size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _normed(x, gain, eps, inputs):
    """RMSNorm of x (I,)."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / inputs + eps) * gain


@triton.jit
def _norm_linear(x_ptr, gain_ptr, matrix_ptr, bias_ptr, y_ptr, eps, inputs, outputs, ahead_ptr, ahead,
                 ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
                 LANES: tl.constexpr):
    """norm(x) (ROWS, I) times a matrix (O, I), plus a bias -> y (ROWS, O)."""
    out, i = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, IN)
    fits, inside = out < outputs, i < inputs
    matrix = tl.load(matrix_ptr + out[:, None] * inputs + i[None, :], mask=fits[:, None] & inside[None, :], other=0)
    gain = tl.load(gain_ptr + i, mask=inside, other=0).to(tl.float32)
    _fetch(ahead_ptr, ahead, LANES)
    _wait(EARLY)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * inputs + i, mask=inside, other=0).to(tl.float32)
        normed = _normed(x, gain, eps, inputs).to(matrix.dtype).to(tl.float32)
        y = tl.sum(matrix.to(tl.float32) * normed[None, :], 1)
        if BIAS:
            y += tl.load(bias_ptr + out, mask=fits, other=0).to(tl.float32)
        tl.store(y_ptr + row * outputs + out, y.to(y_ptr.dtype.element_ty), mask=fits)


@triton.jit
def _norm_swiglu(x_ptr, gain_ptr, matrix_ptr, y_ptr, eps, inputs, outputs, ahead_ptr, ahead,
                 ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, EARLY: tl.constexpr,
                 LANES: tl.constexpr):
    """norm(x) (ROWS, I) times a matrix (2 * O, I) of gates and values -> silu(gate) * value (ROWS, O)."""
    out, i = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, IN)
    fits, inside = out < outputs, i < inputs
    place, both = out[:, None] * inputs + i[None, :], fits[:, None] & inside[None, :]
    gates = tl.load(matrix_ptr + place, mask=both, other=0)
    values = tl.load(matrix_ptr + outputs * inputs + place, mask=both, other=0)
    gain = tl.load(gain_ptr + i, mask=inside, other=0).to(tl.float32)
    _fetch(ahead_ptr, ahead, LANES)
    _wait(EARLY)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * inputs + i, mask=inside, other=0).to(tl.float32)
        normed = _normed(x, gain, eps, inputs).to(gates.dtype).to(tl.float32)
        gate = tl.sum(gates.to(tl.float32) * normed[None, :], 1)
        value = tl.sum(values.to(tl.float32) * normed[None, :], 1)
        tl.store(y_ptr + row * outputs + out, (gate * tl.sigmoid(gate) * value).to(y_ptr.dtype.element_ty), mask=fits)


@triton.jit
def _linear_add(x_ptr, matrix_ptr, y_ptr, inputs, outputs, ahead_ptr, ahead,
                ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, EARLY: tl.constexpr,
                LANES: tl.constexpr):
    """Add x (ROWS, I) times a matrix (O, I) to y (ROWS, O)."""
    out, i = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, IN)
    fits, inside = out < outputs, i < inputs
    matrix = tl.load(matrix_ptr + out[:, None] * inputs + i[None, :], mask=fits[:, None] & inside[None, :], other=0)
    _fetch(ahead_ptr, ahead, LANES)
    _wait(EARLY)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * inputs + i, mask=inside, other=0).to(tl.float32)
        at = y_ptr + row * outputs + out
        y = tl.load(at, mask=fits, other=0).to(tl.float32) + tl.sum(matrix.to(tl.float32) * x[None, :], 1)
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=fits)


@triton.jit
def _attend(qkv_ptr, gain_ptr, cos_ptr, sin_ptr, positions_ptr, slot_ptr, seen_ptr, keys_ptr, values_ptr, y_ptr,
            found_ptr, most_ptr, total_ptr, done_ptr, eps, scale, capacity,
            HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr,
            PARTS: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr):
    """For one row, key-value head and part of the cache: norm and rotary positions of queries and key, then attention.

    The first part writes key and value to the cache. Whichever part ends last combines the results of all.
    """
    row, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    d, q = tl.arange(0, WIDTH), tl.arange(0, QUERIES)
    swapped, inside = (d + WIDTH // 2) % WIDTH, q[:, None] < GROUP
    of_query, of_key = (group * GROUP + q)[:, None] * WIDTH, (HEADS + group) * WIDTH
    if NORM:
        query_gain = tl.load(gain_ptr + of_query + d[None, :], mask=inside, other=0).to(tl.float32)
        query_gain_swapped = tl.load(gain_ptr + of_query + swapped[None, :], mask=inside, other=0).to(tl.float32)
        key_gain = tl.load(gain_ptr + of_key + d).to(tl.float32)
        key_gain_swapped = tl.load(gain_ptr + of_key + swapped).to(tl.float32)
    _wait(EARLY)
    slot, position = tl.load(slot_ptr), tl.load(positions_ptr + row)
    cos, sin = tl.load(cos_ptr + position * WIDTH + d).to(tl.float32), tl.load(sin_ptr + position * WIDTH + d).to(tl.float32)
    qkv_ptr += row * (HEADS + 2 * KV_HEADS) * WIDTH
    query = tl.load(qkv_ptr + of_query + d[None, :], mask=inside, other=0).to(tl.float32)
    query_swapped = tl.load(qkv_ptr + of_query + swapped[None, :], mask=inside, other=0).to(tl.float32)
    key, key_swapped = tl.load(qkv_ptr + of_key + d).to(tl.float32), tl.load(qkv_ptr + of_key + swapped).to(tl.float32)
    value = tl.load(qkv_ptr + of_key + KV_HEADS * WIDTH + d)
    if NORM:
        query_factor = tl.rsqrt(tl.sum(query * query, 1) / WIDTH + eps)[:, None]
        key_factor = tl.rsqrt(tl.sum(key * key, 0) / WIDTH + eps)
        query, query_swapped = query * query_factor * query_gain, query_swapped * query_factor * query_gain_swapped
        key, key_swapped = key * key_factor * key_gain, key_swapped * key_factor * key_gain_swapped
    query = (query * cos[None, :] + query_swapped * sin[None, :]).to(value.dtype)
    key = (key * cos + key_swapped * sin).to(value.dtype)
    start = (row * KV_HEADS + group).to(tl.int64) * capacity * WIDTH
    keys_ptr += start
    values_ptr += start
    # Online softmax with running maximum and sum (https://arxiv.org/abs/2205.14135), from the token itself to those before it.
    # Each part starts with the token's own score, so that its maximum is finite, but only the first counts its share.
    most = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
    own = tl.where(part == 0, 1.0, 0.0)
    total = tl.zeros((QUERIES,), tl.float32) + own
    found = tl.zeros((QUERIES, WIDTH), tl.float32) + tl.where(part == 0, value.to(tl.float32), 0.0)[None, :]
    if part == 0:
        tl.store(keys_ptr + slot * WIDTH + d, key)
        tl.store(values_ptr + slot * WIDTH + d, value)
        tl.store(seen_ptr + row * capacity + slot, 1)
    length = tl.cdiv(tl.cdiv(slot, PARTS), SLOTS) * SLOTS
    stop = tl.minimum((part + 1) * length, slot)
    for first in range(part * length, stop, SLOTS):
        t = first + tl.arange(0, SLOTS)
        seen = t < stop
        seen = seen & (tl.load(seen_ptr + row * capacity + t, mask=seen, other=0) != 0)
        keys = tl.load(keys_ptr + t[None, :] * WIDTH + d[:, None], mask=seen[None, :], other=0)
        values = tl.load(values_ptr + t[:, None] * WIDTH + d[None, :], mask=seen[:, None], other=0)
        scores = tl.where(seen[None, :], tl.dot(query, keys, input_precision="ieee") * scale, float("-inf"))
        more = tl.maximum(most, tl.max(scores, 1))
        shares, less = tl.exp(scores - more[:, None]), tl.exp(most - more)
        total = total * less + tl.sum(shares, 1)
        found = found * less[:, None] + tl.dot(shares.to(values.dtype), values, input_precision="ieee")
        most = more
    y_ptr += row * HEADS * WIDTH
    if PARTS > 1:
        group += row * KV_HEADS
        place = (group * PARTS + part) * QUERIES + q
        tl.store(found_ptr + place[:, None] * WIDTH + d[None, :], found)
        tl.store(most_ptr + place, most)
        tl.store(total_ptr + place, total)
        tl.debug_barrier()
        if tl.atomic_add(done_ptr + group, 1) == PARTS - 1:
            tl.store(done_ptr + group, 0)
            most = tl.full((QUERIES,), float("-inf"), tl.float32)
            total = tl.zeros((QUERIES,), tl.float32)
            found = tl.zeros((QUERIES, WIDTH), tl.float32)
            for each in range(PARTS):
                place = (group * PARTS + each) * QUERIES + q
                other = tl.load(most_ptr + place, cache_modifier=".cg")
                more = tl.maximum(most, other)
                less, share = tl.exp(most - more), tl.exp(other - more)
                total = total * less + tl.load(total_ptr + place, cache_modifier=".cg") * share
                its = tl.load(found_ptr + place[:, None] * WIDTH + d[None, :], cache_modifier=".cg")
                found = found * less[:, None] + its * share[:, None]
                most = more
            tl.store(y_ptr + of_query + d[None, :], (found / total[:, None]).to(y_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(y_ptr + of_query + d[None, :], (found / total[:, None]).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(gate_up_ptr, y_ptr, outputs, SIZE: tl.constexpr):
    """Gates before values (B, 2 * O) -> silu(gate) * value (B, O)."""
    row, out = tl.program_id(1), tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    fits = out < outputs
    gate = tl.load(gate_up_ptr + row * 2 * outputs + out, mask=fits, other=0).to(tl.float32)
    value = tl.load(gate_up_ptr + (row * 2 + 1) * outputs + out, mask=fits, other=0).to(tl.float32)
    tl.store(y_ptr + row * outputs + out, (gate * tl.sigmoid(gate) * value).to(y_ptr.dtype.element_ty), mask=fits)


@triton.jit
def _last_norm(x_ptr, gain_ptr, y_ptr, slot_ptr, positions_ptr, eps, inputs, IN: tl.constexpr, EARLY: tl.constexpr):
    """Norm of the rows of x (B, I) -> y (B, I); also advances slot and positions by one."""
    row, i = tl.program_id(0), tl.arange(0, IN)
    inside = i < inputs
    gain = tl.load(gain_ptr + i, mask=inside, other=0).to(tl.float32)
    _wait(EARLY)
    x = tl.load(x_ptr + row * inputs + i, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + row * inputs + i, _normed(x, gain, eps, inputs).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(positions_ptr + row, tl.load(positions_ptr + row) + 1)
    if row == 0:
        tl.store(slot_ptr, tl.load(slot_ptr) + 1)


@triton.jit
def _best_of_blocks(x_ptr, matrix_ptr, allowed_ptr, best_ptr, place_ptr, inputs, outputs,
                    ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr):
    """x (ROWS, I) times a matrix (O, I), rounded -> the best allowed output of each block, and its index (ROWS, blocks)."""
    block, blocks, i = tl.program_id(0), tl.num_programs(0), tl.arange(0, IN)
    out, inside = block * OUT + tl.arange(0, OUT), i < inputs
    fits = out < outputs
    matrix = tl.load(matrix_ptr + out.to(tl.int64)[:, None] * inputs + i[None, :], mask=fits[:, None] & inside[None, :], other=0)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * inputs + i, mask=inside, other=0).to(tl.float32)
        scores = tl.sum(matrix.to(tl.float32) * x[None, :], 1).to(matrix.dtype).to(tl.float32)
        # Any allowed id beats all forbidden ones, whatever its score.
        scores = tl.where(scores == scores, tl.minimum(tl.maximum(scores, -3e38), 3e38), 3e38)
        allowed = tl.load(allowed_ptr + row * outputs + out, mask=fits, other=0) != 0
        scores = tl.where(allowed, scores, float("-inf"))
        best = tl.max(scores, 0)
        tl.store(best_ptr + row * blocks + block, best)
        tl.store(place_ptr + row * blocks + block, tl.min(tl.where(scores == best, out, outputs), 0))


@triton.jit
def _best_block(best_ptr, place_ptr, y_ptr, blocks, BLOCKS: tl.constexpr):
    """The index of the best output over all blocks (B, blocks) -> y (B,); the first of equal ones."""
    row, block = tl.program_id(0), tl.arange(0, BLOCKS)
    inside = block < blocks
    best = tl.load(best_ptr + row * blocks + block, mask=inside, other=float("-inf"))
    place = tl.load(place_ptr + row * blocks + block, mask=inside, other=2 ** 31 - 1)
    y = tl.min(tl.where(best == tl.max(best, 0), place, 2 ** 31 - 1), 0)
    tl.store(y_ptr + row, y.to(tl.int64))


def fused_best(hidden: Tensor, matrix: Tensor, allowed: Tensor) -> Tensor:
    """The best id (B,) for hidden states (B, D), among those of the first N rows of a matrix (R, D) that are `allowed` (B, N)."""
    (rows, width), outputs = hidden.shape, allowed.shape[1]
    whole = triton.next_power_of_2(width)
    tile, warps = TILES["output"]
    out = max(1, tile // whole)
    blocks = triton.cdiv(outputs, out)
    best, place = (hidden.new_empty(rows, blocks, dtype=dtype) for dtype in (torch.float32, torch.int32))
    chosen = hidden.new_empty(rows, dtype=torch.int64)
    with torch.cuda.device_of(hidden):
        _best_of_blocks[blocks,](hidden, matrix, allowed.view(torch.uint8), best, place, width, outputs, ROWS=rows, IN=whole,
                                 OUT=out, num_warps=warps)
        _best_block[rows,](best, place, chosen, blocks, BLOCKS=triton.next_power_of_2(blocks), num_warps=8)
    return chosen


@cache
def works(device: torch.device) -> bool:
    """Whether Triton can build and launch a kernel here, for which it needs a C compiler."""
    x, gain = torch.tensor([[3.0, 4.0]], device=device), torch.tensor([1.0, 2.0], device=device)
    slot, positions, y = *torch.zeros(2, 1, dtype=torch.long, device=device), torch.empty_like(x)
    try:
        with torch.cuda.device_of(x):
            _last_norm[1,](x, gain, y, slot, positions, 0.0, 2, IN=2, EARLY=False)
    except (RuntimeError, OSError, CalledProcessError) as error:
        warnings.warn(f"decoding is slower: Triton cannot build kernels ({str(error).splitlines()[0][:200]})", stacklevel=2)
        return False
    return True


def fits(weights: Weights) -> bool:
    """Whether the kernels support a decoder with these weights."""
    c, width = weights.config, weights.config.head_dim
    matrices = [each for layer in weights.layers for each in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    return (width >= LEAST and width == triton.next_power_of_2(width)
            and max(c.width, c.mlp_dim, c.heads * width) <= WIDEST
            and all(isinstance(each, Tensor) and each.T.is_contiguous() for each in matrices))


def fused_step(decoder: Decoder, weights: Weights, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """`static_step` of a cache as a function of ids (B,), for weights that it `fits`."""
    c, rows, like = weights.config, len(cache.positions), cache.keys[0]
    on_gpu = like.is_cuda
    early = on_gpu and torch.version.hip is None and torch.cuda.get_device_capability(like.device) >= (9, 0)
    launch = {"EARLY": early, **({"launch_pdl": True} if early else {})}
    qkv = like.new_empty(rows, (c.heads + 2 * c.kv_heads) * c.head_dim)
    found, inner = like.new_empty(rows, c.heads * c.head_dim), like.new_empty(rows, c.mlp_dim)
    seen, queries = cache.seen.view(torch.uint8), max(LEAST, triton.next_power_of_2(c.heads // c.kv_heads))
    hidden = like.new_empty(rows, c.width)
    parts = min(triton.cdiv(cache.capacity, PART), MOST_PARTS)
    of_parts = [torch.zeros(rows, c.kv_heads, parts, queries, *more, device=like.device) for more in ((c.head_dim,), (), ())]
    done = torch.zeros(rows, c.kv_heads, dtype=torch.int32, device=like.device)
    # In the order in which they are read, followed by the output matrix.
    matrices = [getattr(layer, name) for layer in weights.layers for name in ("qkv", "out", "gate_up", "down")]
    matrices += [weights.output.detach()] * AHEAD

    def multiply(kernel: Any, place: int, name: str, outputs: int, *given: Any, matrices_read: int = 1, **options: Any) -> None:
        """Launch a kernel that reads `matrices[place]`; `given` are its arguments before the sizes, the matrix included."""
        inputs, following = matrices[place].shape[0], matrices[place + AHEAD]
        tile, warps = TILES[name]
        whole = triton.next_power_of_2(inputs)
        out = max(1, tile // matrices_read // whole)
        ahead = min(following.nbytes, MOST_AHEAD) if place + AHEAD >= 4 * c.depth else following.nbytes
        kernel[triton.cdiv(outputs, out),](
            *given, inputs, outputs, following, ahead, ROWS=rows, IN=whole, OUT=out, num_warps=warps,
            LANES=32 * warps if early and AHEAD and following.data_ptr() % 16 == 0 else 0, **options, **launch)

    def attend(layer: Layer, qkv: Tensor, keys: Tensor, values: Tensor) -> None:
        gain = None if layer.head_norm is None else layer.head_norm.gain
        _attend[rows, c.kv_heads, parts](
            qkv, qkv if gain is None else gain, cache.cos, cache.sin, cache.positions, cache.slot, seen, keys, values, found,
            *of_parts, done, c.norm_eps, c.head_dim ** -0.5, cache.capacity, HEADS=c.heads, KV_HEADS=c.kv_heads,
            WIDTH=c.head_dim, QUERIES=queries, SLOTS=SLOTS, PARTS=parts, NORM=gain is not None, num_warps=SLOT_WARPS, **launch)

    def many(x: Tensor) -> Tensor:
        for layer, keys, values in zip(weights.layers, cache.keys, cache.values, strict=True):
            attend(layer, F.linear(layer.attention_norm.fused(x), cast(Tensor, layer.qkv).T, layer.qkv_bias), keys, values)
            x = torch.addmm(x, found, cast(Tensor, layer.out))
            gate_up = layer.feed_forward_norm.fused(x) @ cast(Tensor, layer.gate_up)
            _swiglu[triton.cdiv(c.mlp_dim, SIZE), rows](gate_up, inner, c.mlp_dim, SIZE=SIZE)
            x = torch.addmm(x, inner, cast(Tensor, layer.down))
        return x

    def few(x: Tensor) -> Tensor:
        for number, (layer, keys, values) in enumerate(zip(weights.layers, cache.keys, cache.values, strict=True)):
            bias = layer.qkv_bias
            multiply(_norm_linear, 4 * number, "qkv", qkv.shape[1], x, layer.attention_norm.gain, layer.qkv,
                     qkv if bias is None else bias, qkv, c.norm_eps, BIAS=bias is not None)
            attend(layer, qkv, keys, values)
            multiply(_linear_add, 4 * number + 1, "out", c.width, found, layer.out, x)
            multiply(_norm_swiglu, 4 * number + 2, "gate_up", c.mlp_dim, x, layer.feed_forward_norm.gain, layer.gate_up, inner,
                     c.norm_eps, matrices_read=2)
            multiply(_linear_add, 4 * number + 3, "down", c.width, inner, layer.down, x)
        return x

    def step(ids: Tensor) -> Tensor:
        x = (few if rows <= MOST_ROWS else many)(decoder.embedding(ids))
        _last_norm[rows,](x, weights.norm.gain, hidden, cache.slot, cache.positions, c.norm_eps, c.width,
                          IN=triton.next_power_of_2(c.width), **launch)
        return hidden

    return step


class FusedEngine(GraphEngine):
    """Any number of rows of a decoder that it `fits`."""

    def __init__(self, decoder: Decoder, weights: Weights, capture_all: bool = True):
        super().__init__(decoder, weights, fused_step, capture_all)

    def best(self, allowed: Tensor) -> Tensor:
        if allowed.shape[1] > self.weights.plain or len(allowed) > MOST_ROWS:
            return super().best(allowed)
        return fused_best(self.hidden, self.weights.output, allowed.contiguous())
