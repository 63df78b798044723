"""The operations between a block's matrix products, with hand-written gradients for the CPU.

These operations are bound by memory bandwidth. Left to autograd, an RMSNorm makes some fifteen passes over its tokens in
forward and backward, and the parts of a split are concatenated again by a copy; written by hand, only the passes that the
formula needs remain. Other devices run the plain formulas, which fused operations or a compiler make faster still. Tests
compare the two.

Under autocast, outputs have the dtype in which the next matrix product computes.

Shapes: B batch, T tokens, N tokens of a batch, D width, H heads, G key-value heads, K head width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128   # queries that attention computes at a time
KEPT = 1024  # tokens of rows whose attention weights are kept for the backward pass; those of longer ones are computed again


class Heads(NamedTuple):
    """Queries (..., H, K), keys and values (..., G, K)."""

    query: Tensor
    key: Tensor
    value: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (..., D) (https://arxiv.org/abs/1910.07467)."""
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, weight, eps, _next_type(x))
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2 * hidden), gates before values -> silu(gate) * value (..., hidden) (https://arxiv.org/abs/2002.05202)."""
    if gate_up.device.type == "cpu":
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def qk_norm_rope(qkv: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int,
               kv_heads: int, eps: float) -> Heads:
    """Projections (..., (H + 2G) * K) -> heads; queries and keys get RMSNorm (if it has weights) and rotary positions.

    `cos` and `sin` (..., K) are those of the rotary angles; the two halves of a head form the pairs.
    """
    if qkv.device.type == "cpu" and query_weight is not None:
        return Heads(*_QKNormRoPE.apply(qkv, query_weight, key_weight, cos, sin, heads, kv_heads, eps))
    width = cos.shape[-1]
    query, key, value = (part.unflatten(-1, (-1, width)) for part in
                         qkv.split([heads * width, kv_heads * width, kv_heads * width], dim=-1))
    query, key = (apply_rotary_emb(part if weight is None else F.rms_norm(part, (width,), weight, eps), cos, sin)
                  for part, weight in ((query, query_weight), (key, key_weight)))
    return Heads(query, key, value)


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention of queries (B, T, H, K) over keys and values (B, T, G, K) -> (B, T, H, K).

    On a CPU torch's kernel is the fastest only for short rows in float32. Forward and backward of 4 rows of 512 tokens with 6
    heads of 64 on one core of an AMD EPYC with AVX512-BF16: 75 ms in float32 and 76 in bfloat16; in blocks, 55 and 31.
    """
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))           # (B, H | G, T, K)
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cpu" and (query.dtype == torch.bfloat16 or query.shape[2] > BLOCK):
        if groups > 1:
            key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        keep = torch.is_grad_enabled() and query.shape[2] <= KEPT
        return _Attend.apply(query, key, value, causal, keep).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=groups > 1).transpose(1, 2)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x (..., H, K) by the angles with these cosines and sines (..., K)."""
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return (x * cos[..., None, :] + turned * sin[..., None, :]).to(x.dtype)


def pad_input(x: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
    """x[gather] (slots, ...) for x (N, ...); the gradient of row i is the one of slot scatter[i], `scatter` (N,)."""
    return _PadInput.apply(x, gather, scatter)


def unpad_input(x: Tensor, scatter: Tensor) -> Tensor:
    """x[scatter] (N, ...) for x (slots, ...); `scatter` has no duplicates."""
    return _UnpadInput.apply(x, scatter)


def _next_type(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps), in float32 or wider, and the factor (..., 1) by which x was multiplied."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * factor, factor


def _normed_backward(along: Tensor, d_normed: Tensor, normed: Tensor, factor: Tensor) -> Tensor:
    """The gradient of x from `d_normed`, which is overwritten; `along` (..., 1) is the sum of d_normed * normed."""
    return d_normed.addcmul_(normed, along, value=-1 / normed.shape[-1]).mul_(factor)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y, _ = _normed(x, eps)
        return y.mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        normed, factor = _normed(x, ctx.eps)
        dy, precise = dy.to(normed.dtype), weight.to(normed.dtype)
        d = dy * normed
        d_weight = d.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_x = _normed_backward((d @ precise)[..., None], dy * precise, normed, factor)
        return d_x.to(x.dtype), d_weight, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (gate_up,) = ctx.saved_tensors
        d = torch.empty_like(gate_up)
        (gate, up), (d_gate, d_up) = gate_up.chunk(2, dim=-1), d.chunk(2, dim=-1)
        torch.mul(F.silu(gate), dy, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return d


class _QKNormRoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor, heads: int,
                kv_heads: int, eps: float):
        ctx.save_for_backward(qkv, query_weight, key_weight, cos, sin)
        ctx.sizes = heads, kv_heads, eps
        x = qkv.unflatten(-1, (-1, query_weight.shape[0]))
        turning, value = x[..., :heads + kv_heads, :], x[..., heads + kv_heads:, :]
        normed, _ = _normed(turning, eps)
        turned = _apply_rotary_emb(normed.mul_(_rows(query_weight, key_weight, heads, kv_heads)), cos, sin).to(qkv.dtype)
        return turned[..., :heads, :], turned[..., heads:, :], value

    @staticmethod
    @once_differentiable
    def backward(ctx, d_query: Tensor, d_key: Tensor, d_value: Tensor):
        qkv, query_weight, key_weight, cos, sin = ctx.saved_tensors
        heads, kv_heads, eps = ctx.sizes
        x = qkv.unflatten(-1, (-1, query_weight.shape[0]))
        normed, factor = _normed(x[..., :heads + kv_heads, :], eps)
        dy = _apply_rotary_emb(torch.cat([d_query, d_key], dim=-2).to(normed.dtype), cos, -sin)
        weight = _rows(query_weight, key_weight, heads, kv_heads)
        d = dy * normed
        d_weights = [None, None]
        if any(ctx.needs_input_grad[1:3]):
            d_weights = [part.sum(0).to(query_weight.dtype) for part in d.flatten(0, -3).sum(0).split([heads, kv_heads])]
        along = d.mul_(weight).sum(-1, keepdim=True)
        d_qkv = torch.empty_like(x)
        d_qkv[..., :heads + kv_heads, :] = _normed_backward(along, dy.mul_(weight), normed, factor)
        d_qkv[..., heads + kv_heads:, :] = d_value
        return d_qkv.flatten(-2), *d_weights, None, None, None, None, None


class _Attend(torch.autograd.Function):
    """Attention in blocks of queries, in memory linear in T: weights are kept only up to `KEPT` tokens.

    Kept, forward and backward of 4 rows of 512 tokens with 6 heads of 64 take 26 ms in bfloat16 instead of 33 on one core of an
    Intel Xeon with AMX, and 43 instead of 51 in float32. A step of 384 x 6 with 4 rows of 1,024 takes 0.86 of the time and 1.15
    of the memory; gradient checkpointing keeps the weights of one block at a time.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, causal: bool, keep: bool) -> Tensor:
        q, k, v = (part.reshape(-1, *part.shape[2:]) for part in (query, key, value))    # (B*H, T, K)
        y = torch.empty_like(q)
        kept = []
        for rows, seen in _blocks(q.shape[1], causal):
            share = _shares(q, k, rows, seen, causal)
            torch.bmm(share, v[:, :seen], out=y[:, rows])
            if keep:
                kept.append(share)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.causal = causal
        return y.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        shape, scale = dy.shape, q.shape[-1] ** -0.5
        dy = dy.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(k, dtype=torch.promote_types(k.dtype, torch.float32))
                                            for _ in range(2))
        for number, (rows, seen) in enumerate(_blocks(q.shape[1], ctx.causal)):
            share = kept[number] if kept else _shares(q, k, rows, seen, ctx.causal)
            d = dy[:, rows]
            dv[:, :seen].add_(torch.bmm(share.transpose(1, 2), d))
            d_share = torch.bmm(d, v[:, :seen].transpose(1, 2))
            d_score = torch.ops.aten._softmax_backward_data(d_share, share, -1, share.dtype)
            torch.bmm(d_score, k[:, :seen], out=dq[:, rows])
            dk[:, :seen].add_(torch.bmm(d_score.transpose(1, 2), q[:, rows]))
        return *((part.mul_(scale) if part is not dv else part).to(q.dtype).view(shape) for part in (dq, dk, dv)), None, None


def _blocks(length: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Blocks of queries, and how many keys each attends to."""
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        yield slice(start, stop), stop if causal else length


def _shares(q: Tensor, k: Tensor, rows: slice, seen: int, causal: bool) -> Tensor:
    """Attention weights of a block of queries, (B*H, block, seen)."""
    scores = torch.bmm(q[:, rows] * q.shape[-1] ** -0.5, k[:, :seen].transpose(1, 2))
    if causal:
        own = scores[..., rows.start:]
        own.add_(own.new_full(own.shape[1:], -torch.inf).triu_(1))
    return scores.softmax(-1)


class _PadInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        return x.index_select(0, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return dy.index_select(0, *ctx.saved_tensors), None, None


class _UnpadInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        ctx.slots = len(x)
        return x.index_select(0, scatter)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (slots,) = ctx.saved_tensors
        return dy.new_zeros(ctx.slots, *dy.shape[1:]).index_copy_(0, slots, dy), None


def _rows(query_weight: Tensor, key_weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    return torch.cat([query_weight.expand(heads, -1), key_weight.expand(kv_heads, -1)])


def _apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary_emb` with fewer passes."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., None, :], sin[..., None, :]
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y
