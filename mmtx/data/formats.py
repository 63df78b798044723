"""The format of a media file by its first bytes: the only place that decides which decoder opens it."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIC")
AUDIO_FORMATS = ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "NIST", "MP4", "AAC", "WEBM")
STARTS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"OggS": "OGG",
    b"fLaC": "FLAC",
    b".snd": "AU",
    b"caff": "CAF",
    b"riff\x2e\x91\xcf\x11": "W64",
    b"NIST_1A": "NIST",
    b"\x1a\x45\xdf\xa3": "WEBM",  # of Matroska
}
CHUNKED = {  # the first four bytes, and the four from byte 8
    (b"RIFF", b"WEBP"): "WEBP",
    (b"RIFF", b"WAVE"): "WAV",
    (b"RIFX", b"WAVE"): "WAV",
    (b"RF64", b"WAVE"): "WAV",
    (b"FORM", b"AIFF"): "AIFF",
    (b"FORM", b"AIFC"): "AIFF",
}


def format_of(data: bytes) -> str | None:
    """One of IMAGE_FORMATS or AUDIO_FORMATS; None for anything else."""
    for start, name in STARTS.items():
        if data.startswith(start):
            return name
    if name := CHUNKED.get((bytes(data[:4]), bytes(data[8:12]))):
        return name
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return "BMP"
    if data[4:8] == b"ftyp":
        return _iso_format(data)
    if data[:3] == b"ID3":
        return format_of(data[id3_size(data):]) or "MP3"
    if len(data) > 2 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:
        return "AAC"
    # 0xFFFE and 0xFFFF are not taken for MPEG (layer I): the former is also the byte-order mark of UTF-16.
    if len(data) > 2 and data[0] == 0xFF and data[1] >= 0xE2 and data[1] & 0x06 in (2, 4) and data[1] & 0x18 != 0x08:
        return "MP3" if data[2] & 0xF0 != 0xF0 and data[2] & 0x0C != 0x0C else None
    return None


def is_image(data: bytes) -> bool:
    """Whether a file that begins with these bytes is a picture."""
    return format_of(data) in IMAGE_FORMATS


def is_audio(data: bytes) -> bool:
    """Whether a file that begins with these bytes is a sound."""
    return format_of(data) in AUDIO_FORMATS


def _iso_format(data: bytes) -> str:
    """AVIF, HEIC or MP4, by the brands that the file declares."""
    box = bytes(data[8 : min(int.from_bytes(data[:4], "big"), 256)])
    brands = {box[:4], *(box[i : i + 4] for i in range(8, len(box), 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIC" if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"} else "MP4"


def id3_size(data: bytes, place: int = 0) -> int:
    """The size in bytes of the ID3 tag at `place`; 0 if there is none."""
    head = data[place : place + 10]
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return 10 + (size & 0x0FFFFFFF) + (10 if head[5] & 0x10 else 0)
