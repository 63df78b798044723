"""The base of all training modules: figures of a validation, and random numbers of a step."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from mmtx.data.tokens import seed_of
from mmtx.training.private import data_of


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over all ranks of a tensor that has the same shape on each; all ranks must call this together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        x = x.clone()
        torch.distributed.all_reduce(x)
    return x


def of_all_ranks(value: Any) -> list[Any]:
    """The value of each rank; all ranks must call this together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, value)
    return parts


class Means:
    """Sums and counts by name, in double precision, divided once at the end, over all batches of all ranks.

    A mean over the means of batches would depend on the batch size.
    """

    def __init__(self):
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """`total` is a sum over `count` items, not a mean."""
        before, items = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before + float(total), items + float(count)

    def compute(self) -> dict[str, float]:
        """The mean of each name with a count over all ranks, which must all call this together."""
        parts, found = of_all_ranks(self.sums), {}
        for name in dict.fromkeys(name for part in parts for name in part):
            total, count = (sum(part[name][i] for part in parts if name in part) for i in range(2))
            if count:
                found[name] = total / count
        return found


class TrainingModule(LightningModule):
    """The base of all training modules: random numbers that depend on the step alone, and a test that validates other samples."""

    own_data: Any = None  # a data module that was attached without a trainer

    @property
    def data(self) -> Any:
        """The data module that batches come from, or None if they come from a plain loader."""
        try:
            return data_of(self.trainer)
        except (RuntimeError, AttributeError):  # without a trainer, or with Fabric's
            return self.own_data

    def seed_step(self, index: int) -> None:
        """Seed torch for a training batch, so that a resumed run draws the numbers of an uninterrupted one."""
        torch.manual_seed(seed_of(getattr(self.data, "seed", 0), index, self.global_rank))

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.seed_step(index)

    @property
    def split(self) -> str:
        """The prefix of the names of figures."""
        return "test" if self.trainer.testing else "val"

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: Any, index: int) -> None:
        self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()
