"""Where bytes lie: local files and URLs, what may be opened and how they are read, and how a path is shown.

Everything here is frozen and picklable, so that samples travel to the workers of a data loader.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from mmtx.errors import InputError

MAX_BYTES = 256 * 2**20  # of one medium: more than 600 s of stereo PCM at 48 kHz


@dataclass(frozen=True)
class FileSource:
    """A file or fsspec URL, or `size` bytes at `offset` of it (a member of a plain tar)."""

    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Return the bytes. Raises InputError when they are missing, cut short or more than MAX_BYTES."""
        with open_binary(self.path) as file:
            if self.offset:
                file.seek(self.offset)
            data = file.read(MAX_BYTES + 1 if self.size is None else min(self.size, MAX_BYTES + 1))
        if len(data) > MAX_BYTES:
            raise InputError(f"{display(self.path)}: more than {MAX_BYTES} bytes, the most for one medium")
        if self.size is not None and len(data) < self.size:
            raise InputError(
                f"{display(self.path)}: found {len(data)} bytes at byte {self.offset}, expected {self.size}"
            )
        return data

    def stamp(self) -> bytes:
        """What changes when the file does, as far as one can tell without reading it: size and time of a local one."""
        try:
            found = None if is_url(self.path) else os.stat(self.path)
        except OSError:
            found = None
        return b"" if found is None else f"{found.st_size} {found.st_mtime_ns}".encode()


@dataclass(frozen=True)
class MemorySource:
    """Bytes held in memory (a member of a compressed tar, which has no random access)."""

    data: bytes = field(repr=False)

    def read(self) -> bytes:
        """Return the bytes."""
        return self.data

    def stamp(self) -> bytes:
        """The bytes themselves."""
        return self.data


@dataclass(frozen=True)
class DatasetSource:
    """A picture or sound in a column of a Hugging Face dataset whose columns were cast to `decode=False`."""

    dataset: Any = field(repr=False)
    row: int
    column: str
    place: int | None = field(default=None, repr=False)  # in a column of lists

    def read(self) -> bytes:
        """Return the bytes, which lie in the dataset or in a file that it names."""
        value = self.dataset.select_columns([self.column])[self.row][self.column]
        if self.place is not None:
            value = value[self.place]
        if value is None:
            raise InputError(f"row {self.row + 1}, column {self.column!r}: found nothing, expected a picture or sound")
        return FileSource(value["path"]).read() if value["bytes"] is None else value["bytes"]

    def stamp(self) -> bytes:
        """The fingerprint that the library gives to a dataset."""
        return self.dataset._fingerprint.encode()


MediaSource = FileSource | MemorySource | DatasetSource


def is_url(path: str) -> bool:
    """Whether fsspec opens `path`, rather than the local file system."""
    return "://" in path or path.startswith("data:")


def display(path: str) -> str:
    """A path for messages: a URL without password, query (which may hold a signature) or inline data."""
    if path.startswith("data:"):
        return path.split(",")[0]
    return re.sub(r"//[^/@]*@", "//", path).split("?")[0] if is_url(path) else path


def _check_regular(path: str) -> None:
    """Raise InputError for what must not be opened: a pipe would be waited for, a device may act."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder `open` says what it is
        raise InputError(f"{path}: found a pipe, a socket or a device, expected a file")


@contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """Open a local file or fsspec URL; what fails while it is open becomes an InputError that names it."""
    # Every fsspec back end raises classes of its own; local files raise OSError alone.
    failures = Exception if is_url(path) else OSError
    try:
        if is_url(path):
            import fsspec

            opened = fsspec.open(path, "rb")
        else:
            _check_regular(path)
            opened = open(path, "rb")
        with opened as file:
            yield file
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{display(path)}: no such file") from None
    except failures as error:
        # The texts of remote errors may hold addresses and signatures; a missing package is worth telling.
        remote = str(error) if isinstance(error, ImportError) else type(error).__name__
        reason = getattr(error, "strerror", None) or (remote if is_url(path) else str(error))
        raise InputError(f"{display(path)}: cannot be read ({reason})") from None
