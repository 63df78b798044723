"""What every data source yields: a `Sample`, turns of text and media whose bytes are read only on demand.

Everything here is frozen and picklable, so that samples travel to the workers of a data loader.
"""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from mmtx.data.formats import IMAGE_FORMATS, format_of
from mmtx.data.storage import MediaSource, bare

# Without .mp4, .mov and .mkv: a folder's videos are not its sounds.
EXTENSIONS = {
    "image": (".webp", ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"),
    "audio": (".ogg", ".oga", ".opus", ".wav", ".flac", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".sph",
              ".m4a", ".m4b", ".aac", ".webm", ".weba", ".mka"),
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

    `cond_drop_prob` is the share of its views in training that leave the user turns empty.
    """

    key: str
    turns: tuple[SampleTurn, ...]
    metadata: dict[str, Any]
    where: str
    cond_drop_prob: float = 0.0

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
    """Tell pictures from sounds by the first bytes, 64 at most; None for anything else."""
    found = format_of(data[:64])
    return None if found is None else "image" if found in IMAGE_FORMATS else "audio"


def suffix(path: str) -> str:
    """The last extension in lower case with its dot, '' if there is none."""
    return os.path.splitext(bare(path))[1].lower()
