"""An engine that records the logits of its last step, for callers that want the confidence of an answer.

Shapes: B batch, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtx.inference.engine import Engine
from mmtx.sequence import Prompt


class OutputScores(Engine):
    """Wraps another engine without changing its choices, and records the logits (B, V) of each."""

    def __init__(self, engine: Engine):
        self.engine, self.static = engine, engine.static
        self.rows: Tensor | None = None

    @property
    def hidden(self) -> Tensor:  # type: ignore[override]  # set by the wrapped engine alone
        return self.engine.hidden

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        self.engine.prefill(prompts)
        self.rows = torch.arange(len(prompts))

    def step(self, ids: Tensor) -> None:
        self.engine.step(ids)

    def scores(self, first: int | None = None) -> Tensor:
        self.last: Tensor = self.engine.scores(first)
        self.of: Tensor = self.rows
        return self.last.clone()

    def best(self, allowed: Tensor) -> Tensor:
        self.scores(allowed.shape[1])
        return self.engine.best(allowed)  # not from these scores, so that the choice is the same as without them

    def keep(self, rows: Tensor) -> Engine:
        self.engine, self.rows = self.engine.keep(rows), self.rows[rows.cpu()]
        return self

    def row(self, number: int) -> Tensor:
        """The logits (V,) of the last step for one of the prompts."""
        return self.last[int((self.of == number).nonzero())]
