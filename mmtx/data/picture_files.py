"""Encoded pictures before decoding: keeps what the pixels need, and refuses what would take unbounded time or memory.

Decoders read far more than pixels: comments, profiles, thumbnails, later frames. Damage there makes them reject a whole
picture, and there a small file can take minutes or gigabytes, although none of it changes a pixel that is shown.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from mmtx.errors import InputError

MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535
MAX_SCANS = 500  # of a JPEG: encoders write 3 to 20
MAX_PARTS = 2**18  # chunks of a PNG, segments of a JPEG, blocks of a GIF, strips and tiles of a TIFF
MAX_TILE = 2**24  # pixels
MAX_RUNS = 8 * 2**20  # bytes of a run-length encoded BMP, which is decoded run by run
BITS, PHOTOMETRIC, ORIENTATION = 0x0102, 0x0106, 0x0112  # tags of TIFF: bits per sample, whether 0 is white, how to turn it
MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)  # neither byte stuffing nor a restart marker


class PictureFile(NamedTuple):
    """Bytes to decode, and the metadata that may hold the orientation."""

    data: bytes
    exif: bytes = b""
    xmp: bytes = b""


def picture_file(data: bytes, format: str, name: str) -> PictureFile:
    """The parts of `data` that its first picture needs. Raises InputError if decoding it could take unbounded time or memory."""
    prepare = {"JPEG": _jpeg, "PNG": _png, "GIF": _gif, "TIFF": _tiff, "BMP": _bmp, "AVIF": _iso, "HEIC": _iso}
    return prepare[format](data, name) if format in prepare else PictureFile(data)


def check_size(width: int, height: int, name: str) -> None:
    """Raise InputError for more pixels than the limits allow."""
    if not 0 < width * height <= MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise InputError(
            f"{name}: {width} x {height} pixels, expected 1 to {MAX_PIXELS} in all, at most {MAX_SIDE} a side"
        )


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """The EXIF orientation, from 1 (upright) to 8; 1 if it is missing or invalid."""
    for entry in tiff_entries(exif.removeprefix(b"Exif\0\0")):
        if entry.tag == ORIENTATION:
            return entry.value if entry.type in (3, 4) and 1 <= entry.value <= 8 else 1
    match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(match[1]) if match else 1


class Entry(NamedTuple):
    """A field of a TIFF directory: its offset, tag, type and count, and its value or the offset of its values."""

    place: int
    tag: int
    type: int
    count: int  # type: ignore[assignment]  # its name in the standard, which hides a method of tuples
    value: int


def tiff_entries(data: bytes) -> Iterator[Entry]:
    """The fields of the first directory of a TIFF, the format of EXIF too, as far as they are there."""
    orders: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}
    order = orders.get(bytes(data[:2]))
    if order is None:
        return
    number = lambda place, size: int.from_bytes(data[place : place + size], order)
    big = number(2, 2) == 43
    wide = 8 if big else 4  # bytes of an offset
    first = number(wide, wide) + (8 if big else 2)
    size = 4 + 2 * wide
    end = first + number(first - (8 if big else 2), 8 if big else 2) * size
    for place in range(first, min(end, len(data) - size + 1), size):
        type = number(place + 2, 2)
        value = number(place + 4 + wide, {1: 1, 3: 2, 4: 4}.get(type, wide))
        yield Entry(place, number(place, 2), type, number(place + 4, wide), value)


def _jpeg(data: bytes, name: str) -> PictureFile:
    """Drop comments and application segments, except JFIF's and Adobe's, which defines the colours."""
    kept, exif, xmp, scans, pixels, parts = [data[:2]], b"", b"", 0, 0, 0
    last = place = 2  # kept up to `last`, read up to `place`
    while match := MARKER.search(data, place):
        marker, place = match[1][0], match.end()
        if marker == 0xD9:  # end of image
            break
        if marker in (0x01, 0xD8):  # the other markers without a length
            continue
        end = place + int.from_bytes(data[place : place + 2], "big")
        payload = data[place + 2 : end] if 0xC0 <= marker < 0xD0 or marker == 0xE1 else b""
        if marker in (0xFE, 0xE1, *range(0xE2, 0xEE), 0xEF):
            if payload.startswith(b"Exif\0\0"):
                exif = exif or payload
            elif payload.startswith(b"http://ns.adobe.com/xap/"):
                xmp = xmp or payload
            kept.append(data[last : match.start()])
            last = end
        elif 0xC0 <= marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC) and not pixels:
            height, width = struct.unpack(">HH", payload[1:5]) if len(payload) >= 5 else (0, 0)
            pixels = height * width
        scans += marker == 0xDA
        parts += 1
        if parts > MAX_PARTS:
            raise InputError(f"{name}: a JPEG of more than {MAX_PARTS} segments")
        # Encoders write about ten scans; a thousand empty ones make a small file that takes minutes.
        if scans > MAX_SCANS or scans * pixels > 20 * MAX_PIXELS and pixels <= MAX_PIXELS:
            raise InputError(f"{name}: a JPEG of {scans} scans or more, too many to decode")
        place = max(end, place)
    kept.append(data[last:])
    return PictureFile(b"".join(kept), exif, xmp)


def _png(data: bytes, name: str) -> PictureFile:
    """Drop ancillary chunks, except transparency, which is scaled to the 8 bits at which Pillow compares it."""
    kept, exif, xmp, place, parts = [data[:8]], b"", b"", 8, 0
    while place + 8 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        start, end = place + 8, place + 12 + size
        if not kind[0] & 0x20:
            kept.append(data[place:end])
        elif kind == b"tRNS" and len(data) > 25:
            kept.append(_scaled_transparency(data[place:end], depth=data[24], colour=data[25]))
        elif kind == b"eXIf":
            exif = data[start : end - 4]
        elif data.startswith(b"Raw profile type exif\0", start):  # after three lines of text
            digits = b"".join(_png_text(kind, data[start : end - 4]).split(b"\n")[3:])
            exif = exif or bytes.fromhex(re.match(rb"(?:[0-9a-fA-F]{2})*", digits)[0].decode())
        elif data.startswith(b"XML:com.adobe.xmp\0", start):
            xmp = _png_text(kind, data[start : end - 4])
        place = end
        parts += 1
        if parts > MAX_PARTS:
            raise InputError(f"{name}: a PNG of more than {MAX_PARTS} chunks")
        if kind == b"IEND":
            break
    return PictureFile(b"".join(kept), exif, xmp)


def _png_text(kind: bytes, chunk: bytes) -> bytes:
    """At most 1 MB of the text of a chunk; b"" if it cannot be decompressed."""
    text = chunk.partition(b"\0")[2]
    packed = kind == b"zTXt" or text[:1] == b"\1"
    if kind == b"iTXt":
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif kind == b"zTXt":
        text = text[1:]
    try:
        return zlib.decompressobj().decompress(text, 2**20) if packed else text[: 2**20]
    except zlib.error:
        return b""


def _scaled_transparency(chunk: bytes, depth: int, colour: int) -> bytes:
    """The tRNS chunk with 2- and 4-bit grey and 16-bit colours scaled to 8 bits, as Pillow scales the pixels only."""
    if not (colour == 0 and depth in (2, 4) or colour == 2 and depth == 16) or len(chunk) % 2 or len(chunk) > 18:
        return chunk
    values = struct.unpack(f">{len(chunk) // 2 - 6}H", chunk[8:-4])
    values = [value >> 8 if depth == 16 else value * 255 // (2**depth - 1) for value in values]
    body = b"tRNS" + struct.pack(f">{len(values)}H", *(value & 0xFFFF for value in values))
    return chunk[:4] + body + struct.pack(">I", zlib.crc32(body))


def _gif(data: bytes, name: str) -> PictureFile:
    """Keep the header, the extensions that define the transparent colour, and the first frame."""
    table = lambda flags: 3 << (flags & 7) + 1 if flags & 0x80 else 0
    place = 13 + table(data[10] if len(data) > 10 else 0)
    kept = [data[:place]]
    while place < len(data):
        start, place = place, place + 1
        if data[start] == 0x21:  # extension
            place = _after_blocks(data, start + 2)
            if data[start + 1 : start + 2] == b"\xf9":
                kept.append(data[start:place])
        elif data[start] == 0x2C:  # frame
            flags = data[start + 9] if start + 9 < len(data) else 0
            kept.append(data[start : _after_blocks(data, start + 11 + table(flags))])
            break
        elif data[start] == 0x3B:  # end
            break
        if len(kept) > MAX_PARTS:
            raise InputError(f"{name}: a GIF of more than {MAX_PARTS} parts")
    return PictureFile(b"".join(kept))


def _after_blocks(data: bytes, place: int) -> int:
    """The end of the sub-blocks that begin at `place`: each starts with its length, and the last is empty."""
    while place < len(data) and data[place]:
        place += 1 + data[place]
    return min(place + 1, len(data))


def _tiff(data: bytes, name: str) -> PictureFile:
    """Hide orientation and EXIF, whose damage would make Pillow reject the picture, and limit tiles and strips."""
    hidden, tile = bytearray(data), {0x0142: 1, 0x0143: 1}  # width and length
    for parts, entry in enumerate(tiff_entries(data)):
        if entry.tag in tile:
            tile[entry.tag] = entry.value
        if parts > MAX_PARTS or entry.tag in (0x0111, 0x0144) and entry.count > MAX_PARTS:
            raise InputError(f"{name}: a TIFF of more than {MAX_PARTS} strips, tiles or fields")
        if entry.tag in (ORIENTATION, 0x8769, 0x8825, 0xA005):  # and the directories of EXIF
            hidden[entry.place + 2 : entry.place + 4] = bytes(2)  # an invalid type, which all readers skip
    width, height = tile.values()
    if width * height > MAX_TILE:
        raise InputError(f"{name}: a TIFF of tiles of {width} x {height} pixels, expected at most {MAX_TILE} in all")
    return PictureFile(bytes(hidden), data)


def _bmp(data: bytes, name: str) -> PictureFile:
    if int.from_bytes(data[30:34], "little") in (1, 2) and len(data) > MAX_RUNS:
        raise InputError(f"{name}: a run-length encoded BMP of {len(data)} bytes, expected at most {MAX_RUNS}")
    return PictureFile(data)


def _iso(data: bytes, name: str) -> PictureFile:
    """Hide the EXIF of AVIF and HEIC, which must not be read for the orientation: they store it elsewhere."""
    return PictureFile(re.sub(rb"(infe.{8}(?:..)?)Exif", rb"\1none", data, count=16, flags=re.DOTALL))
