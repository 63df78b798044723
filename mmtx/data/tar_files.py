"""The members of tars, plain or gzipped, which are never extracted.

Headers are parsed here and not by `tarfile`, which reads names and lists of any length into memory, follows links, stops at the
first end of archive, and takes a damaged header for one. Here, `cat a.tar b.tar` is a tar of both.
"""

import gzip
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from mmtx.data.text_files import CHUNK, file_type_of
from mmtx.errors import InputError

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER = 2**20      # bytes of a long name, or of the records of a PAX header
MAX_ZEROS = 2**26       # zero bytes after an archive: writers pad to 10 kB or so, at most to 1 MB
MAX_RATIO = 100         # largest compression ratio of a shard, and
MAX_RATIO_FREE = 2**28  # bytes up to which it may be larger: a few flat pictures are no zip bomb

TROUBLE = {
    tarfile.LNKTYPE: "a link to another member", tarfile.SYMTYPE: "a symbolic link", tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a file stored with holes (tar --sparse)",
}
LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)


class Member(NamedTuple):
    """An entry of a tar: a file, a link or something else."""

    name: str
    size: int
    offset: int          # of its bytes
    archive: int         # index of its archive among concatenated ones
    trouble: str | None  # why it is not a plain file


class TarReader:
    """Reads a tar in order: skipped bytes of a plain one are not read, and the growth of a gzipped one is limited."""

    def __init__(self, file: BinaryIO, name: str, packed: bool):
        self.file, self.name, self.place = file, name, 0
        self.size = None if packed else file.seek(0, os.SEEK_END)
        file.seek(0)
        self.stream = gzip.GzipFile(fileobj=file) if packed else file

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises InputError if there are fewer."""
        pieces = []
        while size and (piece := self._read(min(size, CHUNK))):
            pieces.append(piece)
            size -= len(piece)
        if size:
            raise self._damaged(self.place)
        return b"".join(pieces)

    def skip(self, size: int) -> None:
        """Skip bytes; if there are fewer, it is noticed at the next header."""
        if self.size is not None:
            self.place += size
            self.stream.seek(self.place)
        while self.size is None and size and (piece := self._read(min(size, CHUNK))):
            size -= len(piece)

    def members(self) -> Iterator[Member]:
        """The members of all archives in a stream; the caller reads or skips the data of each before taking the next."""
        archives, zeros, ended = 0, 0, True
        everywhere: dict[str, bytes] = {}  # PAX records of all members that follow
        records: dict[str, bytes] = {}     # of the next member
        while True:
            place = self.place
            block = self._block()
            if not any(block):
                if records or not block and not ended:
                    raise self._damaged(self.place)
                if not block:
                    return
                archives, zeros, ended, everywhere = archives + (not ended), zeros + 1, True, {}
                if zeros * BLOCK > MAX_ZEROS:
                    raise InputError(f"{self.name}: more than {MAX_ZEROS} zero bytes before byte {place} of the tar")
                continue
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError, OverflowError) as error:
                if not place:
                    found = file_type_of(block) or error
                    raise InputError(f"{self.name}: not a whole tar, plain or gzipped: found {found}") from None
                raise self._damaged(place, error) from None
            zeros, ended = 0, False
            if info.type in LONG:
                if not 0 <= info.size <= MAX_HEADER:
                    raise InputError(f"{self.name}: {info.size} bytes of a header at byte {place} of the tar, at most {MAX_HEADER}")
                data = self.read(info.size)
                self.skip(-info.size % BLOCK)
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    records["path"] = data.split(b"\0")[0]
                elif info.type == tarfile.XGLTYPE:
                    everywhere |= self._pax(data, place)
                elif info.type != tarfile.GNUTYPE_LONGLINK:
                    records |= self._pax(data, place)
                continue
            facts, records = everywhere | records, {}
            trouble = TROUBLE.get(info.type)
            if any(key.startswith("GNU.sparse.") for key in facts):
                trouble = TROUBLE[tarfile.GNUTYPE_SPARSE]
            elif info.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE) and not trouble:
                trouble = f"a member of the unknown type {info.type!r}"
            if info.type == tarfile.GNUTYPE_SPARSE and block[482]:
                while self._block()[504:505] not in (b"\0", b""):  # continuation of the list of holes
                    pass
            size = info.size if (given := facts.get("size")) is None else self._size(given, place)
            if info.type in WITHOUT_DATA:
                size = 0
            if size < 0 or self.size is not None and size > self.size - self.place:
                raise InputError(f"{self.name}: damaged or cut short: a member of {size} bytes at byte {place} of the tar")
            member = facts.get("GNU.sparse.name", facts.get("path"))
            member = info.name if member is None else member.decode("utf-8", "surrogateescape").rstrip("/")
            if info.type == tarfile.DIRTYPE:
                self.skip(size)
            else:
                yield Member(member, size, self.place, archives, trouble)
            self.skip(-size % BLOCK)

    def _pax(self, data: bytes, place: int) -> dict[str, bytes]:
        """Parse PAX records of the form "LENGTH KEY=VALUE\\n"."""
        records, at = {}, 0
        while at < len(data) and data[at]:
            digits = data[at:at + 20].split(b" ")[0]
            length = int(digits) if digits.isdigit() else 0
            record = data[at + len(digits) + 1:at + length]
            key, equals, value = record[:-1].partition(b"=")
            if at + length > len(data) or not record.endswith(b"\n") or not equals:
                raise self._damaged(place, "a PAX header")
            records[key.decode("utf-8", "replace")] = value
            at += length
        return records

    def _size(self, text: bytes, place: int) -> int:
        if not text.isdigit() or len(text) > 19:
            raise self._damaged(place, f"a size of {text[:30]!r}")
        return int(text)

    def _block(self) -> bytes:
        """The next block, empty at the end. Raises InputError for an incomplete block, unless it is all zeros."""
        block = self._read(BLOCK)
        if len(block) < BLOCK and any(block):
            raise self._damaged(self.place)
        return block

    def _read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.place += len(data)
        if self.size is None and self.place > MAX_RATIO_FREE and self.place > MAX_RATIO * self.file.tell():
            raise InputError(f"{self.name}: unpacks to more than {MAX_RATIO} times its size, expected a plain .tar")
        return data

    def _damaged(self, place: int, why: object = None) -> InputError:
        return InputError(f"{self.name}: damaged or cut short at byte {place} of the tar" + ("" if why is None else f" ({why})"))
