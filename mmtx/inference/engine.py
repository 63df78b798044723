"""The interface of all engines: prefill the prompts of a batch, feed one more id per row at a time, and score the next.

Shapes: B batch, T tokens, D width, V vocabulary, N leading ids.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmtx.embedding import Features
from mmtx.grammar import GrammarState
from mmtx.sequence import Prompt, gather_features

ChooseNext = Callable[["Engine", GrammarState, Tensor | None], tuple[Tensor, GrammarState]]


class Engine(ABC):
    """A batch that a decoder generates from.

    Ownership is the same for all engines. An engine owns its state; its arguments, except for the weights, it neither changes
    nor keeps. The caller owns what `scores` and `best` return, and may change it.
    """

    hidden: Tensor         # (B, D) final hidden states, until the next call of `prefill`, `step` or `keep`
    static: bool = False   # shapes do not change from step to step, and reading values synchronises with the device

    @abstractmethod
    def prefill(self, prompts: Sequence[Prompt]) -> None:
        """Start with prompts of any lengths."""

    @abstractmethod
    def step(self, ids: Tensor) -> None:
        """Feed one more id per row (B,)."""

    @abstractmethod
    def scores(self, first: int | None = None) -> Tensor:
        """Logits of the next id (B, V), or of only the `first` N ids (B, N)."""

    def best(self, allowed: Tensor) -> Tensor:
        """The best id of each row (B,) among those of the first N ids that are `allowed` (B, N).

        A tensor that is passed again must hold the same values: results derived from it may be cached.
        """
        return self.scores(allowed.shape[1]).masked_fill_(~allowed, -torch.inf).argmax(-1)

    def choose(self, choice: ChooseNext, state: GrammarState, draws: Tensor | None = None) -> tuple[Tensor, GrammarState]:
        """The next id of each row (B,) and the state of the grammar after it, both valid until the next call.

        `choice` is a function of an engine, the state and random numbers, which compares equal to any that does the same.
        """
        return choice(self, state, draws)

    @abstractmethod
    def keep(self, rows: Tensor) -> "Engine":
        """Keep only some rows, in ascending order -> the engine that continues with them and replaces this one."""


def pad(prompts: Sequence[Prompt], device: torch.device, length: int | None = None) -> tuple[Tensor, Tensor, dict[str, Features]]:
    """Prompts, right-padded to the longest or to `length` -> their ids (B, T), lengths (B,) and features on a device."""
    lengths = [len(prompt.ids) for prompt in prompts]
    longest = length or max(lengths)
    ids = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[:len(prompt.ids)] = prompt.ids
    features = gather_features((row * longest, prompt.spans) for row, prompt in enumerate(prompts))
    features = {kind: given.to(device) for kind, given in features.items()}
    return torch.from_numpy(ids).to(device), torch.tensor(lengths, device=device), features
