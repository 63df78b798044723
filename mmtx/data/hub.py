"""Hugging Face datasets as rows of a manifest. Needs the package `datasets`: pip install "mmtx[hf]".

A source is `hf://NAME`, `hf://NAME:SPLIT` (NAME as `datasets.load_dataset` takes it: of the hub, or a folder), or a folder
that `save_to_disk` wrote. mmtx reads and decodes pictures and sounds itself, on demand.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mmtx.data.storage import DatasetSource, display, scrub
from mmtx.data.trust import Base
from mmtx.data.urls import is_url
from mmtx.errors import InputError

PREFIX = "hf://"
BATCH = 1000  # rows that are read at once


def is_dataset(path: str) -> bool:
    """Whether a path names a dataset of the hub, or a folder of `save_to_disk`."""
    inside = lambda name: os.path.isfile(os.path.join(path, name))
    return path.startswith(PREFIX) or inside("dataset_dict.json") or inside("state.json") and inside("dataset_info.json")


def base_of(path: str, trusted: bool = False) -> Base:
    """What the rows of a dataset may name: as for a manifest, which counts as one at a URL if the dataset is from the hub.

    The only local files that a dataset of the hub may name are those that the library caches for it.
    """
    name = path.removeprefix(PREFIX).partition(":")[0]
    if not path.startswith(PREFIX) or os.path.isdir(name):
        return Base(trusted=trusted)
    try:
        from datasets.config import DOWNLOADED_DATASETS_PATH
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return Base(f"{PREFIX}datasets/{name}", trusted=trusted)
    caches = str(DOWNLOADED_DATASETS_PATH), os.path.join(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    return Base(f"{PREFIX}datasets/{name}", trusted=trusted, caches=caches)


class _Refused(Exception):
    """Raised for a file that a data set may not name."""


_patching = threading.Lock()


@contextmanager
def _checked_files(base: Base) -> Iterator[None]:
    """A context in which the library refuses files that the card of a data set names and its rows may not.

    The library resolves such names in one function, which has no option to restrict them, so that function is patched.
    """
    from datasets import data_files

    def judged(pattern: str, base_path: str, *arguments: Any, **options: Any) -> list[str]:
        path = pattern if is_url(pattern) else os.path.join(base_path, pattern)
        own = path.startswith(PREFIX) and not is_url(pattern)  # under the hub's own name for it, which may differ
        if "::" in path and (own or not is_url(path)):
            refusal = "found several URLs in a row, expected one"
        else:
            refusal = None if own else base.refusal(path)
        if refusal:
            raise _Refused(f"its card names {display(path)}: {refusal}")
        return resolve(pattern, base_path, *arguments, **options)

    with _patching:
        resolve, data_files.resolve_pattern = data_files.resolve_pattern, judged
        try:
            yield
        finally:
            data_files.resolve_pattern = resolve


def rows(path: str, base: Base | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a dataset, in order; pictures and sounds as `DatasetSource`, or None for an empty cell.

    `base`: what the rows may name. Raises InputError if the dataset cannot be opened, or has several splits and none is named.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f'{display(path)}: needs the package datasets (pip install "mmtx[hf]")') from None
    name, _, split = path.removeprefix(PREFIX).partition(":")
    failure = None
    try:
        if path.startswith(PREFIX):
            with _checked_files(base or Base()):
                found = datasets.load_dataset(name, split=split or None)
        else:
            found = datasets.load_from_disk(path)
    except _Refused as refusal:
        failure = f"{display(path)}: {refusal}"
    except Exception as error:  # the library, pyarrow and the hub raise classes of their own
        failure = (f"{display(path)}: cannot be opened as a dataset ({type(error).__name__}: "
                   f"{' '.join(scrub(str(error)).split())[:200]})")
    if failure:
        raise InputError(failure)
    if isinstance(found, dict):
        if len(found) > 1:
            how = f"{PREFIX}{name}:{next(iter(found))}" if path.startswith(PREFIX) else os.path.join(path, next(iter(found)))
            raise InputError(f"{display(path)}: found the splits {', '.join(found)}, expected the name of one, as in {how}")
        found = next(iter(found.values()))
    found = found.with_format(None)  # `save_to_disk` also saves what `set_format` asked for, such as tensors or some columns only
    given = [field.name for field in found.features.arrow_schema if _has_media(field.type)]
    texts, stored = found.remove_columns(given), found.with_format("arrow")  # which decodes nothing, and leaves bytes on disk
    classes = {column: kind.names for column, kind in texts.features.items() if isinstance(kind, datasets.ClassLabel)}
    for start in range(0, len(found), BATCH):
        batch = range(start, min(start + BATCH, len(found)))
        there = stored.select_columns(given)[batch] if given else None
        rows = texts.select(batch) if texts.column_names else ({} for _ in batch)
        for place, (number, row) in enumerate(zip(batch, rows)):
            for column, names in classes.items():
                row[column] = None if row[column] in (None, -1) else names[row[column]]  # -1: not known
            for column in given:
                row[column] = _value(there[column][place], DatasetSource(stored, number, column, base))
            yield row


def _value(cell: Any, source: DatasetSource) -> Any:
    """The value of a cell, an Arrow scalar, with a source in place of each picture or sound."""
    if not cell.is_valid or not _has_media(cell.type):
        return cell.as_py()
    if _is_media(cell.type):
        return source
    inner = lambda step: _value(cell[step], replace(source, place=(*source.place, step)))
    return [inner(place) for place in range(len(cell))] if _is_list(cell.type) else {name: inner(name) for name in cell}


def _has_media(kind: Any) -> bool:
    """Whether an Arrow type is that of pictures or sounds, or of lists or objects that hold some."""
    return _is_media(kind) or any(map(_has_media, [kind.value_type] if _is_list(kind) else _fields(kind).values()))


def _is_media(kind: Any) -> bool:
    """Whether an Arrow type is that of one medium: bytes, or an object with them, as which the library stores pictures and sounds."""
    return str(kind) in ("binary", "large_binary") or "bytes" in (inner := _fields(kind)) and _is_media(inner["bytes"])


def _is_list(kind: Any) -> bool:
    import pyarrow

    return isinstance(kind, (pyarrow.ListType, pyarrow.LargeListType, pyarrow.FixedSizeListType))


def _fields(kind: Any) -> dict[str, Any]:
    """The types of the fields of objects; none for other types."""
    import pyarrow

    return {field.name: field.type for field in kind} if isinstance(kind, pyarrow.StructType) else {}
