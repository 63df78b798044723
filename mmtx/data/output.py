"""Output folders: checked to be writable before any work, and locked so that one process at a time writes to them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtx.errors import InputError
from mmtx.files import user_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"  # in the folder while a process writes to it

_held: set[int] = set()


def _let_go() -> None:
    """Release inherited locks in a forked process, which must not hold those of its parent."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def check_output(folder: str) -> Path:
    """Create the output folder, before any long work. Raises InputError if it cannot be written."""
    if not folder.strip() or "\0" in folder:
        raise InputError(f"output: found {folder!r}, expected the name of a folder")
    path = user_path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"output: {folder if len(folder) < 200 else f'{folder[:200]}...'} cannot be written "
                         f"({error.strerror})") from None
    return path


@contextmanager
def lock_folder(folder: Path, name: str) -> Iterator[None]:
    """Hold an exclusive lock on a folder, which the system releases when the process ends, however it ends.

    Raises InputError that names the process holding it. Without file locks (some network filesystems) every process gets it.
    """
    path = folder / LOCK
    try:
        file = _lock(path)
    except BlockingIOError:
        raise InputError(f"{name}: {folder} is being written by process {_owner(path)}, expected another folder, or that "
                         "process to end") from None
    if file is None:
        yield
        return
    _held.add(file)
    try:
        os.truncate(file, 0)
        os.pwrite(file, b"%d" % os.getpid(), 0)
    except OSError:
        pass  # a full disk: messages then lack the process id
    try:
        yield
    finally:
        if file in _held:  # else this is a forked child
            path.unlink(missing_ok=True)
            _held.remove(file)
            os.close(file)


def _lock(path: Path) -> int | None:
    """The descriptor of the locked file; None without file locks. Raises BlockingIOError if another process holds it."""
    while fcntl is not None:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return None  # a folder that cannot be written is reported by the first write
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file after we opened it and before we locked it.
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BlockingIOError:
            os.close(file)
            raise
        except FileNotFoundError:
            pass
        except OSError:
            os.close(file)
            return None
        os.close(file)
    return None


def _owner(path: Path) -> str:
    try:
        return path.read_text()[:20] or "?"
    except OSError:
        return "?"
