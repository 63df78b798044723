"""Decoding with a cache: the network of `Decoder.forward` once more, for prompts and then for one token a row at a time.

At batch 1 the time of a step is that of reading the weights and of starting operations, so there are as few of these as
can be: no modules, a norm in four operations, one slot of the cache for all rows, and every result goes to a place that
was made before. All state lies in tensors on the device and is changed in place, and on a GPU no shape changes from step
to step but where the cache grows. Tests compare it with full passes.

Shapes: B batch, T tokens, N tokens of all rows, D width, H heads, G key-value heads, K head width, C capacity of the
cache, R rows of the embedding, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtx.layers import rotary
from mmtx.model import Decoder, DecoderConfig


TOKENS = 1024  # that go through the layers together on a CPU
ROOM = 512  # slots for new tokens that a cache starts with


def precise(like: Tensor) -> torch.dtype:
    """The type in which lengths are computed."""
    return torch.promote_types(like.dtype, torch.float32)


class Norm(NamedTuple):
    """RMSNorm over the last n numbers, as x / hypot(|x|, floor) * weight: half the operations of torch's on a CPU."""

    weight: Tensor  # sqrt(n) times the norm's weight, float32 at least
    floor: Tensor   # sqrt(n * eps), ()

    @classmethod
    def of(cls, weight: Tensor, eps: float) -> "Norm":
        weight, n = weight.to(precise(weight)), weight.shape[-1]
        return cls(weight * n ** 0.5, weight.new_tensor((n * eps) ** 0.5))

    def __call__(self, x: Tensor, length: Tensor, out: Tensor) -> Tensor:
        torch.linalg.vector_norm(x, 2, -1, True, dtype=length.dtype, out=length)
        return torch.div(x, torch.hypot(length, self.floor, out=length), out=out).mul_(self.weight)


class Scratch(NamedTuple):
    """Where the operations on N tokens put what they make, and the views of it that they need."""

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
        qkv = like.new_empty(tokens, (turning + c.kv_heads) * c.head_width)
        heads = qkv.view(tokens, -1, c.head_width)
        turned, swapped = (like.new_empty(tokens, turning, c.head_width) for _ in range(2))
        low, high = turned.chunk(2, dim=-1)
        gate_up = like.new_empty(tokens, 2 * c.hidden)
        return cls(
            like.new_empty(tokens, c.width), like.new_empty(tokens, 1, dtype=precise(like)),
            qkv, heads[:, :turning], heads[:, turning:], like.new_empty(tokens, turning, 1, dtype=precise(like)),
            turned, turned[:, :c.heads], turned[:, c.heads:], high, low, swapped, gate_up, *gate_up.chunk(2, dim=1))

    def keep(self, tokens: int) -> "Scratch":
        """The scratch of fewer tokens."""
        return Scratch(*(each[:tokens] for each in self))


class Layer(NamedTuple):
    """The weights of one block."""

    attention_norm: Norm
    qkv: Tensor             # (D, (H + 2G) * K)
    head_norm: Norm         # weight (H + G, K)
    out: Tensor             # (H * K, D)
    feed_forward_norm: Norm
    gate_up: Tensor         # (D, 2 * hidden)
    down: Tensor            # (hidden, D)

    @classmethod
    def of(cls, block: nn.Module, config: DecoderConfig) -> "Layer":
        attention, feed_forward, eps = block.attention, block.feed_forward, config.norm_eps
        heads = torch.cat([attention.query_norm.weight.expand(config.heads, -1),
                           attention.key_norm.weight.expand(config.kv_heads, -1)])
        return cls(
            Norm.of(block.attention_norm.weight, eps), attention.qkv.weight.T, Norm.of(heads, eps),
            attention.out.weight.T, Norm.of(block.feed_forward_norm.weight, eps), feed_forward.gate_up.weight.T,
            feed_forward.down.weight.T)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, s: Scratch) -> None:
        """Tokens (N, D) and their angles (N, 1, K) -> queries, keys and values in the scratch."""
        torch.mm(self.attention_norm(x, s.length, s.normed), self.qkv, out=s.qkv)
        self.head_norm(s.raw, s.head_length, s.turned)
        torch.cat((s.high, s.low), dim=-1, out=s.swapped)
        s.turned.mul_(cos).addcmul_(s.swapped, sin)

    def finish(self, x: Tensor, y: Tensor, s: Scratch) -> None:
        """Tokens (N, D) and what their heads found, (N, H * K) -> tokens for the next layer, in place."""
        x.addmm_(y, self.out)
        torch.mm(self.feed_forward_norm(x, s.length, s.normed), self.gate_up, out=s.gate_up)
        x.addmm_(F.silu(s.gate, inplace=True).mul_(s.up), self.down)


class Weights(NamedTuple):
    """The weights of a decoder as decoding reads them: views of its parameters, but for the norms."""

    config: DecoderConfig
    layers: tuple[Layer, ...]
    norm: Norm
    output: Tensor                        # (R, D)
    groups: tuple[tuple[int, ...], ...]   # sizes of runs of rows: plain ids, then the digits of each composed range
    screens: dict | None                  # what `row.Screen` made of first rows; none where values may still change

    @classmethod
    def of(cls, decoder: Decoder, fixed: bool = False) -> "Weights":
        """Of a decoder; `fixed` promises that its values will not change while these weights are used."""
        c, table = decoder.config, decoder.output or decoder.embedding
        return cls(c, tuple(Layer.of(block, c) for block in decoder.blocks), Norm.of(decoder.norm.weight, c.norm_eps),
                   table.weight, table.groups, {} if fixed else None)

    @property
    def plain(self) -> int:
        """How many ids, from the first, have a row of their own."""
        return self.groups[0][0]

    def scores(self, hidden: Tensor, first: int | None = None) -> Tensor:
        """Hidden states (B, D) -> scores of every id (B, V), or only of the `first`, which have rows of their own.

        The score of a composed id is the sum of the scores of its digits: no matrix of its range is needed.
        """
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
        return torch.cat(scores, dim=1)


@dataclass
class KVCache:
    """Keys and values of a batch. A step writes all rows at the same slot, though their positions may differ.

    It doubles when it is full, so that its memory follows what is written and not what may be.
    """

    config: DecoderConfig
    keys: list[Tensor]             # one a layer, (B, G, C, K)
    values: list[Tensor]           # the same
    seen: Tensor                   # (B, C) bool: slots that hold a token of the row, not padding
    used: int                      # slots that are taken, so where the next tokens go
    slot: Tensor                   # (1,) the same number on the device
    positions: Tensor              # (B,) of the next tokens
    cos: Tensor                    # (C, K) of the rotary angles at each position
    sin: Tensor                    # (C, K), negative in the lower half
    scratch: Scratch               # of B tokens

    @classmethod
    def of(cls, config: DecoderConfig, lengths: Tensor, used: int, capacity: int, like: Tensor) -> "KVCache":
        """A cache of prompts of `lengths` (B,), whose keys and values are still to be written, up to slot `used`."""
        c, batch, device = config, len(lengths), like.device
        shape = batch, c.kv_heads, capacity, c.head_width
        return cls(
            c, *([_empty(like, shape) for _ in range(c.depth)] for _ in range(2)),
            torch.arange(capacity, device=device) < lengths[:, None], used, torch.tensor([used], device=device),
            lengths.clone(), *_angles(c, capacity, like), Scratch.of(c, batch, like))

    @property
    def capacity(self) -> int:
        return self.seen.shape[1]

    def grow(self) -> None:
        """Twice the room."""
        more = self.capacity
        for tensors in (self.keys, self.values):
            for layer, each in enumerate(tensors):
                tensors[layer] = _empty(each, (*each.shape[:2], 2 * more, each.shape[3]))
                tensors[layer][:, :, :self.used] = each[:, :, :self.used]
        self.seen = F.pad(self.seen, (0, more))
        self.cos, self.sin = _angles(self.config, 2 * more, self.keys[0])

    def keep(self, rows: Tensor) -> "KVCache":
        """Only some rows, in ascending order, from now on."""
        used = self.used
        for tensors in (self.keys, self.values):
            for layer, each in enumerate(tensors):
                each[:len(rows), :, :used] = each[rows, :, :used]
                tensors[layer] = each[:len(rows)]
        self.seen, self.positions, self.scratch = self.seen[rows], self.positions[rows], self.scratch.keep(len(rows))
        return self

    def close_gaps(self) -> None:
        """Take the padding out of a cache of one row: what comes out of a batch lies as if it had always been alone."""
        chosen = self.seen[0, :self.used].nonzero()[:, 0]
        if len(chosen) < self.used:
            for each in (*self.keys, *self.values):
                each[:, :, :len(chosen)] = each[:, :, chosen]
            self.seen[:, len(chosen):] = False
            self.seen[:, :len(chosen)] = True
            self.used = len(chosen)
            self.slot.fill_(self.used)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Slots that no row has reached: they are read on a GPU, where the masked ones must not be NaN."""
    return like.new_zeros(shape) if like.is_cuda else like.new_empty(shape)


def _angles(config: DecoderConfig, capacity: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `rotary`, the latter negative in the lower half, so that the halves can be swapped as they are."""
    cos, sin = rotary(torch.arange(capacity, device=like.device), config.head_width, config.rope_theta)
    sin[:, :config.head_width // 2] *= -1
    return cos.to(like.dtype), sin.to(like.dtype)


def prefill(weights: Weights, x: Tensor, lengths: Tensor, room: int = ROOM) -> tuple[Tensor, KVCache]:
    """Feed rows of inputs (B, T, D), of which `lengths` (B,) are real -> the last hidden state of each (B, D) and a cache,
    which has `room` for more tokens before it grows.

    Rows are padded on the right. Padding is never seen: each row gets what it would get alone.
    """
    batch, length, _ = x.shape
    cache = KVCache.of(weights.config, lengths, length, length + room, x)
    # A few rows at a time go through all layers, so that what the operations make stays in the cache of a CPU.
    size = batch if x.is_cuda else max(1, TOKENS // length)
    scratch = Scratch.of(weights.config, min(batch, size) * length, x)
    hidden = [_prefill(weights, x[first:first + size], lengths[first:first + size], cache, first, scratch)
              for first in range(0, batch, size)]
    return torch.cat(hidden), cache


def _prefill(weights: Weights, x: Tensor, lengths: Tensor, cache: KVCache, first: int, scratch: Scratch) -> Tensor:
    """Feed inputs of the cache's rows from the `first` on -> the last hidden state of each."""
    c, (batch, length, _) = weights.config, x.shape
    scratch, chosen = scratch.keep(batch * length), slice(first, first + batch)
    cos, sin = (each[:length, None].repeat(batch, 1, 1) for each in (cache.cos, cache.sin))    # (B*T, 1, K)
    rows = torch.arange(batch, device=x.device)
    last = rows * length + lengths - 1
    x = x.flatten(0, 1).clone()
    query, key, value = (each.unflatten(0, (batch, length)).transpose(1, 2)                    # (B, H | G, T, K)
                         for each in (scratch.query, scratch.key, scratch.value))
    for layer, keys, values in zip(weights.layers, cache.keys, cache.values, strict=True):
        layer.project(x, cos, sin, scratch)
        keys[chosen, :, :length], values[chosen, :, :length] = key, value
        if layer is weights.layers[-1]:
            # Nobody reads the other tokens any more.
            x, scratch = x[last], cache.scratch.keep(batch)
            y = attend(query[rows, :, lengths - 1], key, value, cache.seen[chosen, None, None, :length])
        else:
            grouped = c.heads != c.kv_heads
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
            y = y.transpose(1, 2).reshape(batch * length, -1)
        layer.finish(x, y, scratch)
    return weights.norm(x, scratch.length, torch.empty_like(x))


def step(weights: Weights, x: Tensor, cache: KVCache) -> Tensor:
    """Feed one more token a row, as inputs (B, D) -> hidden states (B, D); inputs and cache change in place."""
    if cache.used == cache.capacity:
        cache.grow()
    s = cache.scratch
    cos, sin = (each.index_select(0, cache.positions)[:, None] for each in (cache.cos, cache.sin))
    key, value = s.key[:, :, None], s.value[:, :, None]
    cache.seen.index_fill_(1, cache.slot, True)
    # On a GPU shapes stay as they are, and masked slots are read. One row, too, has padding where it comes out of a batch.
    span = cache.capacity if x.is_cuda else cache.used + 1
    mask = cache.seen[:, None, None, :span]
    for layer, keys, values in zip(weights.layers, cache.keys, cache.values, strict=True):
        layer.project(x, cos, sin, s)
        keys.index_copy_(2, cache.slot, key)
        values.index_copy_(2, cache.slot, value)
        layer.finish(x, attend(s.query, keys.narrow(2, 0, span), values.narrow(2, 0, span), mask), s)
    cache.used += 1
    cache.slot.add_(1)
    cache.positions.add_(1)
    return weights.norm(x, s.length, torch.empty_like(x))


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One query a row (B, H, K) over keys and values (B, G, T, K), mask (B, 1, 1, T) -> what it found (B, H * K)."""
    # The queries of a group share keys and values: they take the place of tokens.
    query = query.unflatten(1, (keys.shape[1], -1))                                            # (B, G, H / G, K)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask).flatten(1)
