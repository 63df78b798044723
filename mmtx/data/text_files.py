"""UTF-8 text and JSON, line by line or object by object.

Limits apply before anything is kept: the bytes of a row, and the nesting depth of its values.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from mmtx.data.fields import reason, shown
from mmtx.errors import InputError
from mmtx.json_files import STRICT_JSON

MAX_ROW = 32 * 2**20  # bytes of a row of a manifest: room for a picture of 24 MB in base64
MAX_DEPTH = 32        # nested lists and objects: pickle and repr fail at a few hundred
CHUNK = 2**20         # bytes per read
SPACE = re.compile(r"[ \t\n\r]*")

# First bytes of files that are often taken for text or a tar.
MAGIC_BYTES = {
    b"\xff\xfe\0\0": "UTF-32 text", b"\0\0\xfe\xff": "UTF-32 text", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"\x04\x22\x4d\x18": "LZ4",
    b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!": "a RAR archive",
    b"PAR1": "Parquet", b"ARROW1": "Arrow", b"SQLite format 3": "an SQLite database",
}


def file_type_of(head: bytes) -> str | None:
    """The kind of a file by its first bytes, if it is one of MAGIC_BYTES."""
    return next((name for beginning, name in MAGIC_BYTES.items() if head.startswith(beginning)), None)


def _check_text(head: bytes, where: str) -> None:
    """Raise InputError for a file whose first bytes show that it is not UTF-8."""
    # UTF-16 or UTF-32 without a byte-order mark: every other byte is zero, or three of four.
    zeros = tuple(place for place in range(min(len(head), 4)) if head[place] == 0)
    wide = {(1, 3): "UTF-16 text", (0, 2): "UTF-16 text", (1, 2, 3): "UTF-32 text", (0, 1, 2): "UTF-32 text"}
    if found := file_type_of(head) or wide.get(zeros):
        raise InputError(f"{where}: found {found}, expected UTF-8 text")


def lines(file: BinaryIO, where: str) -> Iterator[bytes | None]:
    """The lines of a file of UTF-8 text without line breaks; None stands for one of more than MAX_ROW bytes.

    Raises InputError if the file as a whole is something else.
    """
    rest, skipping, first = b"", False, True
    while chunk := file.read(CHUNK):
        if first:
            _check_text(chunk[:16], where)
        first = False
        *whole, tail = chunk.split(b"\n")
        if whole and skipping:
            yield None
            del whole[0]
            skipping, rest = False, b""
        elif whole:
            whole[0] = rest + whole[0]
            rest = b""
        yield from (line if len(line) <= MAX_ROW else None for line in whole)
        rest = b"" if skipping else rest + tail
        if len(rest) > MAX_ROW:
            rest, skipping = b"", True
    if skipping:
        yield None
    elif rest:
        yield rest


def objects(file: BinaryIO, where: str) -> Iterator[bytes | None]:
    """The objects of a JSON list, or of concatenated JSON, as bytes; None for one of more than MAX_ROW bytes.

    One is in memory at a time. Raises InputError where what follows is no object, or has no end within MAX_ROW bytes.
    """
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)  # only the ends of objects matter here
    text, place, number, ended = "", 0, 0, False
    chunks = _texts(file, where)
    listed = closed = False
    while True:
        place = SPACE.match(text, place).end()
        if place == len(text):
            text, place = next(chunks, None), 0
            if text is None:
                break
            continue
        at = f"{where} row {number + 1}"
        if closed:
            raise InputError(f"{where}: found {shown(text[place:place + 60])} after the end of the list")
        letter = text[place]
        if not number and not listed and letter == "[":
            listed, place = True, place + 1
        elif listed and letter == "]":
            closed, place = True, place + 1
        elif number and letter == ",":
            place += 1
        elif letter != "{":
            raise InputError(f"{at}: found {shown(text[place:place + 60])}, expected a JSON object")
        else:
            want = CHUNK
            while True:
                try:
                    _, end = decoder.raw_decode(text, place)
                    break
                except (ValueError, RecursionError) as error:
                    # An incomplete object cannot be told from an invalid one.
                    if ended or len(text) - place > MAX_ROW or isinstance(error, RecursionError):
                        found = shown(text[place:place + 60])
                        raise InputError(f"{at}: not JSON ({reason(error)}), found {found}") from None
                text, place, had = text[place:], 0, len(text) - place
                while len(text) < had + want and not ended:
                    more = next(chunks, None)
                    ended, text = more is None, text + (more or "")
                want = len(text)
            yield text[place:end].encode() if end - place <= MAX_ROW else None
            number, place = number + 1, end
    if listed and not closed:
        raise InputError(f"{where}: ends after row {number}, expected the end of the list")


def _texts(file: BinaryIO, where: str) -> Iterator[str]:
    """The text of a UTF-8 file, piece by piece."""
    decoder, place = codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        while chunk := file.read(CHUNK):
            if not place:
                _check_text(chunk[:16], where)
            yield decoder.decode(chunk)
            place += len(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 after byte {place} ({error.reason})") from None


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object, in which no field occurs twice."""
    try:
        row = STRICT_JSON.decode(decode(data, where))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not JSON ({reason(error)}), found {shown(data[:60])}") from None
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(row) > MAX_DEPTH:
        raise InputError(f"{where}: not JSON that can be used (more than {MAX_DEPTH} nested lists and objects)")
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {shown(row)}, expected a JSON object")
    return row


def _depth(value: Any) -> int:
    """The nesting depth of lists and objects, counted up to MAX_DEPTH + 1."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        inside = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        depth, level = depth + bool(inside), [item for items in inside for item in items]
    return depth


def decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _check_text(data[:16], where)
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from None
