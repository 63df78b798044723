"""The `Sample` that every data source yields: turns of text and media, whose bytes are read only on demand.

Everything here is frozen and picklable, so that samples can be sent to the workers of a data loader.
"""

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from mmtx.data.storage import MediaSource, bare
from mmtx.errors import InputError
from mmtx.modality.registry import MODALITIES

# Known extensions that belong to no modality: such files count as unusable, and are never skipped silently.
VIDEO = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp")


@lru_cache
def _by_extension(count: int) -> tuple[dict[str, str], dict[str, str]]:
    """Extension -> kind of media, for readable files and for all known ones; `count` of modalities is the key of the cache."""
    read = {extension: kind for kind, modality in MODALITIES.items() for extension in modality.extensions}
    known = {extension: kind for kind, modality in MODALITIES.items() for extension in modality.known}
    return read, {**dict.fromkeys(VIDEO, "video"), **known, **read}


@dataclass(frozen=True)
class Text:
    """A piece of text, never blank."""

    text: str


@dataclass(frozen=True)
class Media:
    """A medium, which `read` of its `Modality` decodes from `source.read()`.

    `name` identifies it in error messages: the file, the row or member, and the piece that is cut out of a sound: `seconds`
    (None: the rest) from `start`. The piece is played `speed` times as fast, which raises its pitch, and then shifted in pitch
    by `semitones`.
    """

    kind: str
    name: str
    source: MediaSource
    # Not in the repr: the name contains them if they come from a row rather than a function of variants.
    start: float = field(default=0.0, repr=False)
    seconds: float | None = field(default=None, repr=False)
    speed: float = field(default=1.0, repr=False)
    semitones: float = field(default=0.0, repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """The options of `Modality.read` that cut, speed up and pitch-shift a sound; empty for one that is whole and unchanged."""
        cut = {} if self.start == 0 and self.seconds is None else {"start": self.start, "seconds": self.seconds}
        played = {} if self.speed == 1 else {"speed": self.speed}
        return {**cut, **played} if self.semitones == 0 else {**cut, **played, "semitones": self.semitones}

    def perturb_speed(self, factor: float) -> "Media":
        """The sound played `factor` times as fast as now, which raises its pitch: 2 ** (1 / 12) is a semitone up.

        Speed perturbation (Ko et al. 2015, https://doi.org/10.21437/Interspeech.2015-711).
        """
        speed = self.speed * factor
        return replace(self, speed=speed, name=f"{self.name} at {speed:.4g} of its speed")

    def shift_pitch(self, semitones: float) -> "Media":
        """The sound `semitones` higher than now, or lower if negative, at the same length, by a phase vocoder."""
        semitones += self.semitones
        return replace(self, semitones=semitones, name=f"{self.name} {semitones:+.4g} semitones")


@dataclass(frozen=True)
class Codes:
    """A medium that is codes already, such as an answer that a model generated: (h, w) of the tokenizer of its kind."""

    kind: str
    height: int
    data: bytes  # (h, w) int32, little-endian: a tenth of the memory of a list

    @classmethod
    def of(cls, kind: str, rows: Sequence[Sequence[int]]) -> "Codes":
        codes = [code for row in rows for code in row]
        return cls(kind, len(rows), struct.pack(f"<{len(codes)}i", *codes))


Part = Text | Media | Codes


@dataclass(frozen=True)
class SampleTurn:
    """A turn of one side; role None marks a plain document."""

    role: Literal["user", "assistant"] | None
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sample:
    """One row of a source. `where` names the source and the row in error messages.

    `cond_drop_prob` is the share of its views in training whose user turns are emptied. `rejected` are the same turns with a worse
    answer, for direct preference optimization; None for most samples.
    """

    key: str
    turns: tuple[SampleTurn, ...]
    metadata: dict[str, Any]
    where: str
    cond_drop_prob: float = 0.0
    # Not in the repr, from which `mmtx prepare` tells whether rows have changed: shards hold no rejected answers.
    rejected: tuple[SampleTurn, ...] | None = field(default=None, repr=False)

    @property
    def pair(self) -> "tuple[Sample, ...]":
        """The sample with its preferred answer and, if it has one, with the rejected one."""
        chosen = replace(self, rejected=None)
        return (chosen,) if self.rejected is None else (chosen, replace(chosen, turns=self.rejected))

    @property
    def caption(self) -> str:
        """The text of the last answer or, if that is only a medium, of its prompt; all text of a plain document."""
        answers = [turn for turn in self.turns if turn.role == "assistant"]
        return _text(answers[-1:]) or _text(turn for turn in self.turns if turn.role != "assistant")


def _text(turns: Iterable[SampleTurn]) -> str:
    return "".join(part.text for turn in turns for part in turn.parts if isinstance(part, Text))


def attempt(parse: Callable[..., Sample], *arguments: Any) -> Sample | InputError:
    """The sample of a row, or why there is none."""
    try:
        return parse(*arguments)
    except InputError as error:
        return error


def with_captions(samples: Sequence[Sample]) -> list[Sample]:
    """The samples whose last turn is an answer in text, so that a model's answer can be compared with their `caption`."""
    return [sample for sample in samples
            if sample.turns[-1].role == "assistant" and all(isinstance(part, Text) for part in sample.turns[-1].parts)]


def kind_of(name: str, data: bytes = b"") -> str | None:
    """The kind of a medium by the extension of `name`, else by the first bytes; None if unknown."""
    return _by_extension(len(MODALITIES))[0].get(suffix(name)) or sniff(data)


def known_kind(name: str) -> str | None:
    """The kind of a file by its extension, readable or not ("video" never is); None if unknown."""
    return _by_extension(len(MODALITIES))[1].get(suffix(name))


def sniff(data: bytes) -> str | None:
    """The kind of a medium by its first bytes, 64 at most; None for anything else."""
    for kind, modality in MODALITIES.items() if data else ():
        if (matches := modality.get("sniff")) is not None and matches(data[:64]):
            return kind
    return None


def suffix(path: str) -> str:
    """The last extension in lower case, with its dot; '' if there is none."""
    return os.path.splitext(bare(path))[1].lower()
