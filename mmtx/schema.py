"""Checks values against annotations: those of JSON files before anything is built from them, and arguments of programs.

The annotated fields of a dataclass are the schema of a JSON object: every field is present, with a value of its type, and no
other field is. The dataclass itself checks ranges and how values fit together. `typed` does the same for the arguments of a
function or class of the Python API, where other types of Python may stand for those of the annotation.
"""

import dataclasses
import inspect
import math
import os
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mmtx.errors import InputError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
WHOLE = 2**63  # bound of the absolute value of integers
MOST_ITEMS = 2**16  # of a list
UNIONS, LISTS = (Union, types.UnionType), (list, tuple, Sequence)


def shown(value: Any, most: int = 60, contents: bool = False) -> str:
    """A value for an error message, on one line of `most` characters; a list or object is its type, or its `contents`."""
    if isinstance(value, int) and abs(value) > 10**30:  # Python refuses to print thousands of digits
        return "a number beyond all bounds"
    if isinstance(value, str | bytes):
        value = value[:200]
    text = repr(value) if contents or isinstance(value, int | float | str | None) else type(value).__name__
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
    if origin in UNIONS:
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


def typed(checked: F) -> F:
    """Check the arguments of a function, method or class against their annotations: a decorator, above that of a dataclass.

    Wrong ones raise an InputError that names function and argument. A path may stand for a str, a list for a tuple, a number of
    NumPy for Python's, and a mapping for a dataclass.
    """
    function: Any = vars(checked)["__init__"] if isinstance(checked, type) else checked
    plain, at = inspect.signature(function), checked.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def checking(*args: Any, **options: Any) -> Any:
        try:
            given = plain.bind(*args, **options)
        except TypeError:
            return function(*args, **options)  # which raises Python's own error
        hints = _kinds(checked) if dataclasses.is_dataclass(checked) else _hints(function)
        for name, value in given.arguments.items():
            if name in hints and plain.parameters[name].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                given.arguments[name] = fitted(hints[name], value, f"{at}: {name}")
        return function(*given.args, **given.kwargs)

    if isinstance(checked, type):
        checked.__init__ = checking  # type: ignore[misc]  # of the class itself, not of an instance
        return checked
    return checking  # type: ignore[return-value]  # with the signature of F


def fitted(kind: Any, value: Any, name: str) -> Any:
    """The value as the annotation `kind` has it. Raises InputError that begins with `name` if it cannot be."""
    if not _fits(kind, value):
        raise InputError(f"{name}: found {shown(value)}, expected {_wanted(kind)}")
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in UNIONS:
        kinds = [each for each in inner if _fits(each, value)]
        if isinstance(value, Mapping):  # of several dataclasses, the one that shares most fields with it
            kinds.sort(key=lambda each: -len({*_kinds(each)} & {*value}) if _is_dataclass(each) else 0)
        return fitted(kinds[0], value, name)
    if _is_dataclass(origin) and isinstance(value, Mapping):
        try:
            inspect.signature(origin).bind(**value)
        except TypeError as error:
            raise InputError(f"{name}: {error}, expected {_shortened(_kinds(origin))}") from None
        return origin(**value)
    if origin in LISTS and inner:
        kinds = inner if origin is tuple and inner[-1] is not ... else inner[:1] * len(value)
        items = [fitted(each, item, f"{name}[{i}]") for i, (each, item) in enumerate(zip(kinds, value, strict=True))]
        return tuple(items) if origin is tuple else items
    if isinstance(value, Mapping) and len(inner) == 2:
        return {key: fitted(inner[1], item, f"{name}[{shown(key)}]") for key, item in value.items()}
    if origin is str:
        return os.fspath(value)
    return origin(value) if origin in (int, float) and not isinstance(value, int | float) else value


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value may stand for one of the annotation `kind`, apart from its items."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in UNIONS:
        return any(_fits(each, value) for each in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is Iterable:
        return isinstance(value, Iterable) and not isinstance(value, str | bytes)
    if origin in LISTS:
        return isinstance(value, list | tuple) and (origin is not tuple or inner[-1:] in ((), (...,)) or len(value) == len(inner))
    if origin in (int, float):
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
    if origin is str or _is_dataclass(origin):
        return isinstance(value, (origin, os.PathLike if origin is str else Mapping))
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def _is_dataclass(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _wanted(kind: Any) -> str:
    """An annotation in words."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in UNIONS:
        return " or ".join(map(_wanted, inner))
    if origin in LISTS and inner:
        if get_origin(inner[0]) in UNIONS:
            return "a list of values"
        return "a list of " + {str: "strings", int: "whole numbers", float: "numbers"}.get(inner[0], _wanted(inner[0]))
    if origin is Literal or kind in (bool, int):
        return _expected(kind)
    return {type(None): "None", str: "a string", Path: "a path", float: "a number"}.get(kind, getattr(origin, "__name__", str(kind)))


def within(what: str, value: float, least: float, most: float) -> None:
    """Raise InputError unless `value` is a number from `least` to `most`."""
    if not (isinstance(value, Real) and least <= value <= most):
        raise InputError(f"{what}: found {shown(value)}, expected {least} or more, and {most} at most")


@lru_cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function)


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
