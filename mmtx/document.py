"""Documents: turns of text and media, as the codes of their tokenizers.

Shapes: T pieces of a text, h rows and w columns of codes (for a sound, time steps and bands), D width of features.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mmtx.errors import InputError

ROLES = ("user", "assistant", None)


class Part:
    """Local codes of one medium as an int64 array; parts are equal if kind, shape and codes are."""

    kind: str
    ndim: ClassVar[int]
    field: ClassVar[str] = "codes"

    def __post_init__(self):
        array = np.array(self.array, np.int64)  # a copy, so that freezing it leaves the caller's array alone
        if array.ndim != self.ndim:
            raise InputError(f"{self.kind} part: found shape {array.shape}, expected {self.ndim} dimensions")
        array.flags.writeable = False
        object.__setattr__(self, self.field, array)

    @property
    def array(self) -> np.ndarray:
        """The codes, whatever the field is called."""
        return getattr(self, self.field)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.kind == other.kind and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash((self.kind, self.array.shape, self.array.tobytes()))


@dataclass(frozen=True, eq=False)
class TextPart(Part):
    """Text pieces, (T,)."""

    ids: np.ndarray
    kind: ClassVar[str] = "text"  # type: ignore[misc]  # one for all texts, where media have their own
    ndim: ClassVar[int] = 1
    field: ClassVar[str] = "ids"


@dataclass(frozen=True, eq=False)
class MediaPart(Part):
    """Codes of a medium, (h, w), and if known the encoder features of each, (h, w, D)."""

    kind: str
    codes: np.ndarray
    features: Tensor | None = None
    ndim: ClassVar[int] = 2


@dataclass(frozen=True)
class Turn:
    """Parts by one speaker; role None is plain content outside a conversation.

    Adjacent text parts are merged and empty ones dropped, because a stream cannot distinguish them.
    """

    role: str | None
    parts: tuple[Any, ...]  # of Part; in the server also media not encoded yet

    def __post_init__(self):
        if self.role not in ROLES:
            raise InputError(f"turn: found role {self.role!r}, expected 'user', 'assistant' or None")
        merged: list[Part] = []
        for part in self.parts:
            if isinstance(part, TextPart) and merged and isinstance(merged[-1], TextPart):
                part = TextPart(np.concatenate([merged.pop().ids, part.ids]))
            if not isinstance(part, TextPart) or part.ids.size:
                merged.append(part)
        object.__setattr__(self, "parts", tuple(merged))


@dataclass(frozen=True)
class Document:
    """Turns in order. Adjacent plain turns are merged and empty ones dropped, as with text parts."""

    turns: tuple[Turn, ...]

    def __post_init__(self):
        merged: list[Turn] = []
        for turn in self.turns:
            if turn.role is None and merged and merged[-1].role is None:
                turn = Turn(None, merged.pop().parts + turn.parts)
            if turn.role is not None or turn.parts:
                merged.append(turn)
        object.__setattr__(self, "turns", tuple(merged))
