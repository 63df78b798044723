"""Media of the command line: what its words name, and files of what was generated."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mmtx.errors import InputError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+|data:\S+,\S*")  # "see https://example.org" is text


def parts_of(names: Sequence[str]) -> list:
    """Words of the command line: files and URLs are media, the rest is text."""
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
    """Save what was generated, which appears whole or not at all: what has a method `save`, or an array."""
    import numpy as np

    if not path.suffix and hasattr(result, "save"):
        raise InputError(f"{option} {path}: found no extension, expected one such as .png or .wav")
    special = path.exists() and not path.is_file()  # a pipe or a device gets it straight
    part = path if special else path.with_name(f".{path.stem[:64]}.{os.getpid()}{path.suffix}")
    try:
        if hasattr(result, "save"):
            result.save(part)
        else:
            with open(part, "wb") as file:
                np.save(file, result)
        if not special:
            os.replace(part, path)
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # of what the extension chose
        raise InputError(f"{option} {path}: cannot be written ({str(error).replace(str(part), str(path))})") from None
    finally:
        if not special:
            part.unlink(missing_ok=True)
