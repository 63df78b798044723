"""Hugging Face datasets as rows of a manifest. Needs the package `datasets`: pip install "mmtx[hf]".

A source is `hf://NAME`, `hf://NAME:SPLIT` (NAME as `datasets.load_dataset` takes it: of the hub, or a folder), or a folder
that `save_to_disk` wrote. mmtx reads and decodes pictures and sounds itself, on demand.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmtx.data.storage import DatasetSource, display, scrub
from mmtx.data.trust import Base, is_url
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
    single, listed = ({column for column, kind in found.features.items() if is_media(kind)}
                      for is_media in (_is_media, lambda kind: _is_media(getattr(kind, "feature", None))))
    for column in (*single, *listed):
        found = found.cast_column(column, _encoded(found.features[column]))
    given = [column for column in found.column_names if column in single or column in listed]
    texts = found.remove_columns(given)
    for start in range(0, len(found), BATCH):
        batch = range(start, min(start + BATCH, len(found)))
        # As Arrow tables: nothing is decoded, and bytes stay on disk.
        there = found.select_columns(given).with_format("arrow")[batch] if given else None
        rows = texts.select(batch) if texts.column_names else ({} for _ in batch)
        for place, (number, row) in enumerate(zip(batch, rows)):
            for column in given:
                cell = there[column][place]
                if not cell.is_valid:
                    row[column] = None
                elif column in single:
                    row[column] = DatasetSource(found, number, column, base)
                else:
                    row[column] = [DatasetSource(found, number, column, base, at) for at in range(len(cell))]
            yield row


def _is_media(kind: Any) -> bool:
    import datasets

    return isinstance(kind, (datasets.Image, datasets.Audio)) or type(kind).__name__ in ("Video", "Pdf")


def _encoded(kind: Any) -> Any:
    """The same type of column, with decoding turned off."""
    return type(kind)(_encoded(kind.feature)) if hasattr(kind, "feature") else type(kind)(decode=False)
