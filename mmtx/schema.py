"""Checks values of JSON files against dataclasses before anything is built from them.

The annotated fields of a dataclass are the schema: every field is present, with a value of its type, and no other field
is. The dataclass itself checks ranges and how values fit together.
"""

import dataclasses
import math
import types
from collections.abc import Collection, Mapping
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mmtx.errors import InputError

T = TypeVar("T")
WHOLE = 2**63  # bound of the absolute value of integers
MOST_ITEMS = 2**16  # of a list


def shown(value: Any, most: int = 60) -> str:
    """A value as text of at most `most` characters on one line, for error messages."""
    if isinstance(value, int) and abs(value) > 10**30:  # Python refuses to print thousands of digits
        return "a number beyond all bounds"
    text = ascii(value) if isinstance(value, int | float | str | None) else type(value).__name__
    return text if len(text) <= most else text[:most - 3] + "..."


def build(cls: type[T], value: Any, where: str | Path, name: str = "", optional: Collection[str] = ()) -> T:
    """An instance of a dataclass from a JSON object. Raises InputError that names `where` and the field.

    `name` is the field of the file that holds the object. Fields in `optional`, and in the class's own `OPTIONAL`, may be
    missing.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: {f'field {name!r} is' if name else 'found'} {shown(value)}, expected an object")
    kinds = _kinds(cls)  # type: ignore[arg-type]  # classes are hashable
    at = f"{name}." if name else ""
    for key in value:
        if key not in kinds:
            raise InputError(f"{where}: found the unknown field {shown(at + key)}, expected {_shortened(kinds)}")
    for key in kinds:
        if key not in value and key not in optional and key not in getattr(cls, "OPTIONAL", ()):
            raise InputError(f"{where}: found no field {at + key!r}, expected all of {_shortened(kinds)}")
    made = {key: check(kinds[key], item, where, at + key) for key, item in value.items()}
    try:
        return cls(**made)
    except InputError as error:
        raise InputError(f"{where}: {f'field {name!r}: ' if name else ''}{error}") from None


def check(kind: Any, value: Any, where: str | Path, name: str) -> Any:
    """The value if it is of type `kind`, with lists as tuples and objects as dataclasses. Raises InputError otherwise."""
    if kind is Any:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, where, name)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        kinds = [item for item in inner if item is not type(None)]
        if all(map(dataclasses.is_dataclass, kinds)) and isinstance(value, dict):  # the one that shares most fields with it
            kinds = [max(kinds, key=lambda item: len({*_kinds(item)} & {*value}))]
        return check(kinds[0], value, where, name)
    if origin is Literal and isinstance(value, str) and value in inner:
        return value
    if origin is tuple and isinstance(value, list) and len(value) <= MOST_ITEMS:
        return tuple(check(inner[0], item, where, f"{name}[{i}]") for i, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: check(inner[1], item, where, f"{name}.{key[:40]}") for key, item in value.items()}
    # To Python a bool is an int. An integer may stand for a float, and stays an integer, since fingerprints hash the text.
    if kind is bool and isinstance(value, bool) or kind is str and isinstance(value, str):
        return value
    if not isinstance(value, bool) and isinstance(value, int) and kind in (int, float) and abs(value) < WHOLE:
        return value
    if kind is float and isinstance(value, float) and math.isfinite(value):
        return value
    raise InputError(f"{where}: field {shown(name)} is {shown(value)}, expected {_expected(kind)}")


def within(what: str, value: float, least: float, most: float) -> None:
    """Raise InputError unless `value` is a number from `least` to `most`."""
    if not (isinstance(value, Real) and least <= value <= most):
        raise InputError(f"{what}: found {shown(value)}, expected {least} or more, and {most} at most")


@lru_cache
def _kinds(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _shortened(names: Collection[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 120 else text[:117] + "..."


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of {MOST_ITEMS} values at most"
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    return names.get(kind, "an object")
