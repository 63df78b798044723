"""The GPU engine: the torch engine with decode steps that are captured once as CUDA graphs and replayed.

Shapes: B batch, C capacity.
"""

import weakref
from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor

from mmtx.grammar import GrammarState
from mmtx.inference.cache import KVCache
from mmtx.inference.captured import Captured
from mmtx.inference.engine import ChooseNext, Engine, pad
from mmtx.inference.static_step import static_prompts, torch_step
from mmtx.inference.torch_engine import ROOM, TorchEngine
from mmtx.inference.weights import Weights
from mmtx.model import Decoder
from mmtx.sequence import Prompt

MakeStep = Callable[[Decoder, Weights, KVCache], Callable[[Tensor], Tensor]]
MOST_CHOICES = 16  # captured choices held per cache
FEW_TOKENS = 2048  # of prompts whose prefill is captured, padded to a power of two; larger ones are bound by computation
LEAST = 16  # tokens of a captured prefill
SMALLEST = 256  # slots of a cache; larger ones have a power of two, so that prompts of other lengths can reuse captured steps


class GraphEngine(TorchEngine):
    """Any number of rows on a GPU. On a CPU it does the same without graphs, for tests.

    Its cache and captured step are passed on to the next engine with as many rows, through `Weights.kept`.
    """

    def __init__(self, decoder: Decoder, weights: Weights, make_step: MakeStep = torch_step, capture_all: bool = True):
        """`make_step` makes the function that feeds ids (B,), updates a cache in place and returns hidden states.

        With `capture_all`, prefill and the choice of the next id are captured as well as the steps.
        """
        super().__init__(decoder, weights)
        self.make_step, self.static, self.capture_all = make_step, True, capture_all
        self.source: Captured | None = None         # of the hidden states
        self._lease: weakref.finalize | None = None
        self._outgrown: weakref.finalize | None = None

    def prefill(self, prompts: Sequence[Prompt], room: int = ROOM) -> None:
        longest = max(len(prompt.ids) for prompt in prompts)
        length = max(LEAST, 1 << (longest - 1).bit_length())
        if not self.capture_all or len(prompts) * length > FEW_TOKENS:
            self.source = None
            return super().prefill(prompts, room)
        ids, lengths, features = pad(prompts, self.weights.output.device, length)
        x = self.decoder.embed(ids, features)
        self._make_cache(lengths, longest, longest + room, x)
        if length not in self.prompts:
            weights, tensors = self.weights, self.cache.tensors()
            self.prompts[length] = Captured(
                lambda x, lengths: static_prompts(weights.config, weights.layers, weights.norm, x, lengths, tensors),
                torch.empty_like(x), torch.empty_like(lengths))
        self.source = self.prompts[length]
        self.hidden = self.source(x, lengths)

    def _make_cache(self, lengths: Tensor, used: int, capacity: int, like: Tensor) -> None:
        if self._lease is not None:
            self._lease()
        self._take(lengths, used, capacity, like)

    def _take(self, lengths: Tensor, used: int, capacity: int, like: Tensor) -> None:
        """Take an empty cache with its captured step, choices and prefills: a kept one if possible, else a new one."""
        capacity = max(SMALLEST, 1 << (capacity - 1).bit_length())
        shape = len(lengths), capacity, self.make_step
        found = self.weights.kept.take(shape)
        if found is None:
            cache = KVCache.of(self.weights.config, lengths, used, capacity, like)
            found = cache, self._capture(cache), {}, {}
        self.cache: KVCache = found[0]
        self.captured: Captured = found[1]
        self.choices: dict[tuple, Captured] = found[2]
        self.prompts: dict[int, Captured] = found[3]
        self.cache.restart(lengths, used)
        self._lease = weakref.finalize(self, self.weights.kept.give, shape, self.cache.size, found)
        self._lease.atexit = False

    def _capture(self, cache: KVCache) -> Captured:
        return Captured(self.make_step(self.decoder, self.weights, cache), torch.zeros_like(cache.positions))

    def step(self, ids: Tensor) -> None:
        if self._outgrown is not None:
            self._outgrown()
            self._outgrown = None
        if self.cache.used == self.cache.capacity:
            # The old one is given back at the next step: until then the grammar's state may be in memory of its choices.
            before, self._outgrown = self.cache, self._lease
            self._take(before.positions, before.used, 2 * before.capacity, before.keys[0])
            self.cache.copy_(before)
        self.hidden, self.source = self.captured(ids), self.captured
        self.cache.used += 1

    def choose(self, choice: ChooseNext, state: GrammarState, draws: Tensor | None = None) -> tuple[Tensor, GrammarState]:
        if not self.capture_all or self.source is None or not self.source.settled:
            return choice(self, state, draws)
        given = [each for each in (*state, draws) if each is not None]
        key = self.source, choice, len(given), draws is None
        if key not in self.choices:
            if len(self.choices) == MOST_CHOICES:
                self.choices.clear()
            self.choices[key] = self._capture_choice(choice, given, draws is not None)
        captured = self.choices[key]
        ids = captured(*given)
        return ids, GrammarState(*captured.inputs[:len(given) - (draws is not None)])

    def _capture_choice(self, choice: ChooseNext, given: list[Tensor], draws: bool) -> Captured:
        """A captured choice: it outlives this engine, so it must not hold it, only a copy of its present state."""
        engine = copy(self)

        def run(*inputs: Tensor) -> Tensor:
            state = inputs[:len(inputs) - draws]
            ids, after = choice(engine, GrammarState(*state), inputs[-1] if draws else None)
            for mine, new in zip(state, after):
                mine.copy_(new)
            feeds = engine.captured.inputs[0]
            return feeds.copy_(ids) if len(feeds) == len(ids) else ids

        return Captured(run, *(each.clone() for each in given))

    def keep(self, rows: Tensor) -> Engine:
        self._lease.detach()  # no other batch can use what is left of the cache
        self.cache.keep(rows)
        self.hidden, self.source = self.hidden[rows], None
        self.captured, self.choices = self._capture(self.cache), {}
        return self
