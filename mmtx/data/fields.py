"""Values of the fields of a row: valid, or an error that names the row and the field."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from mmtx import schema
from mmtx.errors import InputError

shown = partial(schema.shown, most=80, contents=True)


def pop_text(row: dict[str, Any], names: tuple[str, ...], where: str, missing: Sequence[str] = ()) -> str:
    """The first of some texts; `missing` are those that the row should have, but has not."""
    for name in names:
        if name in row:
            return text_of(row.pop(name), where, name)
    if missing:
        raise InputError(f"{where}: field {missing[0]!r} is empty or missing, expected text; found the fields {shown(sorted(row))}")
    raise InputError(f"{where}: no field {' or '.join(map(repr, names))}, found the fields {shown(sorted(row))}; expected one, or "
                     f"its name in `fields`, as in {names[0]}: NAME")


def pop_number(row: dict[str, Any], name: str, least: float, where: str) -> float | None:
    """A number of at least `least`, or text of one, as all values of a table are; None if the field is absent."""
    if name not in row:
        return None
    found = row.pop(name)
    try:
        value = math.nan if isinstance(found, bool) else float(found)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not least <= value < math.inf:
        point = " with a decimal point" if isinstance(found, str) and "," in found else ""
        raise InputError(f"{where}: field {name!r} is {shown(found)}, expected a number of at least {least:g}{point}")
    return value


def text_of(value: Any, where: str, at: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: field {at!r} is {shown(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: field {at!r} contains a lone surrogate, expected Unicode text") from None
    return value


def reason(error: Exception) -> str:
    """The message of a parser's error, short and on one line."""
    return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:120]
