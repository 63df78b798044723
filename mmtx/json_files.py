"""JSON, read strictly and always written alike."""

import json
from pathlib import Path
from typing import Any

from mmtx.errors import InputError
from mmtx.files import read_bytes

MOST_JSON = 2**20  # bytes of a JSON file


def read_json(path: str | Path) -> Any:
    """The value of a JSON file of at most MOST_JSON bytes. Raises InputError if it is missing, too large or malformed."""
    return parse_json(read_bytes(path, MOST_JSON), path)


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
