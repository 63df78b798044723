"""Local files as a user names them: read whole, within limits, and written whole or not at all."""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmtx.errors import InputError

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
Content = bytes | Iterable[Any]  # of a file: its bytes, or consecutive parts of them


def user_path(name: str | os.PathLike) -> Path:
    """A user's path with a leading ~ expanded, which a shell does not do after "=" or in quotes.

    Raises InputError if it names the home of an unknown user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise InputError(f"{name}: found {Path(name).parts[0]}, the home of no user here") from None


def user_name(name: str | os.PathLike) -> str:
    """A user's path or URL of media, with a leading ~ expanded unless there is a file of that very name."""
    return os.fspath(user_path(name) if str(name).startswith("~") and not os.path.exists(name) else name)


def open_regular(path: str | Path) -> int:
    """Open a regular file for reading -> its descriptor.

    Raises InputError for anything else, such as a folder, or a pipe or device, which could be read forever, and for the text that
    Git puts in the place of a large file if it is without LFS.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # else opening a pipe waits for a writer
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: found {'a folder' if stat.S_ISDIR(mode) else 'a pipe or device'}, expected a file")
    if os.read(descriptor, len(LFS_POINTER)) == LFS_POINTER:
        os.close(descriptor)
        raise InputError(f"{path}: found a pointer of Git LFS, expected the file itself (git lfs pull)")
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file. Raises InputError if it cannot be read or has more than `most` bytes."""
    try:
        with open(open_regular(path), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) <= most and len(data := file.read(most + 1)) <= most:
                return data
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    raise InputError(f"{path}: found {max(size, most + 1)} bytes, expected at most {most}")


def read_text(path: str | Path, most: int) -> str:
    """The content of a regular file in UTF-8. Raises InputError as `read_bytes` does, and for other bytes."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found {error.object[error.start:][:1]!r} at byte {error.start}, expected UTF-8") from None


def write_whole(path: Path, content: Content) -> None:
    """Write a file next to its target, flush it to disk, and rename it. Raises OSError; the old file then stays."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write_synced(part, content)
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def write_file(path: Path, content: bytes) -> None:
    """`write_whole` for a file that a user named. Raises InputError if it cannot be written."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"{path}: {len(content)} bytes cannot be written ({error.strerror})") from None


def write_synced(path: Path, content: Content) -> None:
    """Write a file, and flush it to disk."""
    parts: Iterable[Any] = [content] if isinstance(content, bytes) else content
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
