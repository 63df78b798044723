"""Folders that mmtx saved, which a new save may replace; all others stay as they are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtx.errors import InputError
from mmtx.files import read_bytes, user_path
from mmtx.json_files import MOST_JSON, parse_json

CONFIG = "config.json"
# All file names that saving a model or a tokenizer writes. A folder with any other is not ours alone.
WRITTEN = {CONFIG, "vocabulary.json", "model.safetensors", "vocoder.safetensors", "tokenizer.model", "tokenizer.json",
           "chat_template.jinja"}
PARTS = {"text", "image", "audio"}  # subfolders of a model


def check_target(folder: str | Path) -> Path:
    """Check that a save may write to a folder -> its path with links resolved. Raises InputError otherwise.

    The folder may be new, empty, or hold only what an earlier save wrote.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise InputError(f"found {type(folder).__name__}, expected the path of a folder")
    with writing(folder):
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
        found = foreign(target)
        if found is None and (names := os.listdir(target)):
            found = min(names) if CONFIG not in names else None if is_ours(target) else CONFIG
        if found is not None:
            raise InputError(f"{folder}: holds {found[:80]!r}, which mmtx did not write, and is left as it is; "
                             "expected a new folder or one of an earlier save")
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


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """A context in which an error of the system becomes an InputError that names the folder."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise InputError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
