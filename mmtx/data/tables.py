"""The rows of CSV and TSV files with a header, as they are written by spreadsheet programs and by programs that quote nothing."""

import csv
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import BinaryIO

from mmtx.data.fields import reason, shown
from mmtx.data.text_files import MAX_ROW, lines
from mmtx.errors import InputError

QUOTED = re.compile('"(?:[^"]|"")*"')  # a quoted cell, as spreadsheet programs write it
DECLARED = re.compile(r"sep=([,;])\s*")        # a first line that tells Excel the separator
INVALID_UTF8 = re.compile("[\udc80-\udcff]")   # a byte that is not UTF-8
MOST_LINES = 100  # of a cell of a TSV file: each new line is parsed with all before it


def read_table(rows: Callable[[Iterator[str]], Iterator[list[str] | str]], separators: str, file: BinaryIO,
           name: str) -> Iterator[tuple[int, dict[str, str | None] | InputError]]:
    """The rows after the header, with empty cells as null; `rows` splits lines into cells, or yields why it cannot."""
    def texts() -> Iterator[str]:
        for number, line in enumerate(lines(file, name), 1):
            if line is None:
                raise InputError(f"{name} line {number}: found more than {MAX_ROW} bytes, the most for a row")
            yield line.decode("utf-8-sig", "surrogateescape") + "\n"

    csv.field_size_limit(max(MAX_ROW, csv.field_size_limit()))  # of the whole process, by default 128 kB
    header, number = None, 0
    for cells in rows(texts()):
        if not isinstance(cells, str) and not any(map(str.strip, cells)):  # an empty line, or commas alone, as spreadsheets write
            continue
        if header is None:
            if isinstance(cells, str):
                raise InputError(f"{name}: no header that can be read ({cells})")
            header = [cell.strip() for cell in cells]
            if any(map(INVALID_UTF8.search, header)):
                raise InputError(f"{name}: found the header {shown(header)}, which is not UTF-8, expected UTF-8 text")
            if len(header) == 1 and re.search(r"[,;\t|]", header[0]):
                raise InputError(f"{name}: found the header {shown(header)}, expected columns separated by {separators}")
            if "" in header or len(set(header)) < len(header):
                raise InputError(f"{name}: found the header {shown(header)}, expected a different name in each column")
            continue
        number += 1
        if isinstance(cells, str):
            yield number, InputError(f"{name} row {number}: not a row of a table ({cells})")
        elif stray := [place for place, cell in enumerate(cells) if INVALID_UTF8.search(cell)]:
            column = shown(header[stray[0]]) if stray[0] < len(header) else "after the last"
            yield number, InputError(f"{name} row {number}: the column {column} is not UTF-8 text, expected a table saved as UTF-8")
        elif len(cells) != len(header):
            yield number, InputError(f"{name} row {number}: found {len(cells)} cells, expected {len(header)} as the header has")
        else:
            yield number, {column: cell.strip() or None for column, cell in zip(header, cells)}


def csv_rows(texts: Iterator[str]) -> Iterator[list[str] | str]:
    """The rows of a CSV file, or why a line is not one; Excel writes semicolons where the comma is the decimal point."""
    blank, header = 0, next(texts, "")
    while header and not header.strip():
        blank, header = blank + 1, next(texts, "")
    if declared := DECLARED.fullmatch(header):
        separator, header = declared[1], "\n"
    else:
        separator = ";" if ";" in header and "," not in QUOTED.sub("", header) else ","
    texts = chain(["\n"] * blank, [header], texts)  # all lines count in the numbers of errors
    reader = csv.reader(texts, delimiter=separator, strict=True, skipinitialspace=True)
    while True:
        first = reader.line_num + 1
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reason(error)
            for _ in range(first, reader.line_num):  # each line swallowed by a quote is a missing row
                yield f"a quote is open since line {first}"


def tsv_rows(texts: Iterator[str]) -> Iterator[list[str] | str]:
    """The rows of a TSV file, or why a line is not one.

    A line with as many cells as the header is a row; its quotes are literal unless they enclose a whole cell, since most
    programs that write tabs quote nothing. A line with another number of cells may be part of a quoted cell of several lines.
    """
    width, held = 0, list[str]()  # lines of a row that is not complete

    def plain(text: str) -> list[str]:
        return [cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell for cell in text.rstrip("\r\n").split("\t")]

    def joined(some: list[str]) -> list[str] | None:
        """The row that the lines form together, if they form exactly one."""
        reader = csv.reader(some, delimiter="\t", strict=True)
        try:
            cells = next(reader)
        except csv.Error:
            return None
        return cells if reader.line_num == len(some) else None

    def lost() -> Iterator[list[str] | str]:
        for text in held:
            yield cells if len(cells := plain(text)) == width else "a quote that is not closed"
        held.clear()

    for text in texts:
        cells = plain(text)
        if not width and cells == [""]:
            continue
        width = width or len(cells)
        if len(cells) == width:
            # Further cells may follow the end of a multi-line cell; a cell with both tabs and line breaks is not accepted.
            if held and (row := joined([*held, text])) is not None and len(row) == width and not any("\t" in cell for cell in row):
                held.clear()
                yield row
                continue
            yield from lost()
            if cells[-1].startswith('"') and cells[-1].count('"') % 2:  # the next line tells whether the cell goes on
                held.append(text)
            else:
                yield [] if cells == [""] else cells
            continue
        held.append(text)
        if (row := joined(held)) is not None:
            held.clear()
            yield row
        elif len(held) == MOST_LINES:
            yield from lost()
    yield from lost()
