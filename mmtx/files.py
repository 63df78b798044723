"""Atomic writes of files and folders, which never delete what mmtx did not write; JSON; files shipped with mmtx.

A save writes everything next to its target, flushes it to disk, and swaps the two in one step of the file system
(`renameat2`), or in two renames where the file system has no such step. If a save is killed, the old or the new folder is
at the target; or, between the two renames, the old one is next to it, and the next load or save puts it back. Leftovers of
a killed save are removed by the next save to the same target.
"""

import ctypes
import errno
import importlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmtx.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

PACKAGE = Path(__file__).parent
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
MOST_JSON = 2**20  # bytes of a JSON file, unless the reader expects more
CONFIG = "config.json"
# All file names that saving a model or a tokenizer writes. A folder with any other is not ours alone.
WRITTEN = {CONFIG, "vocabulary.json", "model.safetensors", "vocoder.safetensors", "tokenizer.model", "tokenizer.json",
           "chat_template.jinja"}
PARTS = {"text", "image", "audio"}  # subfolders of a model
Content = bytes | Iterable[Any]  # of a file: its bytes, or consecutive parts of them
NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP}  # from file systems and kernels without an exchange


# -- Reading -------------------------------------------------------------------------------------------------


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


def read_json(path: str | Path, most: int = MOST_JSON) -> Any:
    """The value of a JSON file of at most `most` bytes. Raises InputError if it is missing, too large or malformed."""
    return parse_json(read_bytes(path, most), path)


def parse_json(data: bytes, where: str | Path) -> Any:
    """The value of JSON in UTF-8, without duplicate names in an object. Raises InputError that names `where`."""
    try:
        return STRICT_JSON.decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not readable as JSON ({str(error)[:100]})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError for a duplicate name, of which json itself would keep only the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice[:40]!r} is there {names.count(twice)} times")
    return found


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_once)


def write_json(value: Any) -> bytes:
    """JSON as mmtx always writes it, so that equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


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


def find_shipped(name: str | Path) -> Path:
    """Find a folder or file that a user named: at that path or, if there is none, among those shipped with mmtx.

    Names that do not come from a user or a configuration go to `shipped`, which ignores the current directory. Raises
    InputError if there is none, or it cannot be read.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise InputError(f"found {type(name).__name__}, expected the path of a folder or file")
    try:
        with suppress(InputError):
            put_back(found := user_path(name))
            if found.exists():
                return found
        return shipped(name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, InputError):
            raise InputError(f"{name}: no such folder or file, neither here nor among those that come with mmtx") from None
        raise InputError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def shipped(name: str | Path) -> Path:
    """A folder or file shipped with mmtx: inside an installed package, next to it in a checkout. Raises InputError."""
    for base in (PACKAGE / "shipped", PACKAGE.parent):
        if (base / name).exists():
            return base / name
    raise InputError(f"{name}: not among what comes with mmtx, which must be whole")


def require(package: str, extra: str, what: str) -> Any:
    """Import a package that only an extra installs. Raises InputError that names `what` needs it and how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"{what}: {package} is not installed, expected pip install 'mmtx[{extra}]'") from None


# -- Writing -------------------------------------------------------------------------------------------------


def write_whole(path: Path, content: Content) -> None:
    """Write a file next to its target, flush it to disk, and rename it. Raises OSError; the old file then stays."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        _write(part, content)
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


def replace_folder(folder: str | Path, files: Iterable[tuple[str, Content]]) -> None:
    """Replace `folder` with one that holds `files` (relative paths and contents); a link to the folder stays a link.

    Raises InputError, and changes nothing, unless `folder` is new, empty or written by an earlier save, or if there is no
    room. An exception from the iterable `files` leaves the old folder as well.
    """
    target = check_target(folder)
    put_back(target)
    _clear(target)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    lock = None
    try:
        lock = _begin(target, staging)
        for name, content in files:
            try:
                (staging / name).parent.mkdir(exist_ok=True)
                _write(staging / name, content)
            except OSError as error:
                raise _unwritten(folder, error) from None
        try:
            _put_in_place(staging, target, folder)
        except OSError as error:
            raise _unwritten(folder, error) from None
    finally:
        if os.path.lexists(target) or not os.path.lexists(_old(staging)):  # otherwise both are still needed
            for left in (staging, _old(staging)):
                with suppress(OSError):
                    if foreign(left) is None:
                        _remove(left)
        if lock is not None:
            os.close(lock)


def check_target(folder: str | Path) -> Path:
    """Check that a save may write to a folder -> its path with links resolved. Raises InputError otherwise.

    The folder may be new, empty, or hold only what an earlier save wrote.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise InputError(f"found {type(folder).__name__}, expected the path of a folder")
    try:
        if not os.fspath(folder) or "\0" in os.fspath(folder):
            raise InputError(f"{str(folder)!r}: found no name of a folder, expected one")
        target = Path(os.path.realpath(user_path(folder)))
        if target == (here := Path.cwd()) or target in here.parents:
            raise InputError(f"{folder}: is the current folder or holds it, expected a folder of its own, as in "
                             f"{Path(folder) / 'model'}")
        if not os.path.lexists(target):
            return target
        if not target.is_dir():
            raise InputError(f"{folder}: found {'a file' if target.is_file() else 'no folder'}, expected a folder")
        if any(target.iterdir()):
            found = foreign(target)
            if found is None and not (target / CONFIG).exists():
                found = min(os.listdir(target))
            elif found is None:
                found = None if is_ours(target) else CONFIG
            if found is not None:
                raise InputError(f"{folder}: holds {found[:80]!r}, which mmtx did not write, and is left as it is; "
                                 "expected a new folder or one of an earlier save")
    except (OSError, UnicodeError) as error:
        raise _unwritten(folder, error) from None
    return target


def is_ours(folder: Path) -> bool:
    """Whether a folder's configuration is one that saving a model or a tokenizer writes.

    Raises InputError if it cannot be read.
    """
    data = read_bytes(folder / CONFIG, MOST_JSON)
    try:
        config = parse_json(data, folder / CONFIG)
    except InputError:
        return False
    return isinstance(config, dict) and (isinstance(config.get("kind"), str) or
                                         isinstance(config.get("format"), int) and "decoder" in config)


def foreign(folder: Path, top: bool = True) -> str | None:
    """The relative path of an entry of `folder` that no save writes, None if there is none. Links are never ours."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False) and top and entry.name in PARTS:
            if (found := foreign(Path(entry.path), top=False)) is not None:
                return f"{entry.name}/{found}"
        elif entry.name not in WRITTEN or not entry.is_file(follow_symlinks=False):
            return entry.name
    return None


def put_back(folder: Path) -> None:
    """Put back the old folder if a save was killed between its two renames: it is then next to `folder`, not there."""
    with suppress(OSError, ValueError):
        if os.path.exists(folder):
            return
        target = Path(os.path.realpath(folder))
        for old in _beside(target, r"\.old"):
            if is_ours(old) and foreign(old) is None and not os.path.lexists(target):
                with _Lock(old) as free:  # otherwise another process is between its renames
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
            with _Lock(left) as free:
                if free and foreign(left) is None:
                    _remove(left)


class _Lock:
    """A lock on a folder, entered with whether it was free; the system releases it however its process ends."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.descriptor: int | None = None

    def __enter__(self) -> bool:
        if fcntl is None:
            return False
        try:
            self.descriptor = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def __exit__(self, *_: Any) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


def _begin(target: Path, staging: Path) -> int | None:
    """Make `staging` and missing parents, and lock it -> the descriptor that holds the lock, None where there are no locks."""
    try:
        missing = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            sync_folder(parent.parent)
        staging.mkdir()
        if fcntl is None:
            return None
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise _unwritten(target, error) from None
    with suppress(OSError):  # some network file systems have no locks; nothing is ever cleared there
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


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
    with _Lock(target):  # otherwise a load would put it back before the second rename
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


def _write(path: Path, content: Content) -> None:
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


def _unwritten(folder: str | Path, error: Exception) -> InputError:
    return InputError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})")
