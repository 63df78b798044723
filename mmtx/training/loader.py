"""A loader whose only state is the number of batches handed out, so that a resumed run goes on where it stopped."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class ResumableLoader:
    """Items 0, 1, 2, ... of a dataset of batches. Lightning stores and restores `state_dict` with its checkpoints."""

    def __init__(self, dataset: Dataset, workers: int = 0):
        self.dataset, self.workers = dataset, workers
        self.next = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        # A validation loader is read to its end again and again.
        if self.next >= len(self):
            self.next = 0
        loader = DataLoader(self.dataset, batch_size=None, sampler=range(self.next, len(self)),
                            num_workers=self.workers, pin_memory=torch.cuda.is_available(),
                            worker_init_fn=_leave_group)
        for batch in loader:
            # Before the yield: code behind it does not run when the trainer stops asking.
            self.next += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def _leave_group(worker: int) -> None:
    """A signal to the group of processes is for the trainer, which still needs its workers to end in order."""
    os.setpgid(0, 0)
