"""Steps of unchanging shapes as CUDA graphs: what starts hundreds of operations is played back as one.

To start an operation takes the host about 5 us, and a step of 28 layers has hundreds of them, so that one prompt would wait for
the host. A graph starts as a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 2 ** 30  # of keys and values, with the graphs that write them, that wait for the next answer


class Captured:
    """A function of tensors that is called again and again on the same memory: on a GPU as a graph.

    The first call runs as it is, on a stream of its own, as what a library does for the first time may not be captured. The second
    is captured and played, all others are played: all on the stream that is the current one.
    """

    def __init__(self, run: Callable[..., Tensor], *inputs: Tensor):
        """`run` is called with `inputs`, which take the values of each call and which it may change."""
        self.run, self.inputs = run, inputs
        self.output: Tensor | None = None   # what `run` has made, in the same memory from the second call on
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def settled(self) -> bool:
        """Whether what it makes lies where it will always lie."""
        return self.graph is not None or (self.output is not None and not self.output.is_cuda)

    def __call__(self, *values: Tensor) -> Tensor:
        """What the function makes, good until the next call."""
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
        # Other threads may go on: only what this one does is captured.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.output = self.run(*self.inputs)
        self.graph = graph
        graph.replay()


@dataclass(eq=False)
class _Entry:
    shape: Any
    size: int
    thing: Any


class Kept:
    """What has been captured for one answer and can serve another, by its shape; the oldest goes when there is too much."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._lock = RLock()  # a collection within `give` may give, too

    def take(self, shape: Any) -> Any:
        """Something of a shape, which nobody else has from now on, or None."""
        with self._lock:
            for entry in reversed(self._entries):
                if entry.shape == shape:
                    self._entries.remove(entry)
                    return entry.thing
        return None

    def give(self, shape: Any, size: int, thing: Any) -> None:
        """Keep something of so many bytes."""
        with self._lock:
            self._entries.append(_Entry(shape, size, thing))
            while sum(entry.size for entry in self._entries) > KEPT_BYTES:
                self._entries.pop(0)
