"""Data loaders of batches: one that a resumed run continues, and plain ones, which start over each time."""

import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from mmtx.data.workers import end_with_parent
from mmtx.errors import InputError


class Batches(Protocol):
    """A dataset of batches: batch k is a function of k alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int, /) -> Any: ...


def loader(dataset: Batches, workers: int = 0, first: int = 0) -> DataLoader:
    """Items `first`, `first` + 1, ... of a dataset of batches. Raises InputError as the dataset does, also from a worker."""
    return _Loader(_ErrorsAsItems(dataset), batch_size=None, sampler=range(first, len(dataset)), num_workers=workers,
                   pin_memory=torch.cuda.is_available(), worker_init_fn=_begin_worker)


class _ErrorsAsItems(Dataset):
    """A dataset that returns an InputError instead of raising it, which in a worker would become pages of traceback."""

    def __init__(self, dataset: Batches):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, k: int) -> Any:
        try:
            return self.dataset[k]
        except InputError as error:
            return error


class _Loader(DataLoader):
    """Raises the errors that `_ErrorsAsItems` returns."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # Lightning needs no more
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                raise batch
            yield batch


class ResumableLoader:
    """A loader whose only state is the number of batches yielded: iterated again, it continues where it stopped.

    Lightning saves and restores its `state_dict` with checkpoints.
    """

    def __init__(self, dataset: Batches, workers: int = 0):
        self.dataset, self.workers = dataset, workers
        self.next = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        for batch in loader(self.dataset, self.workers, self.next):
            # Before the yield: code after it does not run once the trainer stops iterating.
            self.next += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def _begin_worker(worker: int) -> None:
    """Shield a worker from signals to the trainer's process group: the trainer still needs its workers to end in order."""
    os.setpgid(0, 0)
    end_with_parent()
