"""The reference engine: a full forward pass for each row and step, with no state but the ids."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmtx.inference.engine import Engine, pad
from mmtx.model import Decoder
from mmtx.sequence import Prompt


class ReferenceEngine(Engine):
    """Slow and simple: for tests, and to tell whether an answer is the model's or an engine's fault."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        self.rows = list(prompts)
        self.hidden = torch.cat([self._pass(row) for row in self.rows])

    def step(self, ids: Tensor) -> None:
        written = zip(self.rows, ids.tolist(), strict=True)
        self.prefill([row._replace(ids=np.append(row.ids, ident)) for row, ident in written])

    def scores(self, first: int | None = None) -> Tensor:
        return self.decoder.logits(self.hidden)[:, :first]

    def keep(self, rows: Tensor) -> "ReferenceEngine":
        self.rows, self.hidden = [self.rows[row] for row in rows.tolist()], self.hidden[rows]
        return self

    def _pass(self, row: Prompt) -> Tensor:
        ids, _, features = pad([row], self.decoder.embedding.weight.device)
        return self.decoder(ids, torch.arange(ids.shape[1], device=ids.device)[None], features=features)[:, -1]
