"""Loaders of batches: one that a resumed run goes on with, and plain ones, which begin anew each time."""

import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from mmtx.data.workers import end_with_parent
from mmtx.errors import InputError


class Batches(Protocol):
    """Batch k by its number alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int, /) -> Any: ...


def loader(dataset: Batches, workers: int = 0, first: int = 0) -> DataLoader:
    """Items `first`, `first` + 1, ... of a dataset of batches. Raises InputError as the dataset does, also from a worker."""
    return _Loader(_Told(dataset), batch_size=None, sampler=range(first, len(dataset)), num_workers=workers,
                   pin_memory=torch.cuda.is_available(), worker_init_fn=_begin_worker)


class _Told(Dataset):
    """A dataset that hands out an InputError where it would raise it: a worker would make pages of text of it."""

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
    """Raises what `_Told` has handed out."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # Lightning asks for no more
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                raise batch
            yield batch


class ResumableLoader:
    """A loader whose only state is the number of batches handed out: iterated again, it goes on where it stopped.

    Lightning stores and restores `state_dict` with its checkpoints.
    """

    def __init__(self, dataset: Batches, workers: int = 0):
        self.dataset, self.workers = dataset, workers
        self.next = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        for batch in loader(self.dataset, self.workers, self.next):
            # Before the yield: code behind it does not run when the trainer stops asking.
            self.next += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def _begin_worker(worker: int) -> None:
    """A signal to the group of processes is for the trainer, which still needs its workers to end in order."""
    os.setpgid(0, 0)
    end_with_parent()
