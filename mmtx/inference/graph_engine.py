"""The engine of a GPU: that of torch, with steps that are captured once and played back.

Shapes: B batch, C capacity.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from mmtx.inference.cache import KVCache
from mmtx.inference.captured import CapturedStep
from mmtx.inference.engine import Engine
from mmtx.inference.static_step import torch_step
from mmtx.inference.torch_engine import TorchEngine
from mmtx.inference.weights import Weights
from mmtx.model import Decoder

MakeStep = Callable[[Decoder, Weights, KVCache], Callable[[Tensor], Tensor]]
SMALLEST = 256  # slots of a cache; larger ones have powers of two, so that prompts of other lengths find them captured


class GraphEngine(TorchEngine):
    """Any number of rows on a GPU. Elsewhere it does the same without graphs, which tests make use of.

    Its cache and the captured step go to the next engine of as many rows, through `Weights.kept`.
    """

    def __init__(self, decoder: Decoder, weights: Weights, make_step: MakeStep = torch_step):
        """`make_step` gives the function of ids (B,) that feeds them, changes a cache in place and returns hidden states."""
        super().__init__(decoder, weights)
        self.make_step, self.static = make_step, True
        self._lease: weakref.finalize | None = None

    def _make_cache(self, lengths: Tensor, used: int, capacity: int, like: Tensor) -> None:
        self._give_back()
        self._take(lengths, used, capacity, like)

    def _take(self, lengths: Tensor, used: int, capacity: int, like: Tensor) -> None:
        """An empty cache with its step: one that is kept, or a new one."""
        capacity = max(SMALLEST, 1 << (capacity - 1).bit_length())
        shape = len(lengths), capacity, self.make_step
        found = self.weights.kept.take(shape)
        if found is None:
            cache = KVCache.of(self.weights.config, lengths, used, capacity, like)
            found = cache, self._capture(cache)
        self.cache: KVCache = found[0]
        self.captured: CapturedStep = found[1]
        self.cache.restart(lengths, used)
        self._lease = weakref.finalize(self, self.weights.kept.give, shape, self.cache.size, found)
        self._lease.atexit = False

    def _capture(self, cache: KVCache) -> CapturedStep:
        return CapturedStep(self.make_step(self.decoder, self.weights, cache), torch.zeros_like(cache.positions))

    def _give_back(self) -> None:
        if self._lease is not None:
            self._lease()

    def step(self, ids: Tensor) -> None:
        if self.cache.used == self.cache.capacity:
            before, lease = self.cache, self._lease
            self._take(before.positions, before.used, 2 * before.capacity, before.keys[0])
            self.cache.copy_(before)
            lease()
        self.hidden = self.captured(ids)
        self.cache.used += 1

    def keep(self, rows: Tensor) -> Engine:
        self._lease.detach()  # what is left of the cache fits no other batch
        super().keep(rows)
        self.captured = self._capture(self.cache)
        return self
