"""What all modules that train have in common: the figures of a validation and the random numbers of a step."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from mmtx.data.tokens import seed_of
from mmtx.training.private import data_of


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor of one shape over all ranks, which must all ask."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        x = x.clone()
        torch.distributed.all_reduce(x)
    return x


class Means:
    """Sums and counts by name, in double precision; they are divided once, when all batches of all ranks are in.

    A mean of the means of batches would give another figure for each size of a batch.
    """

    def __init__(self):
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """`total` is a sum over `count` items, not a mean."""
        before, items = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before + float(total), items + float(count)

    def whole(self) -> dict[str, float]:
        """The mean of each name over all ranks, which must all ask; names for which nothing was counted are left out."""
        parts = [self.sums]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [{}] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self.sums)
        found = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            total, count = (sum(part[name][i] for part in parts if name in part) for i in range(2))
            if count:
                found[name] = total / count
        return found


class TrainingModule(LightningModule):
    """What all modules here have in common: random numbers that follow from the step, and a test that is the validation with
    other samples.
    """

    def seed_step(self, index: int) -> None:
        """Seed torch for a training batch, so that a resumed run draws what the run before it would have drawn."""
        torch.manual_seed(seed_of(getattr(data_of(self.trainer), "seed", 0), index, self.global_rank))

    @property
    def split(self) -> str:
        """What the names of figures begin with."""
        return "test" if self.trainer.testing else "val"

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: Any, index: int) -> None:
        self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()
