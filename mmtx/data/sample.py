"""What every data source yields: a `Sample`, turns of text and media whose bytes are read only on demand.

Everything here is frozen and picklable, so that samples travel to the workers of a data loader.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal

from mmtx.data.storage import MediaSource, bare

EXTENSIONS = {
    "image": (".webp", ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".ogg", ".opus", ".wav", ".flac", ".mp3"),
}


@dataclass(frozen=True)
class Text:
    """A piece of text, never blank."""

    text: str


@dataclass(frozen=True)
class Media:
    """A picture or a sound: `load_image(media.source.read(), media.name)`.

    `name` is what error messages call it: it names the file, and the row or member.
    """

    kind: Literal["image", "audio"]
    name: str
    source: MediaSource


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
    for kind, extensions in EXTENSIONS.items():
        if suffix(name) in extensions:
            return kind
    return sniff(data)


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
    return os.path.splitext(bare(path))[1].lower()
