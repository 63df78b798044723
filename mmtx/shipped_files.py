"""Folders and files that come with mmtx, such as models, tokenizers and configurations."""

import os
from contextlib import suppress
from pathlib import Path

from mmtx.atomic_folder import put_back
from mmtx.errors import InputError
from mmtx.files import user_path

PACKAGE = Path(__file__).parent


def shipped(name: str | Path) -> Path:
    """A folder or file shipped with mmtx: inside an installed package, next to it in a checkout. Raises InputError."""
    for base in (PACKAGE / "shipped", PACKAGE.parent):
        if (base / name).exists():
            return base / name
    raise InputError(f"{name}: not among what comes with mmtx, which must be whole")


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
    except InputError:
        raise InputError(f"{name}: no such folder or file, neither here nor among those that come with mmtx") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
