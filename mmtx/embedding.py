"""Inputs of the decoder: the embedding table, in which codes of a scalar quantizer can share rows, and features of media.

Shapes: B batch, T tokens, D width, V vocabulary.

Most ids have an embedding row of their own. The embedding of a scalar quantizer's code can instead be the sum of the rows
of its digits, so that a code never seen in training has a meaning.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmtx.config import DecoderConfig


class Features(NamedTuple):
    """Features that replace the codes of one kind of media in a batch; a token has `merge` rows and columns of them, side by side."""

    places: Tensor  # (n,) indices into the B*T flattened tokens
    values: Tensor  # (n, D), or patches (n, P) for a decoder with encoders; merged, D and P are those of all together
    grids: tuple[tuple[int, int], ...] = ()  # rows and columns of tokens of each picture or sound, in order
    merge: tuple[int, int] = (1, 1)

    def to(self, device: torch.device) -> "Features":
        return self._replace(places=self.places.to(device), values=self.values.to(device))

    def encoded(self, encoder: Callable[[Tensor, Sequence[tuple[int, int]]], Tensor]) -> Tensor:
        """The features (n, D) that an encoder makes of patches; it sees each picture or sound as a grid of single patches."""
        rows, columns = self.merge
        if self.merge == (1, 1):
            return encoder(self.values, self.grids)
        # For each patch of the tokens, one after the other: its index in the grids, row by row.
        order = torch.cat([index + first for index, first in zip(
            (_merged_order(*grid, rows, columns) for grid in self.grids),
            accumulate((h * w * rows * columns for h, w in self.grids), initial=0))])
        there = lambda places: places.to(self.values.device, non_blocking=True)
        patches = self.values.unflatten(1, (rows * columns, -1)).flatten(0, 1)[there(order.argsort())]
        found = encoder(patches, [(h * rows, w * columns) for h, w in self.grids])
        return found[there(order)].unflatten(0, (-1, rows * columns)).flatten(1)


@lru_cache(1024)
def _merged_order(h: int, w: int, rows: int, columns: int) -> Tensor:
    """The patches (h*rows * w*columns,) of a grid of h x w tokens, token by token."""
    return torch.arange(h * w * rows * columns).view(h, rows, w, columns).transpose(1, 2).flatten()


class NewRows(nn.Module):
    """A parametrization that trains a table's rows from `first` on; the others stay frozen."""

    def __init__(self, table: Tensor, first: int):
        super().__init__()
        self.first, self.rows = first, nn.Parameter(table[first:].detach().clone())

    def forward(self, table: Tensor) -> Tensor:
        return torch.cat([table[:self.first], self.rows])


class TokenEmbedding(nn.Module):
    """One table: a row for each plain id, then a row for each digit value of each composed range."""

    parts: Tensor  # (V, digits) table rows whose sum is the embedding of each id
    basis: Tensor  # (composed ids, digit rows)

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.plain = config.plain_rows
        rows = self.plain + sum(sum(r.levels) for r in config.composed)
        self.weight = nn.Parameter(torch.empty(rows, config.width))
        longest = max((len(r.levels) for r in config.composed), default=1)
        # In `parts` the index `rows` stands for no row.
        parts = torch.full((config.vocabulary_size, longest), rows)
        parts[:self.plain, 0] = torch.arange(self.plain)
        first = self.plain
        for r in config.composed:
            codes, step = torch.arange(r.stop - r.start), 1
            for place, level in enumerate(r.levels):
                parts[r.start:r.stop, place] = first + codes // step % level
                step, first = step * level, first + level
        # Layout of the rows: those of the plain ids, then those of each digit of each range.
        self.groups = ((self.plain,), *(r.levels for r in config.composed))
        self.register_buffer("parts", parts, persistent=False)
        self.register_buffer("basis", self._basis(rows), persistent=False)

    def _basis(self, rows: int) -> Tensor:
        """0/1 matrix (composed ids, digit rows): a product with it is much faster than gathering the rows of all ids."""
        parts = self.parts[self.plain:] - self.plain
        basis = torch.zeros(len(parts), rows - self.plain + 1)
        return basis.scatter_(1, parts, 1.0)[:, :-1].contiguous()

    def train_rows(self, first: int) -> None:
        """Train the rows from `first` on and freeze the others."""
        parametrize.register_parametrization(self, "weight", NewRows(self.weight, first))
        cast(Any, self.parametrizations).weight.original.requires_grad_(False)

    def new_rows(self) -> NewRows | None:
        """The trained rows if only some rows train, else None."""
        return cast(Any, self.parametrizations).weight[0] if parametrize.is_parametrized(self) else None

    def tables(self) -> tuple[Tensor, ...]:
        """The table as consecutive runs of rows, each trained or frozen as a whole.

        Concatenating them would take as much memory again, and gradients of frozen rows more still.
        """
        if (new := self.new_rows()) is None:
            return (self.weight,)
        return cast(Any, self.parametrizations).weight.original[:new.first], new.rows

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> embeddings (B, T, D)."""
        new = self.new_rows()
        if new is None and not len(self.basis):
            return F.embedding(ids, self.weight)
        # The rows of plain ids are looked up without a copy, since they may be many; digit rows and new rows are few.
        first = self.plain if new is None else new.first
        table, rows = (self.weight, self.weight[first:]) if new is None else self.tables()
        summed = F.embedding((self.parts[ids] - first).clamp_min(0), F.pad(rows, (0, 0, 0, 1))).sum(-2)
        return torch.where((ids < first)[..., None], F.embedding(ids.clamp_max(first - 1), table), summed)

    def matrix(self, plain: bool = False) -> Tensor:
        """The embedding of every id (V, D), or with `plain` only of those before the composed ranges."""
        return self.weight[:self.plain] if plain and len(self.basis) else self._composed(self.weight, self.plain)

    def new_matrix(self) -> Tensor:
        """If only some rows train: the embedding of every id from the first trained row on, (V - first, D)."""
        new = cast(NewRows, self.new_rows())
        return self._composed(new.rows, self.plain - new.first)

    def _composed(self, rows: Tensor, plain: int) -> Tensor:
        """Rows of `plain` ids and of all digits (plain + digit rows, D) -> one row per id."""
        if not len(self.basis):
            return rows
        return torch.cat([rows[:plain], self.basis.to(rows.dtype) @ rows[plain:]])
