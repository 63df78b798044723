"""Decode steps of fixed shapes as CUDA graphs, which replay hundreds of operations with one launch.

Launching an operation takes the host about 5 us, and a step of 28 layers has hundreds of them, so that with one prompt the GPU
would wait for the host. A graph is launched as a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor

POOL_BYTES = 2 ** 30  # of KV caches, with the graphs that write to them, that are kept for later answers


class Captured:
    """A function of tensors that is called repeatedly on the same memory: on a GPU as a CUDA graph.

    The first call runs eagerly, on a side stream, since the first-time setup of libraries may not be captured. The second is
    captured and replayed, all later ones are replayed, on the current stream.
    """

    def __init__(self, run: Callable[..., Tensor], *inputs: Tensor):
        """`run` is called with `inputs`, into which the values of each call are copied, and which it may change."""
        self.run, self.inputs = run, inputs
        self.output: Tensor | None = None   # of `run`, in the same memory from the second call on
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def settled(self) -> bool:
        """Whether the output is in its final memory."""
        return self.graph is not None or (self.output is not None and not self.output.is_cuda)

    def __call__(self, *values: Tensor) -> Tensor:
        """The function's output, valid until the next call."""
        for mine, value in zip(self.inputs, values, strict=True):
            if value is not mine:
                mine.copy_(value)
        if self.graph is not None:
            self.graph.replay()
        elif not self.inputs[0].is_cuda:
            made = self.run(*self.inputs)
            self.output = made if self.output is None else self.output.copy_(made)
        else:
            with torch.cuda.device(self.inputs[0].device):
                self._capture() if self.output is not None else self._run()
        return self.output

    def _run(self) -> None:
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            self.output = self.run(*self.inputs)
        here.wait_stream(beside)
        self.output.record_stream(here)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads may continue: only the work of this one is captured.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.output = self.run(*self.inputs)
        self.graph = graph
        graph.replay()


@dataclass(eq=False)
class _Entry:
    shape: Any
    size: int
    thing: Any


class CachePool:
    """A pool of caches and captured steps for later answers, by shape; the oldest are dropped when it exceeds its limit."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._lock = RLock()  # garbage collection within `give` may call `give`

    def take(self, shape: Any) -> Any:
        """Remove and return the latest entry of a shape, None if there is none."""
        with self._lock:
            for entry in reversed(self._entries):
                if entry.shape == shape:
                    self._entries.remove(entry)
                    return entry.thing
        return None

    def give(self, shape: Any, size: int, thing: Any) -> None:
        """Add an entry of `size` bytes."""
        with self._lock:
            self._entries.append(_Entry(shape, size, thing))
            while sum(entry.size for entry in self._entries) > POOL_BYTES:
                self._entries.pop(0)
