"""Encoded sounds to samples: a whole sound or a cut of it, whatever the header says about its length.

A truncated file is refused if the format allows detecting it: the data that a header declares must be there, a stream must
mark its end, checksums must match. A header without a length (of a file that was written to a pipe) is accepted.
"""

import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Literal

import numpy as np
import soundfile

from mmtx.data.formats import AUDIO_FORMATS, format_of, id3_size
from mmtx.data.mpeg import mpeg_sound
from mmtx.errors import InputError

MAX_SECONDS = 600
MAX_CHANNELS = 8
MAX_VALUES = MAX_SECONDS * 48_000 * 2  # samples times channels: 230 MB as float32
RATES = (1_000, 192_000)  # Hz, the lowest and highest source rate that is accepted
BLOCK = 65_536  # frames
SEEK_DISTANCE = 30  # seconds before a cut up to which these are decoded rather than skipped by a seek
INEXACT = ("VORBIS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")  # libsndfile seeks some samples off
MAX_START = 86_400  # seconds: a day, which is decoded in vain if the format cannot seek
TOLERANCE = 0.25  # seconds that a cut may reach beyond the end: lengths in manifests are rounded, those of MP3 count its padding
MAX_CHUNKS = 10_000  # of a WAV before its samples
UNKNOWN = 0x7F000000  # sizes from here on are placeholders of programs that did not know the size yet
FFMPEG = {  # format -> the demuxer of FFmpeg that may open it
    "MP4": "mov", "AAC": "aac", "WEBM": "matroska",
}
CODECS = ("aac", "alac", "mp3", "mp3float", "opus", "vorbis", "flac")
CAF_CHUNKS = {b"desc", b"data", b"pakt", b"kuki", b"chan", b"free", b"info", b"strg", b"mark", b"regn", b"inst",
              b"midi", b"ovvw", b"peak", b"umid", b"uuid", b"edct"}
MP4_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"meta", b"udta", b"moof", b"mfra", b"sidx",
             b"styp", b"pdin", b"ssix", b"prft", b"emsg"}
EBML = b"\x1a\x45\xdf\xa3"
EBML_ELEMENT = re.compile(  # the file's header and segment, and the elements in them
    rb"\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\x11\x4d\x9b\x74|\x15\x49\xa9\x66|\x16\x54\xae\x6b|\x1f\x43\xb6\x75"
    rb"|\x1c\x53\xbb\x6b|\x19\x41\xa4\x69|\x10\x43\xa7\x70|\x12\x54\xc3\x67|\xec|\xbf|[\xe7\xa3\xa0\xab\xa7]"
)
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


Blocks = Iterator[tuple[int, int, np.ndarray]]  # rate, place in the sound, float32 (S, C)


def read_sound(data: bytes, name: str, start: float = 0.0, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """Samples as float32 (S, C) and their rate, from second `start` on and `seconds` long. Raises InputError."""
    return _cut(sound_blocks(data, name, start, uncut=not start and seconds is None), name, start, seconds)


def sound_blocks(data: bytes, name: str, start: float = 0.0, uncut: bool = False, video: bool = False) -> Blocks:
    """The blocks of an encoded sound from some place before second `start` on; of an `uncut` one, the length is checked first.

    With `video`, the sound may be that of a video.
    """
    format = format_of(data)
    if format != "MP3":
        data = data[id3_size(data):]
    if format in FFMPEG:
        return _ffmpeg(io.BytesIO(_whole_file(data, format, name)), format, name, start, uncut, video)
    if format == "MP3":
        whole, samples = mpeg_sound(data, name)
        return _libsndfile([whole], name, start, uncut, samples)
    if format == "OGG":
        return _libsndfile(_ogg_links(data, name), name, start, uncut)
    if format in AUDIO_FORMATS:
        return _libsndfile([_whole_file(data, format, name)], name, start, uncut)
    raise InputError(f"{name}: no sound that can be decoded, expected {', '.join(AUDIO_FORMATS)}")


class _Slices:
    """The bytes of an open file, of which only the slices that are asked for are read."""

    def __init__(self, file: BinaryIO):
        self.file, self.size = file, file.seek(0, io.SEEK_END)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: slice) -> bytes:
        first, last, _ = place.indices(self.size)
        self.file.seek(first)
        return self.file.read(max(last - first, 0))


def read_cut(file: BinaryIO, name: str, start: float, seconds: float | None) -> tuple[np.ndarray, int] | None:
    """What `read_sound` returns for a cut of a file, as far as `file_blocks` can read it."""
    blocks = file_blocks(file, name, start)
    return None if blocks is None else _cut(blocks, name, start, seconds)


def file_blocks(file: BinaryIO, name: str, start: float = 0.0, video: bool = False) -> Blocks | None:
    """`sound_blocks` of a WAV or FLAC file, of which no more is read than what is asked for, however long it is.

    With `video`, also of an MP4. None for files of other formats and for those with anything unusual about them, of which
    `sound_blocks` must see all.
    """
    data = _Slices(file)
    head = data[:64]
    format = None if head[:3] == b"ID3" else format_of(head)
    if format == "WAV":
        end, unknown = _wav_end(data)
        usual = unknown is None and 0 < end <= len(data) and not _another(format, data[end : end + 64])
    elif format == "MP4" and video:
        usual = 0 < (end := _mp4_end(data)) <= len(data) and not _another(format, data[end : end + 64])
    else:
        usual = format == "FLAC" and data[-128:][:3] != b"TAG"
    if not usual:
        return None
    file.seek(0)
    if format == "MP4":
        return _ffmpeg(file, format, name, start, uncut=False, video=True)
    return _libsndfile([file], name, start, uncut=False)


def check_sound(frames: int, rate: int, channels: int, name: str) -> None:
    """Raise InputError if the rate, channels or length of a sound exceed the limits."""
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f"{name}: {rate} Hz, expected {RATES[0]} to {RATES[1]}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise InputError(f"{name}: {channels} channels, expected 1 to {MAX_CHANNELS}")
    if frames <= 0:
        raise InputError(f"{name}: no samples in it, expected a sound")
    if frames > MAX_SECONDS * rate or frames * channels > MAX_VALUES:
        raise InputError(
            f"{name}: {math.ceil(frames / rate)} seconds of {channels} channels at {rate} Hz, "
            f"expected at most {MAX_SECONDS} seconds and {MAX_VALUES} values"
        )


def cut(frames: int, rate: int, name: str, start: float, seconds: float | None) -> tuple[int, int]:
    """The first frame of a cut and the one after its last, in a sound of `frames` frames."""
    first = round(start * rate)
    last = frames if seconds is None else round((start + seconds) * rate)
    if first and first >= frames or last > frames + TOLERANCE * rate:
        until = "its end" if seconds is None else f"{start + seconds:g} s"
        raise InputError(f"{name}: found a sound of {frames / rate:.3f} s, expected one that holds the segment from {start:g} s to "
                         f"{until}")
    return first, min(last, frames)


class _Forward(soundfile.SoundFile):
    """Reads forward only: soundfile seeks after each block, which fails if the header has no length."""

    def seekable(self) -> bool:
        return False


def _cut(blocks: Blocks, name: str, start: float, seconds: float | None) -> tuple[np.ndarray, int]:
    """Join the blocks of a cut. Memory grows with the actual data, whatever the header declares."""
    kept: list[np.ndarray] = []
    read, end, rate = 0, 0, 0
    for rate, place, block in of_one_layout(blocks, name):
        end = place + len(block)
        first, last = round(start * rate), end if seconds is None else round((start + seconds) * rate)
        if not kept and place > first:
            raise InputError(f"{name}: damaged: no samples at {start:g} s")
        channels, block = block.shape[1], block[max(first - place, 0) : max(last - place, 0)]
        if len(block):
            kept.append(block)
            read += len(block)
            check_sound(read, rate, channels, name)
        if last < end:
            break
    else:
        cut(end, rate, name, start, seconds)
    check_sound(read, rate, channels, name)
    return np.concatenate(kept), rate


def of_one_layout(blocks: Blocks, name: str) -> Blocks:
    """The blocks, of which there is at least one. Raises InputError where the rate or the number of channels changes."""
    layout = None
    for rate, place, block in blocks:
        if layout not in (None, (rate, block.shape[1])):
            raise InputError(
                f"{name}: changes from {layout[1]} channels at {layout[0]} Hz to {block.shape[1]} at {rate} Hz, "
                f"expected one sound"
            )
        layout = rate, block.shape[1]
        yield rate, place, block
    if layout is None:
        raise InputError(f"{name}: no samples in it, expected a sound")


def _libsndfile(parts: Sequence[bytes | BinaryIO], name: str, start: float, uncut: bool, samples: int | None = None) -> Blocks:
    """The blocks of consecutive files; `samples`: how many must be decodable, less the encoder delay.

    Of an `uncut` sound, the length is checked before any of it is decoded.
    """
    place = 0
    for part in parts:
        opened = False
        try:
            with _Forward(io.BytesIO(part) if isinstance(part, bytes) else part) as file:
                opened, frames, rate = True, file.frames, file.samplerate
                known = frames < 2**62
                skipped = min(max(round(start * rate) - place, 0), frames)
                check_sound(frames if known and uncut else 1, rate, file.channels, name)
                if samples is not None and frames < samples - 5 * 1_152:
                    raise InputError(f"{name}: {frames / rate:.1f} s of {samples / rate:.1f} s can be decoded")
                end = place + frames
                if skipped > SEEK_DISTANCE * rate and file.subtype not in INEXACT:
                    try:
                        place += file.seek(skipped)
                    except soundfile.SoundFileError:  # some codecs cannot seek
                        pass
                    if place == end:  # the cut is beyond the end, which is told by the length of the sound
                        yield rate, place, np.zeros((0, file.channels), np.float32)
                while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                    yield rate, place, block
                    place += len(block)
                if known and place < end:
                    raise InputError(f"{name}: damaged or cut short after {place / rate:.1f} s of {end / rate:.1f} s")
        except soundfile.SoundFileError:
            if opened:
                raise InputError(f"{name}: damaged or cut short after {place / rate:.1f} s") from None
            raise InputError(f"{name}: no sound that can be decoded, expected {', '.join(AUDIO_FORMATS)}") from None


def _ffmpeg(data: BinaryIO, format: str, name: str, start: float, uncut: bool, video: bool) -> Blocks:
    """The blocks of the only sound of a file that libsndfile cannot read; with `video`, the file may have pictures, too."""
    try:
        import av
    except ImportError:
        raise InputError(f'{name}: reading {format} needs PyAV: pip install "mmtx[media]"') from None
    # Neither another file nor another decoder is opened, whatever the file says.
    options = {"codec_whitelist": ",".join(CODECS), "protocol_whitelist": "none"}
    try:
        with av.open(data, "r", format=FFMPEG[format], metadata_errors="replace", options=options) as file:
            sounds = file.streams.audio
            if not video and any(not pictures.disposition & av.stream.Disposition.attached_pic for pictures in file.streams.video):
                raise InputError(f"{name}: a video, expected a picture or a sound")
            if len(sounds) != 1:
                raise InputError(f"{name}: {len(sounds)} sounds in one {format} file, expected one")
            sound = sounds[0]
            if sound.codec_context is None or sound.codec_context.name not in CODECS:
                raise InputError(f"{name}: sound in {format} of another kind than {', '.join(CODECS)}")
            begin, length = (float((ticks or 0) * sound.time_base) for ticks in (sound.start_time, sound.duration))
            if uncut and length > 0:
                rate = sound.rate or 0
                check_sound(max(round(length * rate), 1), rate, sound.channels or 0, name)
            place, rate = 0, 0
            if start > SEEK_DISTANCE and format == "MP4":  # the others cannot seek exactly
                file.seek(round((begin + start - 1) * av.time_base))  # the first samples after a seek are wrong
                place = None
            planar = av.AudioResampler(format="fltp")
            for frame in file.decode(sound):
                rate = frame.sample_rate
                check_sound(frame.samples, rate, frame.layout.nb_channels, name)
                if place is None:  # a frame without a time is at the end, beyond the cut
                    place = round(((length if frame.time is None else frame.time) - begin) * rate)
                for part in planar.resample(frame):
                    block = part.to_ndarray().T  # (S, C)
                    yield rate, place, block
                    place += len(block)
            if rate and place < (length - 0.25) * rate:
                raise InputError(f"{name}: damaged or cut short after {place / rate:.1f} s of {length:.1f} s")
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{name}: no whole {format} sound that can be decoded ({reason})") from None


def _whole_file(data: bytes, format: str, name: str) -> bytes:
    """`data`, checked to hold all that its headers declare; the length of a WAV is filled in if unknown."""
    if format == "FLAC":  # has no length; libsndfile takes an ID3v1 tag behind it for damage
        return data[:-128] if data[-128:].startswith(b"TAG") else data
    if format == "WAV":
        end, unknown = _wav_end(data)
        if unknown is not None:
            known = bytearray(data)
            known[unknown : unknown + 4] = (end - unknown - 4).to_bytes(4, _wav_order(data))
            data = bytes(known)
    else:
        end = {"AIFF": _aiff_end, "AU": _au_end, "CAF": _caf_end, "W64": _w64_end, "NIST": _nist_end, "MP4": _mp4_end,
               "WEBM": _webm_end, "AAC": _aac_end}[format](data)
    if end > len(data):
        raise InputError(f"{name}: cut short: {len(data)} bytes of {end} are there")
    if end and _another(format, data[end : end + 64]):
        raise InputError(f"{name}: another {format} file follows at byte {end}, expected one sound")
    return data[:end] if end and format not in ("WAV", "AIFF") else data  # in these two, other chunks may follow the samples


def _another(format: str, following: bytes) -> bool:
    """Whether another file of the same format follows a sound."""
    return format in (format_of(following), format_of(following.lstrip(b"\0")))


def _wav_order(data: bytes | _Slices) -> Literal["big", "little"]:
    return "big" if data[:4] == b"RIFX" else "little"


def _wav_end(data: bytes | _Slices) -> tuple[int, int | None]:
    """The end of the samples, 0 if there are none, and the place of their length in the file if it is not known there."""
    order, place, wide = _wav_order(data), 12, None  # offset of the 64-bit length in RF64
    for _ in range(MAX_CHUNKS):
        if place + 8 > len(data):
            break
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], order)
        if kind == b"ds64":
            wide = place + 16
        elif kind == b"data":
            start = place + 8
            if wide and size == 0xFFFFFFFF:
                size = int.from_bytes(data[wide : wide + 8], order)
            ends = int.from_bytes(data[4:8], order) + 8  # the end that the file declares
            if size < UNKNOWN and (size or ends > start and not wide):
                return start + size, None
            return len(data), place + 4
        place += 8 + size + size % 2
    return 0, None


def _aiff_end(data: bytes) -> int:
    place = 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "big")
        if data[place : place + 4] == b"SSND":
            return place + 8 + size if size < UNKNOWN else 0
        place += 8 + size + size % 2
    return 0


def _au_end(data: bytes) -> int:
    offset, size = (int.from_bytes(data[i : i + 4], "big") for i in (4, 8))
    return offset + size if size < UNKNOWN else 0


def _caf_end(data: bytes) -> int:
    place = 8
    while data[place : place + 4] in CAF_CHUNKS:
        size = int.from_bytes(data[place + 4 : place + 12], "big", signed=True)
        if size < 0:  # of the samples, whose size is not known
            return 0
        place += 12 + size
    return place


def _w64_end(data: bytes) -> int:
    place = data.find(b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a")
    size = int.from_bytes(data[place + 16 : place + 24], "little")
    return place + size if place >= 0 and size < UNKNOWN else 0


def _nist_end(data: bytes) -> int:
    fields = dict(re.findall(rb"(\w+) -i (\d{1,12})\s", data[:1024]))
    size = 1
    for field in (b"sample_count", b"channel_count", b"sample_n_bytes"):
        size *= int(fields.get(field, 0))
    return 1024 + size if size else 0


def _mp4_end(data: bytes | _Slices) -> int:
    place = 0
    boxes: set[bytes] = set()
    while data[place + 4 : place + 8] in MP4_BOXES - (boxes & {b"ftyp"}):
        boxes.add(data[place + 4 : place + 8])
        size = int.from_bytes(data[place : place + 4], "big")
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size < 8:  # 0: to the end of the file
            return 0
        place += size
    return place


def _webm_end(data: bytes) -> int:
    place = 0
    while (element := EBML_ELEMENT.match(data, place)) and not (place and element[0] == EBML):
        place = element.end()
        wide = 9 - data[place].bit_length() if place < len(data) else 0
        size = int.from_bytes(data[place : place + wide], "big") & (1 << 7 * wide) - 1
        place += wide
        if size != (1 << 7 * wide) - 1:  # else the size is unknown, and the children follow
            place += size
    return place


def _aac_end(data: bytes) -> int:
    place = 0
    while place + 7 <= len(data) and data[place] == 0xFF and data[place + 1] & 0xF6 == 0xF0:
        place += max((data[place + 3] & 3) << 11 | data[place + 4] << 3 | data[place + 5] >> 5, 7)
    return place


def _ogg_links(data: bytes, name: str) -> list[bytes]:
    """The chained sounds of an Ogg file, after checking that each page is intact and each sound has its end."""
    links, place, last, pages, start = [], 0, None, 0, 0
    while (place := data.find(b"OggS", place)) >= 0:
        head = data[place : place + 27]
        segments = data[place + 27 : place + 27 + head[26]] if len(head) == 27 else b""
        end = place + 27 + len(segments) + sum(segments)
        if len(head) < 27 or len(segments) < head[26] or end > len(data):
            raise InputError(f"{name}: cut short within its page {pages + 1}")
        flags, serial, number = head[5], head[14:18], int.from_bytes(head[18:22], "little")
        if _ogg_checksum(data[place : place + 22] + bytes(4) + data[place + 26 : end]) != head[22:26]:
            raise InputError(f"{name}: damaged: the checksum of its page {pages + 1} differs")
        if flags & 2:  # beginning of a stream
            if last is not None and not last[2]:
                raise InputError(f"{name}: its page {pages + 1} begins another stream before the first ends")
            start = place
        elif last is None or last[:2] != (serial, number - 1) or last[2]:
            raise InputError(f"{name}: damaged: a page is missing before its page {pages + 1}")
        last = serial, number, flags & 4
        pages, place = pages + 1, end
        if last[2]:  # end of the stream
            links.append(data[start:end])
    if last is None or not last[2]:
        raise InputError(f"{name}: cut short: its stream has no end")
    return links


def _ogg_checksum(page: bytes) -> bytes:
    """The CRC of a page: that of zlib in reversed bit order and without its inversions."""
    crc = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(REVERSED)
