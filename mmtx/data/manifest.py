"""Manifests: rows of JSON, or of a table with a header, in the forms of `mmtx.data.forms`; their paths start beside them."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO

from mmtx.data.fields import MAX_ROW, attempt, decode, json_object, lines, objects, reason, renamed, shown
from mmtx.data.forms import turns_of
from mmtx.data.sample import Media, Sample, known_kind, suffix
from mmtx.data.storage import DatasetSource, FileSource, display, folder_of, is_url, open_binary, uncached
from mmtx.data.trust import Base
from mmtx.errors import InputError

Fields = Mapping[str, str | None] | None  # that of a `DataSource`


def read_manifest(path: str, trusted: bool = False, fields: Fields = None) -> Iterator[Sample | InputError]:
    name = display(path)
    with open_binary(path) as file:
        base = Base(folder_of(uncached(path)), file.private, trusted)
        for number, row in MANIFESTS[suffix(path)](file, name):
            yield attempt(partial(_row, row, base, number, f"{name} row {number}", fields))


def _row(row: bytes | dict[str, Any] | InputError | None, base: Base, number: int, where: str, fields: Fields) -> Sample:
    if isinstance(row, InputError):
        raise row
    if row is None:
        raise InputError(f"{where}: found more than {MAX_ROW} bytes, the most for a row")
    return parse_row(json_object(row, where) if isinstance(row, bytes) else row, base, number, where, fields)


def _json_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes | None]]:
    for number, line in enumerate(lines(file, name), 1):
        if line is None or line.strip():
            yield number, line


def _json_list(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes | None]]:
    yield from enumerate(objects(file, name), 1)


def _table(delimiter: str, file: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, str] | InputError]]:
    """Rows behind the header, of which empty cells are absent fields."""
    def texts() -> Iterator[str]:
        for number, line in enumerate(lines(file, name), 1):
            if line is None:
                raise InputError(f"{name} line {number}: found more than {MAX_ROW} bytes, the most for a row")
            yield decode(line, f"{name} line {number}") + "\n"

    reader, header, number = csv.reader(texts(), delimiter=delimiter, strict=True), None, 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if header is None:
                raise InputError(f"{name}: no header that can be read ({reason(error)})") from None
            number += 1
            yield number, InputError(f"{name} row {number}: not a row of a table ({reason(error)})")
            continue
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if "" in header or len(set(header)) < len(header):
                raise InputError(f"{name}: found the header {shown(header)}, expected a different name in each column")
            continue
        number += 1
        if len(cells) != len(header):
            yield number, InputError(f"{name} row {number}: found {len(cells)} cells, expected {len(header)} as the header has")
        else:
            yield number, {column: cell for column, cell in zip(header, cells) if cell}


# Extension -> how its rows are read.
MANIFESTS: dict[str, Callable[[BinaryIO, str], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines, ".json": _json_list, ".csv": partial(_table, ","), ".tsv": partial(_table, "\t")}


def parse_row(row: dict[str, Any], base: Base, number: int, where: str, fields: Fields = None) -> Sample:
    row, aside = renamed(row, fields)
    key = next((row.pop(name) for name in ("key", "id") if name in row), number)
    if not isinstance(key, (str, int)):
        raise InputError(f"{where}: the key is {shown(key)}, expected a string or a number")
    turns = turns_of(row, where, lambda value, kind, at: _media(value, kind, base, where, at))
    return Sample(str(key), turns, row | aside, where)


def _media(value: Any, kind: str, base: Base, where: str, at: str) -> Media:
    if isinstance(value, DatasetSource):
        return Media(kind, where if value.place is None else f"{where}: {at}", value)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: field {at!r} is {shown(value)}, expected a path or URL")
    path = base.join(value)
    if refusal := base.refusal(path):
        raise InputError(f"{where}: field {at!r} names {display(path)}: {refusal}")
    if known_kind(path) not in (kind, None):
        raise InputError(f"{where}: field {at!r} names {display(path)}, which is no {kind} file")
    if not is_url(path) and not os.path.isfile(path):
        raise InputError(f"{where}: field {at!r} names {display(path)}: no such file")
    return Media(kind, f"{where}: {display(path)}", FileSource(path, base=base))
