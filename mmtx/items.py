"""Lists as arguments of the API: one item or several, each checked, with errors that number it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import IOBase
from typing import Any

from mmtx.errors import InputError
from mmtx.medium import Sound, is_waveform


def is_list(item: Any) -> bool:
    """Whether several media are given: a list or another sequence, an iterator, or a column of a table.

    A `Sound` is a tuple, but one medium, and so is a sound with its rate.
    """
    if isinstance(item, (Sequence, Iterator)):
        return not (isinstance(item, (str, bytes, bytearray, memoryview, Sound, IOBase)) or is_waveform(item))
    # Columns of pandas, and arrays of names or objects.
    return getattr(item, "ndim", 0) == 1 and getattr(getattr(item, "dtype", None), "kind", "") in ("O", "U")


def iterate(items: Any, name: str) -> Iterator[Any]:
    """Iterate over several items. Raises InputError for a single one, even if it is iterable, as a str is."""
    try:
        if isinstance(items, (str, bytes, Sound)):
            raise TypeError
        return iter(items)
    except TypeError:
        raise InputError(f"{name}s: found {type(items).__name__}, expected a list of {name}s") from None


@contextmanager
def numbered(name: str, number: int, count: int) -> Iterator[None]:
    """Errors in this context state which of several items they concern."""
    try:
        yield
    except InputError as error:
        if count == 1:
            raise
        raise InputError(f"{name} {number + 1} of {count}: {error}") from error


def map_numbered(items: Iterable[Any], make: Callable[[Any], Any], name: str = "item") -> list[Any]:
    """Apply `make` to each item; errors state its number."""
    items, made = [*items], []
    for number, item in enumerate(items):
        with numbered(name, number, len(items)):
            made.append(make(item))
    return made


def typed_list(items: Any, name: str, kinds: type | tuple[type, ...], expected: str) -> list[Any]:
    """A list of items of some types. Raises InputError that names the first item of another type."""
    def checked(item: Any) -> Any:
        if not isinstance(item, kinds):
            raise InputError(f"found {type(item).__name__}, expected {expected}")
        return item

    return map_numbered(iterate(items, name), checked, name)
