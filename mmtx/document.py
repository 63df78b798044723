"""Documents: turns of text and media, as the codes of their tokenizers.

Shapes: T pieces of a text, h rows and w columns of codes (for a sound, time steps and bands), D width of features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmtx.errors import InputError

ROLES = ("user", "assistant", None)


class Part:
    """Local codes of one medium as an int64 array; parts are equal if kind, shape and codes are."""

    kind: str
    ndim: ClassVar[int]
    field: ClassVar[str] = "codes"

    def __post_init__(self):
        try:
            array = np.array(self.array)  # a copy, so that freezing it leaves the caller's array alone
        except ValueError:
            raise InputError(f"{self.kind} part: found rows of different lengths, expected {self.ndim} dimensions") from None
        if array.ndim != self.ndim:
            raise InputError(f"{self.kind} part: found shape {array.shape}, expected {self.ndim} dimensions")
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64, copy=False) if array.dtype.kind in "iuf" else None
        if whole is None or (whole != array).any():  # also what is beyond 64 bits
            raise InputError(f"{self.kind} part: found {array.dtype}, expected whole numbers")
        array = whole
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

    def __post_init__(self):
        super().__post_init__()
        if self.features is not None and tuple(self.features.shape[:2]) != self.codes.shape:
            raise InputError(f"{self.kind} part: found features of shape {tuple(self.features.shape)}, expected "
                             f"({', '.join(map(str, self.codes.shape))}, D) as its codes")

    @classmethod
    def blank(cls, kind: str, grid: tuple[int, int]) -> "MediaPart":
        """A medium whose stream is as long as that of any with this grid (h, w): codes 0, and features of width 0."""
        return cls(kind, np.zeros(grid, np.int64), torch.empty(*grid, 0))


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
        for part in _items(self.parts, "turn", "parts"):
            if not hasattr(part, "kind"):
                raise InputError(f"turn: found a part of type {type(part).__name__}, expected TextPart or MediaPart")
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
        for turn in _items(self.turns, "document", "turns"):
            if not isinstance(turn, Turn):
                raise InputError(f"document: found a turn of type {type(turn).__name__}, expected Turn")
            if turn.role is None and merged and merged[-1].role is None:
                turn = Turn(None, merged.pop().parts + turn.parts)
            if turn.role is not None or turn.parts:
                merged.append(turn)
        object.__setattr__(self, "turns", tuple(merged))


def _items(given: Any, owner: str, name: str) -> Sequence[Any]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise InputError(f"{owner}: found {type(given).__name__}, expected a tuple of {name}")
    return given
