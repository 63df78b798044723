"""What every data source yields: a `Sample`, turns of text and media whose bytes are read only on demand.

Everything here is frozen and picklable, so that samples travel to the workers of a data loader.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from mmtx.errors import InputError

MAX_BYTES = 256 * 2**20  # of one medium: more than 600 s of stereo PCM at 48 kHz
EXTENSIONS = {
    "image": (".webp", ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".ogg", ".opus", ".wav", ".flac", ".mp3"),
}


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

    def read(self) -> bytes:
        """Return the bytes, which lie in the dataset or in a file that it names."""
        value = self.dataset.select_columns([self.column])[self.row][self.column]
        if value is None:
            raise InputError(f"row {self.row + 1}, column {self.column!r}: found nothing, expected a picture or sound")
        return FileSource(value["path"]).read() if value["bytes"] is None else value["bytes"]

    def stamp(self) -> bytes:
        """The fingerprint that the library gives to a dataset."""
        return self.dataset._fingerprint.encode()


MediaSource = FileSource | MemorySource | DatasetSource


@dataclass(frozen=True)
class Text:
    """A piece of text, never blank."""

    text: str


@dataclass(frozen=True)
class Media:
    """A picture or a sound: `load_image(media.source.read(), media.name)`.

    `name` is what error messages call it: it names the file, and the row or member.
    """

    kind: Literal["image", "audio"]
    name: str
    source: MediaSource


Part = Text | Media


@dataclass(frozen=True)
class SampleTurn:
    """What one side says; role None is a plain document."""

    role: Literal["user", "assistant"] | None
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sample:
    """One row of a source. `where` names the source and the row in error messages.

    `drop` is the share of its views in training that leave the user turns empty.
    """

    key: str
    turns: tuple[SampleTurn, ...]
    metadata: dict[str, Any]
    where: str
    drop: float = 0.0

    @property
    def caption(self) -> str:
        """The text that is answered or, where a medium is, that asks for it; of a plain document, all text."""
        texts = [(turn.role, part.text) for turn in self.turns for part in turn.parts if isinstance(part, Text)]
        return "".join(text for role, text in texts if role != "user") or "".join(text for _, text in texts)


def kind_of(name: str, data: bytes = b"") -> Literal["image", "audio"] | None:
    """Tell pictures from sounds by the extension of `name`, else by the first bytes; None if unknown."""
    for kind, extensions in EXTENSIONS.items():
        if suffix(name) in extensions:
            return kind
    return sniff(data)


def sniff(data: bytes) -> Literal["image", "audio"] | None:
    """Tell pictures from sounds by the first 12 bytes; None for anything else."""
    if data[:4] == b"RIFF":
        return {b"WEBP": "image", b"WAVE": "audio"}.get(bytes(data[8:12]))
    if data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")):
        return "image"
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return "image"
    if data.startswith((b"OggS", b"fLaC", b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2")):
        return "audio"
    return None


def suffix(path: str) -> str:
    """The last extension in lower case with its dot, '' if there is none."""
    return os.path.splitext(display(path))[1].lower()


def is_url(path: str) -> bool:
    """Whether fsspec opens `path`, rather than the local file system."""
    return "://" in path or path.startswith("data:")


def display(path: str) -> str:
    """A path for messages: a URL without password, query (which may hold a signature) or inline data."""
    if path.startswith("data:"):
        return path.split(",")[0]
    return re.sub(r"//[^/@]*@", "//", path).split("?")[0] if is_url(path) else path


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
