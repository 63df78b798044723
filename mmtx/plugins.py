"""A user's Python file as a module: a modality from outside the package, or a function that a data source names."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from mmtx.errors import InputError
from mmtx.files import user_path
from mmtx.shipped_files import find_shipped


def import_file(path: str | Path, at: str) -> ModuleType:
    """Import a Python file under its own name, once.

    Worker processes find it through its folder, which is appended to `sys.path`. Raises InputError, starting with `at`, if the
    file cannot be imported or has the name of another module.
    """
    path = user_path(path)
    name, place = path.stem, str(path.absolute())
    if not path.is_file() or path.suffix != ".py":
        raise InputError(f"{at}: found no such Python file, expected NAME.py")
    if not name.isidentifier():
        raise InputError(f"{at}: found the name {name!r}, expected letters, digits and underscores, so that Python can import it")
    if name in sys.modules:
        if getattr(sys.modules[name], "__file__", None) == place:
            return sys.modules[name]
        raise InputError(f"{at}: found another module of the name {name!r}, expected a name of its own")
    found = importlib.util.find_spec(name)
    if found is not None and Path(found.origin or "").absolute() != Path(place):
        raise InputError(f"{at}: found another module of the name {name!r}, expected a name of its own")
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(name)
    except InputError as error:
        raise InputError(f"{at}: {error}") from None
    except Exception as error:  # users' code may raise anything
        line = next((f" in line {frame.tb_lineno}" for frame in _frames(error) if frame.tb_frame.f_code.co_filename == place), "")
        raise InputError(f"{at}: cannot be imported ({type(error).__name__}{line}: "
                         f"{' '.join(str(error).split())[:150]})") from error


def import_function(place: str, option: str) -> Callable[..., Any]:
    """The function that an option names as "FILE.py:FUNCTION". Raises InputError, starting with option and name, if none."""
    at = f"{option} {place}"
    file, _, name = place.rpartition(":")
    try:
        path = find_shipped(file)
    except InputError as error:
        raise InputError(f"{at}: {error}") from None
    found = getattr(import_file(path, at), name, None)
    if not callable(found):
        raise InputError(f"{at}: found no function {name!r}, expected FILE.py:FUNCTION")
    return found


def call_function(function: Callable[[Any], Any], given: Any, at: str) -> Any:
    """The result of a user's function. Raises InputError, starting with `at`, for any exception in the function."""
    try:
        return function(given)
    except InputError as error:
        raise InputError(f"{at}: {error}") from None
    except Exception as error:  # users' code may raise anything
        raise InputError(f"{at}: {type(error).__name__}: {' '.join(str(error).split())[:150]}") from error


def _frames(error: Exception) -> list[TracebackType]:
    """The traceback entries of an error, innermost call first."""
    found: list[TracebackType] = []
    at = error.__traceback__
    while at is not None:
        found, at = [at, *found], at.tb_next
    return found
