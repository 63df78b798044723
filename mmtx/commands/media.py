"""Media on the command line: arguments that name media, and files for generated ones."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mmtx.errors import InputError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+|data:\S+,\S*")  # "see https://example.org" is text


def parts_of(names: Sequence[str]) -> list:
    """Arguments of the command line as parts of a prompt: files and URLs are media, the rest is text."""
    from mmtx.data.sample import kind_of
    from mmtx.medium import Medium

    def part(name: str):
        if URL.fullmatch(name):
            return Medium(kind_of(name) or "image", name)
        try:
            if Path(name).is_file():
                return Path(name)
        except (OSError, ValueError):  # too long for a name, or with a NUL: text
            return name
        if kind_of(name):
            raise InputError(f"{name}: no such file")
        return name

    return [part(name) for name in names]


def write_media(result, path: Path, option: str = "--file") -> None:
    """Save a generated medium, atomically: an object with a method `save`, or an array."""
    import numpy as np

    if not path.suffix and hasattr(result, "save"):
        raise InputError(f"{option} {path}: found no extension, expected one such as .png or .wav")
    if path.suffix not in ("", ".npy") and not hasattr(result, "save"):
        raise InputError(f"{option} {path}: found the extension {path.suffix!r}, expected .npy, as an array is written")
    special = os.path.exists(path) and not path.is_file()  # a pipe or a device is written directly
    part = path if special else path.with_name(f".{path.stem[:64]}.{os.getpid()}{path.suffix}")
    try:
        if hasattr(result, "save"):
            result.save(part)
        else:
            with open(part, "wb") as file:
                np.save(file, result)
        if not special:
            os.replace(part, path)
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # of the writer that the extension chose
        raise InputError(f"{option} {path}: cannot be written ({str(error).replace(str(part), str(path))})") from None
    finally:
        if not special:
            with suppress(OSError):
                part.unlink()
