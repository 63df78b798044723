"""JSON, what ships with the package, and folders that appear whole or not at all."""

import json
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmtx.errors import InputError

PACKAGE = Path(__file__).parent


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken one is an InputError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def write_json(value: Any) -> bytes:
    """The one way that mmtx writes JSON, so that equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


@contextmanager
def replace_folder(folder: str | Path):
    """Yield an empty folder beside `folder` that takes its place when the block ends without an error.

    A crash or an error leaves the old folder as it was, never a half-written one.
    """
    folder = Path(folder)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        yield staging
        old = folder.with_name(staging.name + ".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(staging, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def find_shipped(name: str | Path) -> Path:
    """A folder or file that a user named, also in a configuration: his own by its path or, if there is none, among those
    that come with the package. What nobody named is `shipped`, whatever lies in the current directory.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise InputError(f"found {type(name).__name__}, expected the path of a folder or file")
    if os.path.exists(name):
        return Path(name)
    try:
        return shipped(name)
    except InputError:
        raise InputError(f"{name}: no such folder or file, neither here nor among those that come with mmtx") from None


def shipped(name: str) -> Path:
    """A folder or file that comes with the package: an installed one carries it inside itself, an editable one beside."""
    for base in (PACKAGE / "shipped", PACKAGE.parent):
        if os.path.exists(base / name):
            return base / name
    raise InputError(f"{name}: not among what comes with mmtx, which must be whole")
