"""WebDataset shards: tars of KEY.webp + KEY.json with "caption" or "text", or KEY.txt. They are never extracted."""

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial

from mmtx.data.folder import captioned, is_wanted
from mmtx.data.fields import attempt
from mmtx.data.sample import Sample, kind_of
from mmtx.data.storage import MAX_BYTES, FileSource, MediaSource, MemorySource, bare, display, open_binary
from mmtx.errors import InputError

SHARDS = (".tar", ".tar.gz", ".tgz")


def read_tar(path: str) -> Iterator[Sample | InputError]:
    """The whole index is built first, because members of one sample need not be neighbours."""
    groups: dict[str, list[tuple[str, MediaSource]]] = {}
    for name, source in _members(path):
        # The key ends at the last dot (the webdataset package: at the first), for names like "v1.5-001.png".
        groups.setdefault(os.path.splitext(name)[0], []).append((name, source))
    for key, files in groups.items():
        where = f"{display(path)} member {key}"
        yield attempt(partial(captioned, key, files, where, name_prefix=f"{display(path)} member "))


def _members(path: str) -> Iterator[tuple[str, MediaSource]]:
    """Name and bytes of each medium and caption in a tar. Media of a plain tar are not read, only located."""
    compressed = not bare(path).lower().endswith(".tar")
    with open_binary(path, seek=True) as file:
        stream = gzip.GzipFile(fileobj=file) if compressed else file
        try:
            # "r:" over our own GzipFile, not "r|gz", which takes a truncated file for a whole one.
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    name, size = member.name, member.size
                    if not member.isfile() or not is_wanted(name):
                        continue
                    if size > MAX_BYTES:
                        raise InputError(f"{display(path)} member {name}: {size} bytes, at most {MAX_BYTES}")
                    if kind_of(name) and not compressed:
                        yield name, FileSource(path, member.offset_data, size)
                    else:
                        yield name, MemorySource(tar.extractfile(member).read())
                # tarfile takes a damaged or missing header for the end: the true end is a block of zeros.
                stream.seek(tar.offset)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise InputError(f"{display(path)}: damaged or cut short at byte {tar.offset} of the tar")
                while compressed and stream.read(2**20):  # to the end, where gzip compares the checksum
                    pass
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            kind = "gzipped tar" if compressed else "plain tar"
            raise InputError(f"{display(path)}: not a whole {kind} ({error})") from None
