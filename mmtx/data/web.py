"""Reading over http and https: a whole file, or a stream that can seek and outlives a lost connection."""

import contextlib
import io
import os

from mmtx.data.request import open_response
from mmtx.data.response import Response
from mmtx.data.retry import Budget, Failure
from mmtx.data.trust import Base

SKIP = 2**20  # bytes up to which a seek forward reads on rather than sending a new request


def read(url: str, limit: int, base: Base | None = None) -> bytes:
    """All bytes of a URL, at most `limit` + 1. `base`: what rows may reach; None for what the user wrote.

    Raises Failure.
    """
    budget = Budget()

    def whole() -> bytes:
        with contextlib.closing(open_response(url, base, budget)) as answer:
            if answer.total is not None and answer.total > limit:
                raise Failure(f"more than {limit} bytes, the most for one medium")
            return answer.read(limit + 1)

    return budget.spend(whole)


class Stream(io.RawIOBase):
    """The bytes `start` to `stop` of a URL.

    If the server has byte ranges, the stream can seek, and resumes after a lost connection; if not (`ranged` is false), all
    bytes come in order. Time counts only while waiting for the server, not while the reader is busy. Raises Failure.
    """

    answer: Response | None = None  # the current one
    version: tuple[str | None, str | None, int | None] | None = None  # that of the first answer

    def __init__(self, url: str, base: Base | None = None, start: int = 0, stop: int | None = None):
        super().__init__()
        self.url, self.base, self.position, self.stop = url, base, start, stop
        self.budget = Budget()
        self.budget.spend(self._open)
        self.ranged, self.size, self.version = self.answer.ranged, self.answer.total, self.answer.version
        self.private = self.answer.private
        if not self.ranged:
            self.position, self.stop = 0, None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.ranged

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        target = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size or 0}[whence]
        if target != self.position and not self.ranged:
            raise io.UnsupportedOperation("the server has no byte ranges")
        if self.answer is not None and 0 < target - self.position <= SKIP:
            while self.position < target and self.readinto(bytearray(min(2**16, target - self.position))):
                pass
        if self.position != target:
            self._drop()
            self.position = target
        return target

    def readinto(self, buffer) -> int:
        ends = [end - self.position for end in (self.stop, self.size if self.ranged else None) if end is not None]
        room = max(0, min([len(buffer), *ends]))
        count = self.budget.spend(self._read, memoryview(buffer)[:room]) if room else 0
        self.position += count
        self.budget.earn(count)
        return count

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, buffer: memoryview) -> int:
        if self.answer is None:
            self._open()
        try:
            if count := self.answer.readinto(buffer):
                return count
            if not self.ranged:
                return 0
            if self.position == self.opened:
                raise Failure("sent another byte range than requested")
            self._drop()  # some servers give large ranges in pieces
            return self._read(buffer)
        except Failure as failure:
            self._drop()
            # Resume only if the version can show that it is still the same file.
            failure.transient &= self.ranged and self.version[:2] != (None, None)
            raise

    def _open(self) -> None:
        answer = open_response(self.url, self.base, self.budget, self.position, self.stop)
        if self.version is not None and (answer.version != self.version or not answer.ranged):
            answer.close()
            raise Failure("changed while it was read")
        self.answer, self.opened = answer, self.position

    def _drop(self) -> None:
        if self.answer is not None:
            self.answer.close()
            self.answer = None
