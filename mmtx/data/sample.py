"""What every data source yields: a `Sample`, turns of text and media whose bytes are read only on demand.

Everything here is frozen and picklable, so that samples travel to the workers of a data loader.
"""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from mmtx.data.storage import MediaSource, display

EXTENSIONS = {
    "image": (".webp", ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".ogg", ".opus", ".wav", ".flac", ".mp3"),
}
# What is known to be a picture, a sound or a video by its name, but has no place in EXTENSIONS: such a file is counted
# as one that cannot be used, and never left out without a word.
UNREAD = {
    "image": (".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".ico", ".icns", ".psd", ".tga", ".dds", ".exr",
              ".hdr", ".pbm", ".pgm", ".ppm", ".pnm", ".jfif", ".jpe", ".apng", ".dib", ".xcf", ".dng", ".cr2", ".cr3",
              ".nef", ".arw"),
    "audio": (".m4a", ".m4b", ".aac", ".aif", ".aiff", ".aifc", ".oga", ".spx", ".webm", ".weba", ".mka", ".wma", ".amr",
              ".caf", ".au", ".snd", ".mp2", ".ac3", ".ape", ".wv", ".w64", ".rf64", ".mid", ".midi"),
    "video": (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp"),
}
_READ, _KNOWN = ({extension: kind for table in tables for kind, some in table.items() for extension in some}
                 for tables in ([EXTENSIONS], [UNREAD, EXTENSIONS]))


@dataclass(frozen=True)
class Text:
    """A piece of text, never blank."""

    text: str


@dataclass(frozen=True)
class Media:
    """A picture or a sound: `load_image(media.source.read(), media.name)`.

    `name` is what error messages call it: it names the file, the row or member, and what is cut out of a sound: the
    `seconds` (None: all that follow) from `start`.
    """

    kind: Literal["image", "audio"]
    name: str
    source: MediaSource
    # Left out of the repr, of which stamps are made: the name tells them.
    start: float = field(default=0.0, repr=False)
    seconds: float | None = field(default=None, repr=False)


Part = Text | Media


@dataclass(frozen=True)
class SampleTurn:
    """What one side says; role None is a plain document."""

    role: Literal["user", "assistant"] | None
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sample:
    """One row of a source. `where` names the source and the row in error messages.

    `drop` is the share of its views in training that leave the user turns empty.
    """

    key: str
    turns: tuple[SampleTurn, ...]
    metadata: dict[str, Any]
    where: str
    drop: float = 0.0

    @property
    def caption(self) -> str:
        """The text that is answered or, where a medium is, that asks for it; of a plain document, all text."""
        texts = [(turn.role, part.text) for turn in self.turns for part in turn.parts if isinstance(part, Text)]
        return "".join(text for role, text in texts if role != "user") or "".join(text for _, text in texts)


def kind_of(name: str, data: bytes = b"") -> Literal["image", "audio"] | None:
    """Tell pictures from sounds by the extension of `name`, else by the first bytes; None if unknown."""
    return _READ.get(suffix(name)) or sniff(data)


def known_kind(name: str) -> Literal["image", "audio", "video"] | None:
    """What a file must be by its extension, whether it is read or not; None if unknown."""
    return _KNOWN.get(suffix(name))


def sniff(data: bytes) -> Literal["image", "audio"] | None:
    """Tell pictures from sounds by the first 12 bytes; None for anything else."""
    if data[:4] == b"RIFF":
        return {b"WEBP": "image", b"WAVE": "audio"}.get(bytes(data[8:12]))
    if data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")):
        return "image"
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return "image"
    if data.startswith((b"OggS", b"fLaC", b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2")):
        return "audio"
    return None


def suffix(path: str) -> str:
    """The last extension in lower case with its dot, '' if there is none."""
    return os.path.splitext(display(path))[1].lower()
