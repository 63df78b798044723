"""Steps of unchanging shapes as CUDA graphs: what starts hundreds of operations is played back as one.

To start an operation takes the host about 5 us, and a step of 28 layers has hundreds of them, so that one prompt would wait for
the host. A graph starts as a whole.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 2 ** 30  # of keys and values, with the graphs that write them, that wait for the next answer


class CapturedStep:
    """A function of ids (B,) that changes its state in place, called again and again. On a GPU it becomes a graph.

    The first call runs as it is, on a stream of its own, as what a library does for the first time may not be captured. The second
    is captured and played, all others are played: all on the stream that is the current one.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], ids: Tensor):
        """`run` is called with `ids`, whose values are those of each call."""
        self.run, self.ids = run, ids
        self.graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def __call__(self, ids: Tensor) -> Tensor:
        """What the function makes, good until the next call."""
        if not self.ids.is_cuda:
            return self.run(ids)
        self.ids.copy_(ids)
        if self.graph is not None:
            self.graph.replay()
        elif self._warm:
            with torch.cuda.device(self.ids.device):
                graph = torch.cuda.CUDAGraph()
                # Other threads may go on: only what this one does is captured.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self.made = self.run(self.ids)
                self.graph = graph
            graph.replay()
        else:
            with torch.cuda.device(self.ids.device):
                here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
                beside.wait_stream(here)
                with torch.cuda.stream(beside):
                    self.made = self.run(self.ids)
                here.wait_stream(beside)
            self.made.record_stream(here)
            self._warm = True
        return self.made


@dataclass(eq=False)
class _Entry:
    shape: Any
    size: int
    thing: Any


class Kept:
    """What has been captured for one answer and can serve another, by its shape; the oldest goes when there is too much."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def take(self, shape: Any) -> Any:
        """Something of a shape, which nobody else has from now on, or None."""
        for entry in reversed(self._entries[:]):
            if entry.shape == shape:
                # Another thread may have been faster.
                with suppress(ValueError):
                    self._entries.remove(entry)
                    return entry.thing
        return None

    def give(self, shape: Any, size: int, thing: Any) -> None:
        """Keep something of so many bytes."""
        self._entries.append(_Entry(shape, size, thing))
        while sum(entry.size for entry in self._entries) > KEPT_BYTES:
            self._entries.pop(0)
