"""MPEG audio (MP3 and the older layers) as frames: the length of a sound, and whether it is complete.

The format has no header with the length. Decoders trust an index in the first frame, or estimate from the size of the
first frames, and stop there: most of a variable-bit-rate file without an index, or of joined files, would be lost.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from mmtx.data.formats import id3_size
from mmtx.errors import InputError

KBPS = {  # by (version 1, layer), index 1 to 14
    (True, 1): tuple(range(32, 449, 32)),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
KBPS[False, 3] = KBPS[False, 2]
SYNC = re.compile(rb"ID3|\xff[\xe0-\xff]")


class Frame(NamedTuple):
    """The header of a frame, its first four bytes."""

    length: int  # bytes
    samples: int
    rate: int
    channels: int
    layer: int
    index: int  # type: ignore[assignment]  # offset of an index in the frame; hides a method of tuples

    @property
    def kind(self) -> tuple[int, ...]:
        """The properties that do not change within one sound."""
        return self.samples, self.rate, self.channels, self.layer


@lru_cache(4096)
def frame_at(header: bytes) -> Frame | None:
    """The frame that begins with these four bytes; None if they are no header, or that of a free-format frame."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)  # versions 2.5, none, 2, 1
    speed, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or speed in (0, 15) or rate == 3:
        return None
    one = version == 3
    rate = (44_100, 48_000, 32_000)[rate] // {3: 1, 2: 2, 0: 4}[version]
    samples = {1: 384, 2: 1_152, 3: 1_152 if one else 576}[layer]
    bits, padding = KBPS[one, layer][speed - 1] * 1_000, header[2] >> 1 & 1
    length = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    mono = header[3] >> 6 == 3
    side = (17 if mono else 32) if one else (9 if mono else 17)
    return Frame(length, samples, rate, 1 if mono else 2, layer, 4 + side)


class MpegSound(NamedTuple):
    """The frames of a sound, preceded by an index with their number."""

    data: bytes
    samples: int  # encoder delay included


def mpeg_sound(data: bytes, name: str) -> MpegSound:
    """All frames of `data`, whatever lies between them. Raises InputError if it is truncated, or not one sound."""
    place = _next_frame(data, 0, None)
    if place is None:
        raise InputError(f"{name}: no sound that can be decoded: no frames of MPEG audio in it")
    first = frame_at(data[place : place + 4])
    kind, head, spans, count, declared = first.kind, b"", [], 0, 0
    start = place  # of the adjacent frames that end at `place`
    while place < len(data):
        header = data[place : place + 4]
        frame = frame_at(header)
        if frame is None or frame.kind != kind:
            spans.append(data[start:place])
            following = _next_frame(data, place, kind)
            if following is None:
                start = place = len(data)
                break
            start = place = following
            found = frame_at(data[place : place + 4])
            if found.kind != kind:
                raise InputError(
                    f"{name}: changes from {first.channels} channels at {first.rate} Hz to {found.channels} at "
                    f"{found.rate} Hz, expected one sound"
                )
            continue
        end = place + frame.length
        if end > len(data):
            if not declared or count < declared:
                raise InputError(f"{name}: cut short: its last frame is incomplete")
            spans.append(data[start:place])
            start = place = len(data)
            break
        frames = _indexed(data, place, frame)
        if frames is None:
            count += 1
        else:
            head = head or (data[place:end] if not count else b"")
            declared += frames
            spans.append(data[start:place])
            start = end
        place = end
    spans.append(data[start:place])
    if declared > count + 1:  # some encoders also count the frame of the index
        raise InputError(f"{name}: cut short: {count} frames of {declared} are there")
    if not count:
        raise InputError(f"{name}: no samples in it, expected a sound")
    body = b"".join(spans)
    return MpegSound(_index(head, first, body, count) + body, count * first.samples)


def _next_frame(data: bytes, place: int, kind: tuple[int, ...] | None) -> int | None:
    """The offset of the next frame that is followed by two of its kind or the end of the file; tags are skipped."""
    while match := SYNC.search(data, place):
        place = match.start()
        if size := id3_size(data, place):
            place += size
            continue
        at, following = place, None
        for _ in range(3):
            frame = frame_at(data[at : at + 4])
            if frame is None or following not in (None, frame.kind):
                break
            at, following = at + frame.length, frame.kind
            if at == len(data) or at > len(data) and kind is None:
                return place
        else:
            return place
        place += 1
    return None


def _indexed(data: bytes, place: int, frame: Frame) -> int | None:
    """The number of frames that the index in this frame declares, 0 if none; None if the frame holds sound instead."""
    if frame.layer != 3:
        return None
    at = place + frame.index
    if data[at : at + 4] in (b"Xing", b"Info"):
        return int.from_bytes(data[at + 8 : at + 12], "big") if data[at + 7] & 1 else 0
    at = place + 36
    return int.from_bytes(data[at + 14 : at + 18], "big") if data[at : at + 4] == b"VBRI" else None


def _index(head: bytes, first: Frame, body: bytes, count: int) -> bytes:
    """The index frame `head` with correct numbers, or a new one; none for layers I and II, whose bit rate is constant."""
    if first.layer != 3:
        return b""
    at = first.index
    if head[at : at + 4] not in (b"Xing", b"Info") or not head[at + 7] & 1:
        header = bytearray(body[:4])
        header[1] |= 1  # without a checksum
        for speed in range(1, 15):
            header[2] = speed << 4 | header[2] & 0x0F
            if (frame := frame_at(bytes(header))).length >= at + 16:
                break
        head = bytes(header).ljust(at, b"\0") + b"Xing" + (3).to_bytes(4, "big") + bytes(frame.length - at - 8)
    head = bytearray(head)
    head[at + 8 : at + 12] = count.to_bytes(4, "big")
    if head[at + 7] & 2:
        head[at + 12 : at + 16] = (len(head) + len(body)).to_bytes(4, "big")
    return bytes(head)
