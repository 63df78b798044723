"""What all engines do: take the prompts of a batch, then one more id a row at a time, and score the next.

Shapes: B batch, T tokens, D width, V vocabulary, N first ids.
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
    """A batch on its way through a decoder.

    Who owns what is the same for all engines. The state is the engine's own. What it is given it neither changes nor keeps,
    but for the weights. What `scores` and `best` return is the caller's, who may change it.
    """

    hidden: Tensor         # (B, D) last hidden states, until the next call of `prefill`, `step` or `keep`
    static: bool = False   # shapes stay as they are, as a GPU likes it, and a look at values waits for the device

    @abstractmethod
    def prefill(self, prompts: Sequence[Prompt]) -> None:
        """Begin with prompts of any lengths."""

    @abstractmethod
    def step(self, ids: Tensor) -> None:
        """Feed one more id a row (B,)."""

    @abstractmethod
    def scores(self, first: int | None = None) -> Tensor:
        """Scores of the next id, of all or the `first` of them (B, V | N)."""

    def best(self, allowed: Tensor) -> Tensor:
        """The best among the first ids that are allowed (B, N) -> (B,).

        A tensor that is given again must hold the same values: what was made of it may be used again.
        """
        return self.scores(allowed.shape[1]).masked_fill_(~allowed, -torch.inf).argmax(-1)

    def choose(self, choice: ChooseNext, state: GrammarState, draws: Tensor | None = None) -> tuple[Tensor, GrammarState]:
        """The next id of each row (B,) and where the grammar then stands, both good until the next call.

        `choice` is a function of an engine, the state and random numbers, and equal to another where it does the same.
        """
        return choice(self, state, draws)

    @abstractmethod
    def keep(self, rows: Tensor) -> "Engine":
        """Only some rows, in ascending order, from now on -> the engine that goes on with them; this one has ended."""


def pad(prompts: Sequence[Prompt], device: torch.device, length: int | None = None) -> tuple[Tensor, Tensor, dict[str, Features]]:
    """Prompts, padded on the right to the longest or to `length` -> their ids (B, T), lengths (B,) and features on a device."""
    lengths = [len(prompt.ids) for prompt in prompts]
    longest = length or max(lengths)
    ids = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[:len(prompt.ids)] = prompt.ids
    features = gather_features((row * longest, prompt.spans) for row, prompt in enumerate(prompts))
    features = {kind: given.to(device) for kind, given in features.items()}
    return torch.from_numpy(ids).to(device), torch.tensor(lengths, device=device), features
