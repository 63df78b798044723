"""WebDataset shards: tars of KEY.webp + KEY.json with "caption" or "text", or KEY.txt. Media of a plain tar stay where they are."""

import gzip
import os
import zlib
from collections.abc import Iterator

from mmtx.data.folder import MAX_CAPTION, Found, captioned, is_wanted, too_long
from mmtx.data.read_options import ReadOptions
from mmtx.data.sample import Sample, attempt, known_kind
from mmtx.data.storage import MAX_BYTES, FileSource, MemorySource, display, open_binary
from mmtx.data.tar_files import Member, TarReader
from mmtx.errors import InputError

SHARDS = (".tar", ".tar.gz", ".tgz")
MAX_HELD = 2 * 2**30    # bytes of a shard that are held in memory: captions, and media if it is compressed


def read_tar(path: str, options: ReadOptions) -> Iterator[Sample | InputError]:
    """Read the samples of a shard; its whole index is built first, since the members of a sample need not be adjacent."""
    groups: dict[tuple[int, str], list[tuple[str, Found]]] = {}
    for archive, name, found in _members(path):
        # The key ends at the last dot (the webdataset package: at the first), for names like "v1.5-001.png".
        groups.setdefault((archive, os.path.splitext(name)[0]), []).append((name, found))
    for (_, key), files in groups.items():
        where = f"{display(path)} member {key}"
        yield attempt(captioned, key, files, where, f"{display(path)} member ", options)


def _members(path: str) -> Iterator[tuple[int, str, Found]]:
    """Archive, name and source of each medium and caption in a tar. Media of a plain tar are not read, only located."""
    name = display(path)
    with open_binary(path, seek=True) as file:
        packed = file.read(2) == b"\x1f\x8b"  # whatever its name says
        try:
            reader, held = TarReader(file, name, packed), 0
            for member in reader.members():
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
