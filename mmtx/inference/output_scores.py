"""An engine that remembers the scores of its last step, for those who ask how sure an answer is.

Shapes: B batch, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtx.inference.engine import Engine
from mmtx.sequence import Prompt


class OutputScores(Engine):
    """Another engine, whose choices stay as they are, and the scores (B, V) that each came from."""

    def __init__(self, engine: Engine):
        self.engine, self.static = engine, engine.static
        self.rows: Tensor | None = None

    @property
    def hidden(self) -> Tensor:  # type: ignore[override]  # those of an engine are read, never set from outside
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
        return self.engine.best(allowed)  # and not of these scores: the choice is that of an answer without them

    def keep(self, rows: Tensor) -> Engine:
        self.engine, self.rows = self.engine.keep(rows), self.rows[rows.cpu()]
        return self

    def row(self, number: int) -> Tensor:
        """The scores of the last step of one of the prompts (V,)."""
        return self.last[int((self.of == number).nonzero())]
