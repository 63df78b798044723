"""Folders that are replaced in one step, or not at all.

A save writes everything next to its target, flushes it to disk, and swaps the two in one step of the file system
(`renameat2`), or in two renames where the file system has no such step. If a save is killed, the old or the new folder is
at the target; or, between the two renames, the old one is next to it, and the next load or save puts it back. Leftovers of
a killed save are removed by the next save to the same target.
"""

import ctypes
import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mmtx.errors import InputError
from mmtx.files import Content, sync_folder, write_synced
from mmtx.saved_folder import check_target, foreign, is_ours, writing

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP}  # from file systems and kernels without an exchange


def replace_folder(folder: str | Path, files: Iterable[tuple[str, Content]]) -> None:
    """Replace `folder` with one that holds `files` (relative paths and contents); a link to the folder stays a link.

    Raises InputError, and changes nothing, unless `folder` is new, empty or written by an earlier save, or if there is no
    room. An exception from the iterable `files` leaves the old folder as well.
    """
    target = check_target(folder)
    put_back(target)
    _clear(target)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    with writing(target):
        _make(staging)
    with _lock(staging):  # otherwise another save would clear it
        try:
            for name, content in files:
                with writing(folder):
                    (staging / name).parent.mkdir(exist_ok=True)
                    write_synced(staging / name, content)
            with writing(folder):
                _put_in_place(staging, target, folder)
        finally:
            if os.path.lexists(target) or not os.path.lexists(_old(staging)):  # otherwise both are still needed
                for left in (staging, _old(staging)):
                    with suppress(OSError):
                        if foreign(left) is None:
                            _remove(left)


def put_back(folder: Path) -> None:
    """Put back the old folder if a save was killed between its two renames: it is then next to `folder`, not there."""
    with suppress(OSError, ValueError):
        if os.path.exists(folder):
            return
        target = Path(os.path.realpath(folder))
        for old in _beside(target, r"\.old"):
            if is_ours(old) and foreign(old) is None and not os.path.lexists(target):
                with _lock(old) as free:  # otherwise another process is between its renames
                    if free and not os.path.lexists(target):
                        os.rename(old, target)


def _beside(target: Path, tail: str) -> list[Path]:
    """Folders that saves to `target` made next to it; `tail` is a regular expression for the end of their names."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}{tail}")
    if not target.parent.is_dir():
        return []
    return [Path(entry.path) for entry in os.scandir(target.parent)
            if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]


def _clear(target: Path) -> None:
    """Remove what killed saves to `target` left next to it, if it is certainly theirs."""
    with suppress(OSError):
        for left in _beside(target, r"(\.old)?"):
            with _lock(left) as free:
                if free and foreign(left) is None:
                    _remove(left)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """A context with a lock on a folder, and whether it was free; the system releases it however its process ends.

    Some network file systems have no locks: no folder is ever free there, and nothing is cleared.
    """
    free = False
    with ExitStack() as held:
        if fcntl is not None:
            with suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
        yield free


def _make(folder: Path) -> None:
    """Make a folder, and its missing parents."""
    for parent in reversed([parent for parent in folder.parents if not parent.exists()]):
        parent.mkdir(exist_ok=True)
        sync_folder(parent.parent)
    folder.mkdir()


def _put_in_place(staging: Path, target: Path, shown: str | Path) -> None:
    """Replace `target` with the complete folder `staging`. Raises OSError or InputError; `target` then is as it was."""
    for path in (*(path for path in staging.iterdir() if path.is_dir()), staging):
        sync_folder(path)
    if not os.path.lexists(target):
        os.rename(staging, target)
        sync_folder(target.parent)
        return
    kept = target.stat()
    os.chmod(staging, stat.S_IMODE(kept.st_mode))
    with suppress(OSError):
        os.chown(staging, kept.st_uid, kept.st_gid)
    old = _swap(staging, target)
    sync_folder(target.parent)
    if (found := foreign(old)) is not None:  # added since the check
        _remove(_swap(old, target))
        raise InputError(f"{shown}: holds {found[:80]!r}, which mmtx did not write, and is left as it is")
    _remove(old)


def _swap(new: Path, target: Path) -> Path:
    """Swap two folders -> the path of the one that was at `target`."""
    try:
        exchange(new, target)
        return new
    except OSError as error:
        if error.errno not in NO_EXCHANGE:
            raise
    old = _old(new)
    with _lock(target):  # otherwise a load would put it back before the second rename
        os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(old, target)
            raise
    return old


def exchange(one: Path, other: Path) -> None:
    """Swap two paths of a file system in one step. Raises OSError, with ENOSYS where there is no such step."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(one), here, os.fsencode(other), both):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _old(staging: Path) -> Path:
    return staging.with_name(staging.name + ".old")


def _remove(folder: Path) -> None:
    with suppress(OSError):
        os.chmod(folder, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
