"""WebDataset shards: tars of KEY.webp + KEY.json with "caption" or "text", or KEY.txt. They are never extracted.

Headers are parsed here and not by `tarfile`, which reads names and lists of any length into memory, follows links, stops at the
first end of archive, and takes a damaged header for one. Here, `cat a.tar b.tar` is a shard of both.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import BinaryIO, NamedTuple

from mmtx.data.fields import CHUNK, MAX_CAPTION, attempt, file_type_of
from mmtx.data.folder import Found, captioned, is_wanted, too_long
from mmtx.data.sample import Sample, known_kind
from mmtx.data.storage import MAX_BYTES, FileSource, MemorySource, display, open_binary
from mmtx.errors import InputError

SHARDS = (".tar", ".tar.gz", ".tgz")
BLOCK = tarfile.BLOCKSIZE
MAX_HEADER = 2**20      # bytes of a long name, or of the records of a PAX header
MAX_ZEROS = 2**26       # zero bytes after an archive: writers pad to 10 kB or so, at most to 1 MB
MAX_HELD = 2 * 2**30    # bytes of a shard that are held in memory: captions, and media if it is compressed
MAX_RATIO = 100         # largest compression ratio of a shard, and
MAX_RATIO_FREE = 2**28  # bytes up to which it may be larger: a few flat pictures are no zip bomb


class Member(NamedTuple):
    """An entry of a tar: a file, a link or something else."""

    name: str
    size: int
    offset: int          # of its bytes
    archive: int         # index of its archive among concatenated ones
    trouble: str | None  # why it is not a plain file


def read_tar(path: str, fields: Mapping[str, str | None] | None = None, captions: bool = True) -> Iterator[Sample | InputError]:
    """Read the samples of a shard; its whole index is built first, since the members of a sample need not be adjacent."""
    groups: dict[tuple[int, str], list[tuple[str, Found]]] = {}
    for archive, name, found in _members(path):
        # The key ends at the last dot (the webdataset package: at the first), for names like "v1.5-001.png".
        groups.setdefault((archive, os.path.splitext(name)[0]), []).append((name, found))
    for (_, key), files in groups.items():
        where = f"{display(path)} member {key}"
        yield attempt(partial(captioned, key, files, where, f"{display(path)} member ", fields, captions))


def _members(path: str) -> Iterator[tuple[int, str, Found]]:
    """Archive, name and source of each medium and caption in a tar. Media of a plain tar are not read, only located."""
    name = display(path)
    with open_binary(path, seek=True) as file:
        packed = file.read(2) == b"\x1f\x8b"  # whatever its name says
        try:
            reader, held = _Reader(file, name, packed), 0
            for member in _headers(reader, name):
                where = f"{name} member {member.name}"
                if not is_wanted(member.name):
                    reader.skip(member.size)
                    continue
                found = _trouble(member, where)
                if found is not None:
                    reader.skip(member.size)
                elif known_kind(member.name) and not packed:
                    found = FileSource(path, member.offset, member.size)
                    reader.skip(member.size)
                else:
                    held += member.size
                    if held > MAX_HELD:
                        raise InputError(f"{name}: more than {MAX_HELD} bytes in memory, expected a plain .tar, of which "
                                         "media stay on the disk, or smaller shards")
                    found = MemorySource(reader.read(member.size))
                yield member.archive, member.name, found
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{name}: not a whole gzipped tar ({error})") from None


def _trouble(member: Member, where: str) -> InputError | None:
    """Why a member cannot be used, judging by its header; None if it can."""
    if member.trouble:
        return InputError(f"{where}: found {member.trouble}, expected a file")
    if not known_kind(member.name) and member.size > MAX_CAPTION:
        return too_long(where, member.size)
    if member.size > MAX_BYTES:
        return InputError(f"{where}: {member.size} bytes, at most {MAX_BYTES}")
    return None


# -- Headers -------------------------------------------------------------------------------------------------

TROUBLE = {
    tarfile.LNKTYPE: "a link to another member", tarfile.SYMTYPE: "a symbolic link", tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a file stored with holes (tar --sparse)",
}
LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)


def _headers(reader: "_Reader", name: str) -> Iterator[Member]:
    """The members of all archives in a stream; the caller reads or skips the data of each before taking the next."""
    archives, zeros, ended = 0, 0, True
    everywhere: dict[str, bytes] = {}  # PAX records of all members that follow
    records: dict[str, bytes] = {}     # of the next member
    while True:
        place = reader.place
        block = reader.block()
        if not any(block):
            if records or not block and not ended:
                raise reader.cut()
            if not block:
                return
            archives, zeros, ended, everywhere = archives + (not ended), zeros + 1, True, {}
            if zeros * BLOCK > MAX_ZEROS:
                raise InputError(f"{name}: more than {MAX_ZEROS} zero bytes before byte {place} of the tar")
            continue
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            if not place:
                raise InputError(f"{name}: not a whole tar, plain or gzipped: found {file_type_of(block) or error}") from None
            raise InputError(f"{name}: damaged or cut short at byte {place} of the tar ({error})") from None
        zeros, ended = 0, False
        if info.type in LONG:
            if not 0 <= info.size <= MAX_HEADER:
                raise InputError(f"{name}: {info.size} bytes of a header at byte {place} of the tar, at most {MAX_HEADER}")
            data = reader.read(info.size)
            reader.skip(-info.size % BLOCK)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                records["path"] = data.split(b"\0")[0]
            elif info.type == tarfile.XGLTYPE:
                everywhere |= _pax(data, place, name)
            elif info.type != tarfile.GNUTYPE_LONGLINK:
                records |= _pax(data, place, name)
            continue
        facts, records = everywhere | records, {}
        trouble = TROUBLE.get(info.type)
        if any(key.startswith("GNU.sparse.") for key in facts):
            trouble = TROUBLE[tarfile.GNUTYPE_SPARSE]
        elif info.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE) and not trouble:
            trouble = f"a member of the unknown type {info.type!r}"
        if info.type == tarfile.GNUTYPE_SPARSE and block[482]:
            while reader.block()[504:505] not in (b"\0", b""):  # continuation of the list of holes
                pass
        size = _size(facts["size"], place, name) if "size" in facts else info.size
        if info.type in WITHOUT_DATA:
            size = 0
        if size < 0 or reader.lacks(size):
            raise InputError(f"{name}: damaged or cut short: a member of {size} bytes at byte {place} of the tar")
        member = facts.get("GNU.sparse.name", facts.get("path"))
        member = info.name if member is None else member.decode("utf-8", "surrogateescape").rstrip("/")
        if info.type == tarfile.DIRTYPE:
            reader.skip(size)
        else:
            yield Member(member, size, reader.place, archives, trouble)
        reader.skip(-size % BLOCK)


def _pax(data: bytes, place: int, name: str) -> dict[str, bytes]:
    """Parse PAX records of the form "LENGTH KEY=VALUE\\n"."""
    records, at = {}, 0
    while at < len(data) and data[at]:
        digits = data[at:at + 20].split(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = data[at + len(digits) + 1:at + length]
        key, equals, value = record[:-1].partition(b"=")
        if at + length > len(data) or not record.endswith(b"\n") or not equals:
            raise InputError(f"{name}: damaged or cut short at byte {place} of the tar (a PAX header)")
        records[key.decode("utf-8", "replace")] = value
        at += length
    return records


def _size(text: bytes, place: int, name: str) -> int:
    if not text.isdigit() or len(text) > 19:
        raise InputError(f"{name}: damaged or cut short at byte {place} of the tar (a size of {text[:30]!r})")
    return int(text)


class _Reader:
    """The bytes of a tar in order: skipped bytes of a plain one are not read, and the growth of a gzipped one is limited."""

    def __init__(self, file: BinaryIO, name: str, packed: bool):
        self.file, self.name, self.place = file, name, 0
        self.size = None if packed else file.seek(0, os.SEEK_END)
        file.seek(0)
        self.stream = gzip.GzipFile(fileobj=file) if packed else file

    def lacks(self, size: int) -> bool:
        """Whether fewer than `size` bytes follow, as far as is known before reading them."""
        return self.size is not None and size > self.size - self.place

    def block(self) -> bytes:
        """The next block, empty at the end. Raises InputError for an incomplete block, unless it is all zeros."""
        block = self._read(BLOCK)
        if len(block) < BLOCK and any(block):
            raise self.cut()
        return block

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises InputError if there are fewer."""
        pieces = []
        while size and (piece := self._read(min(size, CHUNK))):
            pieces.append(piece)
            size -= len(piece)
        if size:
            raise self.cut()
        return b"".join(pieces)

    def skip(self, size: int) -> None:
        """Skip bytes; if there are fewer, it is noticed at the next header."""
        if self.size is not None:
            self.place += size
            self.stream.seek(self.place)
        while self.size is None and size and (piece := self._read(min(size, CHUNK))):
            size -= len(piece)

    def cut(self) -> InputError:
        return InputError(f"{self.name}: damaged or cut short at byte {self.place} of the tar")

    def _read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.place += len(data)
        if self.size is None and self.place > MAX_RATIO_FREE and self.place > MAX_RATIO * self.file.tell():
            raise InputError(f"{self.name}: unpacks to more than {MAX_RATIO} times its size, expected a plain .tar")
        return data
