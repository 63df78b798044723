"""Fields of a row: text and JSON that are what they should be, or an error that names the row and the field."""

import json
from collections.abc import Callable
from typing import Any

from mmtx.data.sample import Sample
from mmtx.errors import InputError


def attempt(parse: Callable[[], Sample]) -> Sample | InputError:
    try:
        return parse()
    except InputError as error:
        return error


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object without its null fields, which stand for absent ones."""
    try:
        row = json.loads(decode(data, where))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}), found {shown(data[:60])}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {shown(row)}, expected a JSON object")
    return {name: value for name, value in row.items() if value is not None}


def decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from None


def pop_text(row: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in row:
            return text_of(row.pop(name), where, name)
    raise InputError(f"{where}: no field {' or '.join(map(repr, names))}, found the fields {sorted(row)}")


def text_of(value: Any, where: str, at: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: field {at!r} is {shown(value)}, expected text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{where}: field {at!r} holds half a surrogate pair, expected Unicode text")
    return value


def shown(value: Any) -> str:
    """What was found, on one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
