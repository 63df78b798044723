"""The torch engine: the network of `Decoder.forward` with a KV cache, for prompts, then one id per row at a time.

All rows write to the same slot of the cache, all state is in tensors on the device and updated in place, and on a GPU shapes
change only when the cache grows.

Shapes: B batch, T tokens, D width, H heads, G key-value heads, K head width.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtx.inference.cache import KVCache
from mmtx.inference.cached_attention import cache_dtype, decode_attention
from mmtx.inference.engine import Engine, pad
from mmtx.inference.weights import Scratch, Weights
from mmtx.model import Decoder
from mmtx.sequence import Prompt

TOKENS = 1024  # in one pass through the layers on a CPU
ROOM = 128  # slots for new ids in a new cache


class TorchEngine(Engine):
    """Any number of rows on any device."""

    def __init__(self, decoder: Decoder, weights: Weights, single_row: Callable[["TorchEngine"], Engine] | None = None):
        """`single_row` makes the engine that continues with the last row of a batch; by default it is this one."""
        self.decoder, self.weights, self.single_row = decoder, weights, single_row
        self.static = weights.output.is_cuda
        self._allowed: Tensor | None = None

    def prefill(self, prompts: Sequence[Prompt], room: int = ROOM) -> None:
        """Start with prompts, and with `room` for more ids before the cache grows.

        Prompts are padded on the right. Padding is masked, so each row gets what it would get alone.
        """
        weights, (ids, lengths, features) = self.weights, pad(prompts, self.weights.output.device)
        x = self.decoder.embed(ids, features)
        batch, length, _ = x.shape
        self._make_cache(lengths, length, length + room, x)
        self.scratch = Scratch.of(weights.config, batch, x)
        # A few rows at a time go through all layers, so that activations stay in the cache of a CPU.
        size = batch if self.static else TOKENS // length
        scratch = Scratch.of(weights.config, min(batch, size) * length or TOKENS, x)
        self.hidden = torch.cat([self._prefill(x[first:first + size], lengths[first:first + size], first, scratch)
                                 for first in range(0, batch, size)] if size else
                                [self._prefill_long(x[row], int(lengths[row]), row, scratch) for row in range(batch)])

    def _make_cache(self, lengths: Tensor, used: int, capacity: int, like: Tensor) -> None:
        """Make an empty cache for prompts of `lengths` (B,), the longest of which takes `used` slots."""
        self.cache = KVCache.of(self.weights.config, lengths, used, capacity, like, cache_dtype(like))

    def _prefill(self, x: Tensor, lengths: Tensor, first: int, scratch: Scratch) -> Tensor:
        """Prefill rows of the cache, from the `first` on, with inputs (B, T, D) -> the final hidden state of each."""
        weights, cache, (batch, length, _) = self.weights, self.cache, x.shape
        scratch, chosen = scratch.keep(batch * length), slice(first, first + batch)
        cos, sin = (each[:length, None].repeat(batch, 1, 1) for each in (cache.cos, cache.sin))    # (B*T, 1, K)
        rows = torch.arange(batch, device=x.device)
        last = rows * length + lengths - 1
        x = x.flatten(0, 1).clone()
        query, key, value = (each.unflatten(0, (batch, length)).transpose(1, 2)                    # (B, H | G, T, K)
                             for each in (scratch.query, scratch.key, scratch.value))
        layers = weights.layers_for(len(x))
        for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            layer.project(x, cos, sin, scratch)
            keys[chosen, :, :length], values[chosen, :, :length] = key, value
            if layer is layers[-1]:
                # Only the last token of each row is needed from here.
                x, scratch = x[last], self.scratch.keep(batch)
                y = decode_attention(query[rows, :, lengths - 1], key, value, self._mask(cache.seen[chosen, :length]))
            else:
                grouped = query.shape[1] != key.shape[1]
                y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
                y = y.transpose(1, 2).reshape(batch * length, -1)
            layer.finish(x, y, scratch)
        return weights.norm(x, scratch.length, torch.empty_like(x))

    def _prefill_long(self, x: Tensor, length: int, row: int, scratch: Scratch) -> Tensor:
        """Prefill one row of the cache with inputs (T, D), overwriting them, up to its `length` -> its final hidden state (1, D).

        Inputs, queries and attention outputs are held for all tokens. The rest is computed for TOKENS at a time: with the starter
        model it would take three times the memory of these and the cache together.
        """
        weights, (cos, sin) = self.weights, (each[:, None] for each in (self.cache.cos, self.cache.sin))   # (C, 1, K)
        x, pieces = x[:length], [slice(first, min(first + TOKENS, length)) for first in range(0, length, TOKENS)]
        query = x.new_empty(weights.config.heads, length, weights.config.head_dim, dtype=cache_dtype(x))      # (H, T, K)
        layers = weights.layers_for(length)
        for layer, keys, values in zip(layers, self.cache.keys, self.cache.values, strict=True):
            key, value = keys[row, :, :length], values[row, :, :length]                                    # (G, T, K)
            keys[row, :, length:self.cache.used] = values[row, :, length:self.cache.used] = 0  # masked, but read: no NaN
            for piece in pieces:
                s = scratch.keep(piece.stop - piece.start)
                layer.project(x[piece], cos[piece], sin[piece], s)
                for whole, part in ((query, s.query), (key, s.key), (value, s.value)):
                    whole[:, piece] = part.transpose(0, 1)
            if layer is layers[-1]:
                x, s = x[-1:], scratch.keep(1)
                layer.finish(x, decode_attention(query[None, :, -1], key[None], value[None], None).to(x.dtype), s)
            else:
                y = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True,
                                                   enable_gqa=len(query) != len(key))[0].to(x.dtype)
                for piece in pieces:
                    layer.finish(x[piece], y[:, piece].transpose(0, 1).flatten(1), scratch.keep(piece.stop - piece.start))
        return weights.norm(x, scratch.keep(1).length, torch.empty_like(x))

    def step(self, ids: Tensor) -> None:
        weights, cache = self.weights, self.cache
        if cache.used == cache.capacity:
            cache.grow()
        s, x = self.scratch, self.decoder.embedding(ids)
        cos, sin = (each.index_select(0, cache.positions)[:, None] for each in (cache.cos, cache.sin))
        cache.seen.index_fill_(1, cache.slot, True)
        # With static shapes, masked slots are read. Even a single row has padding if it is left from a batch.
        span = cache.capacity if self.static else cache.used + 1
        slot = cache.used
        mask = self._mask(cache.seen[:, :span])  # once for all layers
        for layer, keys, values in zip(weights.batch_layers, cache.keys, cache.values, strict=True):
            layer.project(x, cos, sin, s)
            keys[:, :, slot], values[:, :, slot] = s.key, s.value
            layer.finish(x, decode_attention(s.query, keys.narrow(2, 0, span), values.narrow(2, 0, span), mask), s)
        cache.used += 1
        cache.slot.add_(1)
        cache.positions.add_(1)
        self.hidden = weights.norm(x, s.length, torch.empty_like(x))

    def branch(self, ids: Tensor, depths: Tensor, before: Tensor) -> Tensor:
        """Final hidden states (T, D) of tokens that continue the only row in several ways at once, and do not stay in the cache.

        The tokens `ids` (T,) are those of a tree: `depths` (T,) are their distances from the end of the row, the first being 0, and
        `before` (T, T) bool marks which of them each one attends to, besides the row: its ancestors and itself.
        """
        weights, cache, x = self.weights, self.cache, self.decoder.embedding(ids)
        s, positions = Scratch.of(weights.config, len(ids), x), cache.positions + depths
        cos, sin = (each[positions][:, None] for each in (cache.cos, cache.sin))                           # (T, 1, K)
        mask = F.pad(before, (cache.used, 0), value=True)
        for layer, keys, values in zip(weights.layers_for(len(ids)), cache.keys, cache.values, strict=True):
            layer.project(x, cos, sin, s)
            query, key, value = (each.transpose(0, 1).to(keys.dtype) for each in (s.query, s.key, s.value))
            key, value = (torch.cat([row[0, :, :cache.used], new], 1) for row, new in ((keys, key), (values, value)))
            y = F.scaled_dot_product_attention(query[None], key[None], value[None], mask, enable_gqa=len(query) != len(key))[0]
            layer.finish(x, y.to(x.dtype).transpose(0, 1).flatten(1), s)
        return weights.norm(x, s.length, torch.empty_like(x))

    def _mask(self, seen: Tensor) -> Tensor:
        """The additive mask (B, 1, 1, T) for slots that hold a token of the row, `seen` (B, T)."""
        return torch.zeros_like(seen, dtype=self.cache.keys[0].dtype).masked_fill_(~seen, -torch.inf)[:, None, None]

    def scores(self, first: int | None = None) -> Tensor:
        return self.weights.scores(self.hidden, first)

    def best(self, allowed: Tensor) -> Tensor:
        screen = self.weights.screen(allowed.shape[1])
        if screen is None:
            return super().best(allowed)
        found = screen.best(self.weights.output.detach()[:allowed.shape[1]], self.hidden, self._forbidden(allowed))
        return super().best(allowed) if found is None else found

    def _forbidden(self, allowed: Tensor) -> np.ndarray:
        """0 where allowed, -inf elsewhere; cached for as long as the same tensor is passed."""
        if allowed is not self._allowed:
            self._allowed, self._forbids = allowed, np.where(allowed.numpy(), np.float32(0), np.float32(-np.inf))
        return self._forbids

    def keep(self, rows: Tensor) -> Engine:
        self.cache.keep(rows)
        self.hidden, self.scratch = self.hidden[rows], self.scratch.keep(len(rows))
        return self if self.single_row is None or len(rows) > 1 else self.single_row(self)
