"""Sources of bytes: opens local files and URLs, reads them to the end, and displays their paths without secrets.

The sources are frozen and picklable, so that samples can be sent to the workers of a data loader.
"""

import base64
import binascii
import hashlib
import io
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

from mmtx.data.trust import Base
from mmtx.data.urls import is_url, is_web, scheme_of
from mmtx.errors import InputError, escape
from mmtx.schema import typed

MAX_BYTES = 256 * 2**20  # of one medium: more than 600 s of stereo PCM at 48 kHz
LONGEST = 200            # characters of a name in a message
CACHING = re.compile(r"(?:(?<=::)|^)(?:simple|file|block)cache::", re.IGNORECASE)


@dataclass(frozen=True)
class FileSource:
    """A file or URL, or `size` bytes at `offset` of it (a member of a plain tar).

    `base` is the origin of the row that names it, which limits what it may reach; None for what the user wrote.
    """

    path: str
    offset: int = 0
    size: int | None = None
    base: Base | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """Return the bytes. Raises InputError if they are missing, truncated or more than MAX_BYTES."""
        return read(self.path, MAX_BYTES, self.base, self.offset, self.size)

    def stamp(self) -> bytes:
        """A value that changes with the file, found without reading it: size and time of a local one, else empty."""
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
    """A picture or sound in a column of a Hugging Face dataset in the format "arrow", which decodes nothing."""

    dataset: Any = field(repr=False)
    row: int
    column: str
    base: Base | None = field(default=None, repr=False)
    place: tuple[str | int, ...] = field(default=(), repr=False)  # in a cell of lists and objects

    def read(self) -> bytes:
        """Return the bytes, from the dataset or from a file that it names."""
        cell = self.dataset.select_columns([self.column])[self.row][self.column][0]
        for step in self.place:
            cell = cell[step]
        value = cell.as_py()
        data, path = (value, None) if isinstance(value, bytes) else (value["bytes"], value.get("path"))
        if data is None and not path:
            raise InputError(f"row {self.row + 1}, column {self.column!r}: found nothing, expected a picture or sound")
        if data is not None:
            return data
        if refusal := self.base and self.base.refusal(path):
            raise InputError(f"row {self.row + 1}, column {self.column!r} names {display(path)}: {refusal}")
        return read(path, MAX_BYTES, self.base)

    def stamp(self) -> bytes:
        """The dataset's fingerprint of the library."""
        return self.dataset._fingerprint.encode()


MediaSource = FileSource | MemorySource | DatasetSource


def bare(path: str) -> str:
    """A path without the query and fragment of a URL, or the content of a data URL."""
    if path[:5].lower() == "data:":
        return path.partition(",")[0]
    return re.split("[?#]" if is_web(path) else "[?]", path)[0] if is_url(path) else path


def uncached(path: str) -> str:
    """A chained URL without caching layers, which copy a whole file before its first byte or its length is available."""
    return CACHING.sub("", path) if is_url(path) else path


def folder_of(path: str) -> str:
    """The folder of a file; a URL without a path is its own."""
    folder = os.path.dirname(bare(path))
    return path if is_url(path) and not is_url(folder) else folder


def decode_base64(text: str) -> bytes:
    """Bytes in base64, whose lines may be broken. Raises binascii.Error if anything else is in it."""
    return base64.b64decode("".join(text.split()), validate=True)


def decode_data_url(url: str) -> bytes:
    """The bytes in a data URL (RFC 2397). Raises binascii.Error."""
    head, _, data = url.partition(",")
    return decode_base64(data) if head.lower().endswith(";base64") else unquote_to_bytes(data)


def join(folder: str, name: str) -> str:
    """The path of a file in a folder, which may be a URL; its query is kept after the name."""
    path, mark, query = folder.partition("?") if is_url(folder) else (folder, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def display(path: str) -> str:
    """A path for messages, on one line: without password, query (which may hold a signature), fragment or inline data.

    Control characters are escaped, and the middle of a long path is left out.
    """
    path = escape(redacted(path))
    return path if len(path) <= LONGEST else f"{path[:LONGEST // 2]}...{path[3 - LONGEST // 2:]}"


def recorded(path: str) -> str:
    """A path for files that outlive the run: unchanged or, if it may hold a secret, redacted, with a digest of the whole."""
    shown = redacted(path)
    digest = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()
    return path if shown == path else f"{shown} (sha256 {digest[:16]})"


def scrub(text: str) -> str:
    """A foreign text with all URLs in it replaced by what `display` returns."""
    return re.sub(r"(?:[a-zA-Z][a-zA-Z0-9+.-]+::)*[a-zA-Z][a-zA-Z0-9+.-]+://[^\s'\"<>]+|data:[^\s'\"<>]{40,}",
                  lambda found: display(found[0]), text)


def redacted(path: str) -> str:
    """A path unchanged, or a URL without the parts that may be secret."""
    if not is_url(path):
        return path
    if path[:5].lower() == "data:":
        return re.match(r"data:[\w/+.;=-]{0,60}(?=,)|data:", path, re.IGNORECASE)[0]
    shown = []
    for part in re.split(r"::(?=[a-zA-Z][a-zA-Z0-9+.-]*:(?://|:))", path):
        scheme, mark, rest = part.partition("://")
        authority, tail = re.match(r"([^/?#]*)(.*)", rest, re.DOTALL).groups()
        if "@" in authority:
            authority = authority.rpartition("@")[2]
        elif re.search(r":(?!\d*$)|%", re.sub(r"^\[[^]]*\]", "", authority)) or "@" in tail.split("/")[0]:
            authority, tail = "...", ""  # a password with a slash or a question mark in it, or an invalid host
        name = re.split("[?#]", tail)[0]
        shown.append(scheme + mark + authority + re.sub(r";[^/]*=[^/]*", "", name))
        if name != tail:  # what looks like another part may belong to the query
            break
    return "::".join(shown)


# -- Opening and reading -------------------------------------------------------------------------------------


@typed
def read(path: str, limit: int = MAX_BYTES, base: Base | None = None, offset: int = 0, size: int | None = None) -> bytes:
    """All bytes of a local file or URL, or `size` of them from `offset`.

    Raises InputError if they are missing, truncated or more than `limit`.
    """
    wanted = limit + 1 if size is None else min(size, limit + 1)
    path = path if size is not None else uncached(path)
    if is_web(path) and size is None and not offset:
        from mmtx.data import web

        data = _wrap_errors(path, web.read, path, limit, base)
    else:
        data = _bounded(path, _part, path, wanted, base, offset, size)
    if len(data) > limit:
        raise InputError(f"{display(path)}: more than {limit} bytes, the most for one medium")
    if size is not None and len(data) < size:
        raise InputError(f"{display(path)}: found {len(data)} bytes at byte {offset}, expected {size}")
    return data


def _part(path: str, wanted: int, base: Base | None, offset: int, size: int | None) -> bytes:
    with open_binary(path, base, seek=size is not None, start=offset, stop=None if size is None else offset + size) as file:
        if offset:
            file.seek(offset)
        return file.read(wanted)


def _bounded(path: str, run: Any, *arguments: Any) -> Any:
    """Call `run`, within the time for one medium if an fsspec backend reads it, which may have no timeout of its own."""
    if not is_url(path) or is_web(path) or scheme_of(path) == "data":
        return run(*arguments)
    from mmtx.data import retry

    try:
        return retry.in_time(retry.TOTAL, run, *arguments)
    except TimeoutError:
        pass
    raise InputError(f"{display(path)}: {retry.out_of_time()}")


@contextmanager
def open_binary(path: str, base: Base | None = None, *, seek: bool = False, start: int = 0,
                stop: int | None = None) -> Iterator["Opened"]:
    """Open a local file or URL; errors in opening and reading it become InputErrors that name it.

    Args:
        path: a URL from the user may have any scheme that fsspec knows.
        base: what rows may reach; None for what the user wrote.
        seek: whether the reader needs to seek. A URL whose server has no byte ranges is then copied to `cache()` first.
        start: the first byte that will be read, a hint for servers, as is `stop`.
    """
    path = path if seek else uncached(path)
    raw = _wrap_errors(path, _opened, path, base, seek, start, stop)
    with Opened(_Reader(path, raw), 2**16) as file:
        file.private = getattr(raw, "private", False)
        yield file


def _opened(path: str, base: Base | None, seek: bool, start: int, stop: int | None) -> Any:
    if is_web(path):
        from mmtx.data.web import Stream

        stream = Stream(path, base, start, stop)
        return _copied(path, stream, stop is None) if seek and not stream.ranged else stream
    if is_url(path):
        if scheme_of(path) == "data":
            return io.BytesIO(decode_data_url(path))
        import fsspec

        return fsspec.open(path, "rb").open()
    _check_regular(path)
    return open(path, "rb", buffering=0)


def _check_regular(path: str) -> None:
    """Raise InputError for what must not be opened: a pipe would block, and a device may act."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # for a folder, `open` raises a clear error
        raise InputError(f"{display(path)}: found a pipe, a socket or a device, expected a file")


def listed(pattern: str) -> list[str]:
    """The URLs that match a pattern, sorted. Raises InputError if its folder cannot be listed."""
    return _wrap_errors(pattern, _listed, pattern)


def _listed(pattern: str) -> list[str]:
    import fsspec

    options = {}
    if is_web(pattern):
        import aiohttp

        from mmtx.data.connection import CONNECT, IDLE
        from mmtx.data.retry import TOTAL

        options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(TOTAL, sock_connect=CONNECT, sock_read=IDLE)}}
    files, path = fsspec.core.url_to_fs(pattern, **options)
    return sorted(files.unstrip_protocol(found) for found in files.glob(path))


def _copied(url: str, stream: Any, anew: bool) -> BinaryIO:
    """A local copy of a file whose server has no byte ranges, made once for each version that the server reports.

    If it reports no version, each read of the whole (`anew`) makes a new copy, and reads of parts use the last one.
    """
    state = repr((url, stream.version))
    path = cache() / hashlib.sha256(state.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    with stream:
        if anew and stream.version == (None, None, None) or not path.is_file():
            save(stream, path)
    return open(path, "rb", buffering=0)


def download(url: str, path: Path) -> None:
    """Copy a remote file, atomically. Raises InputError that names it."""
    with open_binary(url) as source:
        save(source, path)


def save(source: BinaryIO, path: Path) -> None:
    """Write the rest of `source` to a file, atomically."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            while data := source.read(2**20):
                file.write(data)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{display(str(path))}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def cache() -> Path:
    """The folder for copies of remote files: $MMTX_CACHE or ~/.cache/mmtx."""
    return Path(os.environ.get("MMTX_CACHE") or Path.home() / ".cache" / "mmtx")


class Opened(io.BufferedReader):
    """A file that `open_binary` yields."""

    private: bool  # whether it comes from a private address


class _Reader(io.RawIOBase):
    """A file of any backend, whose failures, including a premature end, become InputErrors."""

    def __init__(self, path: str, file: Any):
        super().__init__()
        self.path, self.file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.file.seekable()

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return _wrap_errors(self.path, self.file.seek, offset, whence)

    def readinto(self, buffer) -> int:
        if (count := _wrap_errors(self.path, self.file.readinto, buffer)) or not is_url(self.path):
            return count
        size = getattr(self.file, "size", None)  # as reported to the backend
        if isinstance(size, int) and (found := self.file.tell()) < size and len(buffer):
            raise InputError(f"{display(self.path)}: cut short, found {found} of {size} bytes")
        return 0

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def _wrap_errors(path: str, run: Any, *arguments: Any) -> Any:
    """Call `run`; its failure becomes an InputError that names `path`."""
    # Every fsspec backend raises classes of its own; local files raise few.
    try:
        return run(*arguments)
    except InputError:
        raise
    except (Exception if is_url(path) else (OSError, ValueError, OverflowError)) as error:  # noqa: B030
        reason = _reason(error, is_url(path))
    # Raised outside the handler: errors of backends hold URLs and signatures, and would be chained to this one.
    raise InputError(f"{display(path)}: {reason}")


def _reason(error: Exception, remote: bool) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = scrub(str(error))
    if remote:
        from mmtx.data.response import STATUS, status_message
        from mmtx.data.retry import Failure

        if isinstance(error, Failure):
            return str(error)
        answer = getattr(error, "response", None)
        codes = getattr(error, "status", None), getattr(answer, "status_code", None), getattr(error, "code", None)
        if status := next((code for code in codes if isinstance(code, int) and code in STATUS), None):
            return status_message(status)
        if isinstance(error, PermissionError):
            return "permission denied"
        if isinstance(error, TimeoutError):
            return "no answer in time"
        # Messages of other remote errors may hold URLs and signatures; those of a missing package and of base64 do not.
        text = text if isinstance(error, (ImportError, binascii.Error)) else type(error).__name__
    return f"cannot be read ({getattr(error, 'strerror', None) or text})"
