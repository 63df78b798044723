"""Fields that look like media and are not read: rows with such a field are refused, so that no medium is dropped unnoticed."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from mmtx.data.field_names import kind_by_name, names
from mmtx.data.fields import shown
from mmtx.data.sample import known_kind
from mmtx.data.storage import DatasetSource
from mmtx.errors import InputError
from mmtx.modality.registry import media_kinds

MAX_INSPECTED = 64  # items that are examined of a list or object in an unread field


def refuse_unread(row: dict[str, Any], where: str, kinds: set[str], prefix: str = "") -> None:
    """Raise InputError if a field that was not read looks like a medium; `kinds` are those of the media that were read.

    Other fields may hold the name or URL of a medium that was read; these stay metadata.
    """
    for name, value in row.items():
        if isinstance(value, (str, list, dict, bytes, DatasetSource)) and value and (found := _unread(name, value, kinds)):
            kind, at, value = found
            what = "a video, which is" if kind == "video" else "which looks like a medium and is"
            raise InputError(f"{where}: field {prefix + at!r} is {shown(value)}, {what} not read; expected pictures and "
                             f"sounds in {', '.join(names().fields)}, or in what `fields` names")


def _unread(name: str, value: Any, kinds: set[str]) -> tuple[str | None, str, Any] | None:
    """Kind, name and value of an unread medium in a field, if there is one."""
    kind, numbered = kind_by_name(name, media_kinds())
    if kind and (kind not in kinds or numbered or isinstance(value, list) and len(value) > 1):
        return kind, name, value
    return _by_value(name, value, kinds)


def _by_value(name: str, value: Any, kinds: set[str], depth: int = 0) -> tuple[str | None, str, Any] | None:
    if isinstance(value, str):
        kind = _kind_by_value(value)
        return (kind, name, value) if kind and kind not in kinds else None
    if isinstance(value, (bytes, DatasetSource)):
        return None, name, value
    if isinstance(value, dict):
        items: Iterable = ((f"{name}.{key}", item) for key, item in value.items())
    else:
        items = ((f"{name}[{place}]", item) for place, item in enumerate(value))
    for at, item in islice(items, MAX_INSPECTED):
        if isinstance(item, (str, list, dict, bytes, DatasetSource)) and depth < 4:
            if found := _by_value(at, item, kinds, depth + 1):
                return found
    return None


def _kind_by_value(text: str) -> str | None:
    """The kind of medium that a text refers to, if it is a path, URL or data URL of one."""
    if text.startswith("data:"):
        kind = text[5:].partition("/")[0]
        return kind if kind in names().lookalikes else None
    if "." not in text[-6:] and "?" not in text and "#" not in text or len(text) > 4096 or "\n" in text:
        return None
    return known_kind(text.partition("#")[0])
