"""What every data source yields: a `Sample`, turns of text and media whose bytes are read only on demand.

Everything here is frozen and picklable, so that samples travel to the workers of a data loader.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from mmtx.data.storage import MediaSource, bare
from mmtx.modality.registry import MODALITIES

# What is known by its name, but of no modality: such a file is counted as one that cannot be used, and never left out
# without a word.
VIDEO = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp")


@lru_cache
def _by_extension(count: int) -> tuple[dict[str, str], dict[str, str]]:
    """Extension -> kind of media, of those that are read and of all, where so many modalities are registered."""
    read = {extension: kind for kind, modality in MODALITIES.items() for extension in modality.extensions}
    known = {extension: kind for kind, modality in MODALITIES.items() for extension in modality.known}
    return read, {**dict.fromkeys(VIDEO, "video"), **known, **read}


@dataclass(frozen=True)
class Text:
    """A piece of text, never blank."""

    text: str


@dataclass(frozen=True)
class Media:
    """A medium, which `read` of its `Modality` makes of `source.read()`.

    `name` is what error messages call it: it names the file, the row or member, and what is cut out of a sound: the
    `seconds` (None: all that follow) from `start`. A sound is then played `speed` times as fast, and so higher, and made higher by
    `semitones`.
    """

    kind: str
    name: str
    source: MediaSource
    # Left out of the repr: the name tells them, where a row and not a function of variants did.
    start: float = field(default=0.0, repr=False)
    seconds: float | None = field(default=None, repr=False)
    speed: float = field(default=1.0, repr=False)
    semitones: float = field(default=0.0, repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """What is cut out and how it is played, as options of `Modality.read`; nothing where it is whole and as it was."""
        cut = {} if self.start == 0 and self.seconds is None else {"start": self.start, "seconds": self.seconds}
        played = {} if self.speed == 1 else {"speed": self.speed}
        return {**cut, **played} if self.semitones == 0 else {**cut, **played, "semitones": self.semitones}

    def perturb_speed(self, factor: float) -> "Media":
        """The sound played `factor` times as fast as it is now, and so higher: 2 ** (1 / 12) is a semitone up.

        Speed perturbation (Ko et al. 2015, https://doi.org/10.21437/Interspeech.2015-711).
        """
        speed = self.speed * factor
        return replace(self, speed=speed, name=f"{self.name} at {speed:.4g} of its speed")

    def shift_pitch(self, semitones: float) -> "Media":
        """The sound higher by `semitones` than it is now, or lower, and as long as before, by a phase vocoder."""
        semitones += self.semitones
        return replace(self, semitones=semitones, name=f"{self.name} {semitones:+.4g} semitones")


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
        """The text that the last assistant turn answers or, where a medium is, that asks for it; of a plain document, all text."""
        answers = [turn for turn in self.turns if turn.role == "assistant"]
        return _text(answers[-1:]) or _text(turn for turn in self.turns if turn.role != "assistant")


def _text(turns: Iterable[SampleTurn]) -> str:
    return "".join(part.text for turn in turns for part in turn.parts if isinstance(part, Text))


def with_captions(samples: Sequence[Sample]) -> list[Sample]:
    """Those whose last turn is an answer in text: what a model says can be compared with their `caption`."""
    return [sample for sample in samples
            if sample.turns[-1].role == "assistant" and all(isinstance(part, Text) for part in sample.turns[-1].parts)]


def kind_of(name: str, data: bytes = b"") -> str | None:
    """The kind of a medium by the extension of `name`, else by the first bytes; None if unknown."""
    return _by_extension(len(MODALITIES))[0].get(suffix(name)) or sniff(data)


def known_kind(name: str) -> str | None:
    """What a file must be by its extension, whether it is read or not ("video" is never); None if unknown."""
    return _by_extension(len(MODALITIES))[1].get(suffix(name))


def sniff(data: bytes) -> str | None:
    """The kind of a medium by its first bytes, 64 at most; None for anything else."""
    for kind, modality in MODALITIES.items() if data else ():
        if (begins_as := modality.get("sniff")) is not None and begins_as(data[:64]):
            return kind
    return None


def suffix(path: str) -> str:
    """The last extension in lower case with its dot, '' if there is none."""
    return os.path.splitext(bare(path))[1].lower()
