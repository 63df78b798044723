"""Classifier-free guidance: an engine that scores each prompt with and without its user turns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtx.grammar import GrammarState
from mmtx.inference.engine import ChooseNext, Engine
from mmtx.sequence import Prompt, in_user_turns
from mmtx.vocabulary import Vocabulary


class Guided(Engine):
    """Logits of prompts, moved away from those of the same prompts without their user turns.

    It runs another engine on twice as many rows: the prompts, then the same prompts with empty user turns.
    """

    def __init__(self, engine: Engine, guidance_scale: float, vocabulary: Vocabulary):
        self.engine, self.guidance_scale, self.vocabulary = engine, guidance_scale, vocabulary
        self.static = engine.static

    @property
    def hidden(self) -> Tensor:  # type: ignore[override]  # set by the wrapped engine alone
        """Hidden states of the prompts, then of the same without user turns (2B, D)."""
        return self.engine.hidden

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        self.engine.prefill([*prompts, *(without_user_turns(prompt, self.vocabulary) for prompt in prompts)])

    def step(self, ids: Tensor) -> None:
        self.engine.step(ids.repeat(2))

    def scores(self, first: int | None = None) -> Tensor:
        return guide(self.engine.scores(first), self.guidance_scale)

    def choose(self, choice: ChooseNext, state: GrammarState, draws: Tensor | None = None) -> tuple[Tensor, GrammarState]:
        return self.engine.choose(GuidedChoice(choice, self.guidance_scale, self.vocabulary), state, draws)

    def keep(self, rows: Tensor) -> Engine:
        self.engine = self.engine.keep(torch.cat([rows, rows + len(self.hidden) // 2]))
        return self


@dataclass(frozen=True)
class GuidedChoice:
    """A choice from the logits of another engine, with guidance."""

    choice: ChooseNext
    guidance_scale: float
    vocabulary: Vocabulary

    def __call__(self, engine: Engine, state: GrammarState, draws: Tensor | None) -> tuple[Tensor, GrammarState]:
        return self.choice(Guided(engine, self.guidance_scale, self.vocabulary), state, draws)


def guide(logits: Tensor, guidance_scale: float) -> Tensor:
    """Logits of B prompts, then of the same without their user turns (2B, V) -> guided logits (B, V).

    Classifier-free guidance (https://arxiv.org/abs/2207.12598), as Parti (https://arxiv.org/abs/2206.10789) uses it for
    pictures as codes.
    """
    asked, unasked = logits.float().chunk(2)
    return unasked + min(guidance_scale, 1e30) * (asked - unasked)   # beyond it could be inf - inf


def without_user_turns(prompt: Prompt, vocabulary: Vocabulary) -> Prompt:
    """The prompt with its user turns emptied: <user> <end>."""
    return Prompt(prompt.ids[~in_user_turns(prompt.ids, vocabulary)])
