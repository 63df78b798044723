"""Manifests: rows of JSON or of a table with a header, in the forms of `mmtx.data.forms`; paths are relative to the manifest."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

from mmtx.data.field_names import empty_media, missing_texts
from mmtx.data.fields import shown
from mmtx.data.pairs import answers_of
from mmtx.data.read_options import ReadOptions
from mmtx.data.row_media import MediaReader
from mmtx.data.sample import Sample, attempt, suffix
from mmtx.data.storage import display, folder_of, open_binary, uncached
from mmtx.data.tables import csv_rows, read_table, tsv_rows
from mmtx.data.text_files import MAX_ROW, json_object, lines, objects
from mmtx.data.trust import Base
from mmtx.errors import InputError


def read_manifest(path: str, options: ReadOptions) -> Iterator[Sample | InputError]:
    name = display(path)
    with open_binary(path) as file:
        base = Base(folder_of(uncached(path)), file.private, options.trusted)
        for number, row in MANIFESTS[suffix(path)](file, name):
            yield attempt(_row, row, base, number, f"{name} row {number}", options)


def _row(row: bytes | dict[str, Any] | InputError | None, base: Base, number: int, where: str, options: ReadOptions) -> Sample:
    if isinstance(row, InputError):
        raise row
    if row is None:
        raise InputError(f"{where}: found more than {MAX_ROW} bytes, the most for a row")
    return parse_row(json_object(row, where) if isinstance(row, bytes) else row, base, number, where, options)


def _json_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes | None]]:
    for number, line in enumerate(lines(file, name), 1):
        if line is None or line.strip():
            yield number, line


def _json_list(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes | None]]:
    yield from enumerate(objects(file, name), 1)


# Extension -> reader of its rows.
MANIFESTS: dict[str, Callable[[BinaryIO, str], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines, ".json": _json_list, ".csv": partial(read_table, csv_rows, "commas or semicolons"),
    ".tsv": partial(read_table, tsv_rows, "tabs")}


def parse_row(row: dict[str, Any], base: Base, number: int, where: str, options: ReadOptions) -> Sample:
    options.seen.update(row)
    empty, missing = empty_media(row, options), missing_texts(row, options)
    row, ignored = options.rename({name: value for name, value in row.items() if name not in empty})
    key = next((row.pop(name) for name in ("key", "id") if name in row), number)
    if not isinstance(key, (str, int)):
        raise InputError(f"{where}: the key is {shown(key)}, expected a string or a whole number")
    turns, rejected = answers_of(row, MediaReader(where, base), empty=empty, captions=options.captions, missing=missing)
    return Sample(str(key), turns, row | ignored, where, rejected=rejected)
