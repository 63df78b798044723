"""Standard output of a run: where it cannot be written, the run goes on without it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Lossy:
    """A text stream that goes to the null device after the first write that fails: its reader is gone, or the disk is full."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)


@contextmanager
def lossy_output() -> Iterator[None]:
    """Standard output and error are `Lossy` in this context: hours of training must not end with a `tee` or a terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Lossy(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
