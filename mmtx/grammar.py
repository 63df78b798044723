"""Which ids may come next: an automaton that keeps what is generated legal, so that it always parses.

Shapes: B batch, V vocabulary, P phases, N classes.
"""

from collections.abc import Sequence
from enum import IntEnum, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmtx.errors import InputError
from mmtx.vocabulary import MAX_SIDE, Vocabulary


class Class(IntEnum):
    """What the grammar sees of an id."""

    OTHER = 0  # never generated: <bos>, <user>, <assistant>, reserved slots
    TEXT = auto()
    PAD = auto()
    EOS = auto()
    END = auto()
    IMAGE = auto()
    HEIGHT = auto()
    WIDTH = auto()
    IMAGE_CODE = auto()
    IMAGE_END = auto()
    AUDIO = auto()
    AUDIO_CODE = auto()
    AUDIO_END = auto()


class Phase(IntEnum):
    """Where a row stands."""

    ILLEGAL = 0  # an id came that was not allowed
    DONE = auto()
    TEXT_ONLY = auto()  # pieces, then <end>
    ANY = auto()  # parts, then <end>
    DOCUMENT = auto()  # parts, then <eos>
    ONE_IMAGE = auto()
    ONE_AUDIO = auto()
    CLOSING = auto()  # <end>
    NEED_HEIGHT = auto()
    NEED_WIDTH = auto()
    IN_IMAGE = auto()  # `remaining` codes to come
    AFTER_IMAGE = auto()
    IN_STEP = auto()  # `remaining` codes to come in this audio time step
    AFTER_STEP = auto()
    RESUME = auto()  # in NEXT only: go where the row was before its picture or sound


# phase -> {class that may come: phase after it}. Anything else is illegal.
NEXT = {
    Phase.ILLEGAL: {Class.PAD: Phase.ILLEGAL},
    Phase.DONE: {Class.PAD: Phase.DONE},
    Phase.TEXT_ONLY: {Class.TEXT: Phase.TEXT_ONLY, Class.END: Phase.DONE},
    Phase.ANY: {
        Class.TEXT: Phase.ANY,
        Class.IMAGE: Phase.NEED_HEIGHT,
        Class.AUDIO: Phase.IN_STEP,
        Class.END: Phase.DONE,
    },
    Phase.DOCUMENT: {
        Class.TEXT: Phase.DOCUMENT,
        Class.IMAGE: Phase.NEED_HEIGHT,
        Class.AUDIO: Phase.IN_STEP,
        Class.EOS: Phase.DONE,
    },
    Phase.ONE_IMAGE: {Class.IMAGE: Phase.NEED_HEIGHT},
    Phase.ONE_AUDIO: {Class.AUDIO: Phase.IN_STEP},
    Phase.CLOSING: {Class.END: Phase.DONE},
    Phase.NEED_HEIGHT: {Class.HEIGHT: Phase.NEED_WIDTH},
    Phase.NEED_WIDTH: {Class.WIDTH: Phase.IN_IMAGE},
    Phase.IN_IMAGE: {Class.IMAGE_CODE: Phase.IN_IMAGE},
    Phase.AFTER_IMAGE: {Class.IMAGE_END: Phase.RESUME},
    Phase.IN_STEP: {Class.AUDIO_CODE: Phase.IN_STEP},
    Phase.AFTER_STEP: {Class.AUDIO_CODE: Phase.IN_STEP, Class.AUDIO_END: Phase.RESUME},
}
# phase -> where a row goes on after a picture or sound that it opened there
RESUME = {
    Phase.ANY: Phase.ANY,
    Phase.DOCUMENT: Phase.DOCUMENT,
    Phase.ONE_IMAGE: Phase.CLOSING,
    Phase.ONE_AUDIO: Phase.CLOSING,
}
# phase -> where a row goes on when `remaining` reaches 0
COUNTED = {Phase.IN_IMAGE: Phase.AFTER_IMAGE, Phase.IN_STEP: Phase.AFTER_STEP}
STARTS = {
    "text": Phase.TEXT_ONLY,
    "image": Phase.ONE_IMAGE,
    "audio": Phase.ONE_AUDIO,
    "any": Phase.ANY,
    "document": Phase.DOCUMENT,
}


class GrammarState(NamedTuple):
    """Where each row of a batch stands; int64 tensors (B,) on the device of the batch.

    Where all rows write text alone there is nothing to resume or to count, and only the phase.
    """

    phase: Tensor
    resume: Tensor | None = None  # phase after the open picture or sound
    height: Tensor | None = None  # rows of the open picture
    remaining: Tensor | None = None  # codes to come in the open picture or audio time step

    def keep(self, rows: Tensor) -> "GrammarState":
        """The state of some rows."""
        return GrammarState(*(each if each is None else each[rows] for each in self))


class _Tables(NamedTuple):
    """The grammar as tensors on one device. P phases, N classes."""

    classes: Tensor  # (V,) uint8: id -> Class
    next_phase: Tensor  # (P, N) int64
    allowed: Tensor  # (P, V) bool
    resume: Tensor  # (P,) int64
    counted: Tensor  # (P,) int64: phase when `remaining` is 0
    closers: Tensor  # (V,) bool: ids that close something


class Grammar:
    """The automaton that keeps generated ids legal, so that what was generated always parses.

    `allowed` and `advance` are lookups in small tables and never wait for the device. Each row has its own
    state: one may write text while another writes a picture.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self._tables = {torch.device("cpu"): _build_tables(vocabulary)}

    def start(
        self,
        batch: int,
        out: str | Sequence[str] = "any",
        device: torch.device | str = "cpu",
        prefix: Any = None,
    ) -> GrammarState:
        """The state before the first id that a model generates.

        `out`, one for all or one a row: "text" pieces then <end>; "image" or "audio" exactly one, then <end>;
        "any" of them mixed, then <end>; "document" the same, then <eos> (for plain prompts). Then only <pad>.
        `prefix`, ids (P,) or (B, P), counts as generated already: <image> <h:8> <w:8> asks for that size,
        codes behind it for the rest of a picture.
        Raises InputError on a modality without ids or an illegal prefix.
        """
        outs = [out] * batch if isinstance(out, str) else list(out)
        for name in set(outs):
            if name not in STARTS:
                raise InputError(f"out: found {name!r}, expected one of {', '.join(STARTS)}")
            if name in ("image", "audio") and name not in self.vocabulary.kinds:
                raise InputError(f"out: found {name!r}, expected one of {', '.join(self.vocabulary.kinds)}")
        if len(outs) != batch:
            raise InputError(f"out: found {len(outs)} kinds, expected {batch}, one a row")
        phase = torch.tensor([STARTS[name] for name in outs], dtype=torch.int64, device=device)
        self._on(phase.device)  # copy the tables now, not within the first step
        text = set(outs) <= {"text"}
        state = GrammarState(phase, *(() if text else (phase, torch.zeros_like(phase), torch.zeros_like(phase))))
        if prefix is None:
            return state
        prefix = torch.as_tensor(prefix, dtype=torch.int64, device=device)
        for ids in prefix.expand(batch, prefix.shape[-1]).unbind(1):
            state = self.advance(state, ids)
        # The only look at the device, once and before generation starts.
        if bool((state.phase == Phase.ILLEGAL).any()):
            raise InputError("prefix: found ids that the grammar forbids, expected the start of an answer")
        return state

    def reach(self, out: str) -> int:
        """How many ids, from the first, an answer may be made of: text needs no codes."""
        return self.vocabulary.range("special").stop if out == "text" else self.vocabulary.size

    def allowed(self, state: GrammarState, reach: int | None = None) -> Tensor:
        """Which ids, of all or the first `reach`, may come next, (B, V) bool; at least one in every row."""
        return self._on(state.phase.device).allowed[:, :reach][state.phase]

    def closing(self, allowed: Tensor) -> Tensor:
        """Keep of `allowed` (B, V) only what closes something, in the rows where anything does."""
        closes = allowed & self._on(allowed.device).closers[:allowed.shape[1]]
        return torch.where(closes.any(1, keepdim=True), closes, allowed)

    def advance(self, state: GrammarState, ids: Tensor) -> GrammarState:
        """The state after each row wrote one id, (B,). After a forbidden id a row gets only <pad>."""
        tables = self._on(state.phase.device)
        kind = tables.classes[ids].long()
        if state.resume is None:
            return GrammarState(tables.next_phase[state.phase, kind])
        opens = (kind == Class.IMAGE) | (kind == Class.AUDIO)
        resume = torch.where(opens, tables.resume[state.phase], state.resume)
        phase = tables.next_phase[state.phase, kind]
        phase = torch.where(phase == Phase.RESUME, resume, phase)
        # Count codes down from h * w in a picture, from `bands` in each audio time step.
        height = torch.where(kind == Class.HEIGHT, ids - self.vocabulary.height(1) + 1, state.height)
        is_code = (kind == Class.IMAGE_CODE) | (kind == Class.AUDIO_CODE)
        remaining = state.remaining - is_code.long()
        remaining = torch.where(kind == Class.WIDTH, height * (ids - self.vocabulary.width(1) + 1), remaining)
        remaining = torch.where(kind == Class.AUDIO, self.vocabulary.bands or 0, remaining)
        phase = torch.where(remaining == 0, tables.counted[phase], phase)
        remaining = torch.where(phase == Phase.AFTER_STEP, self.vocabulary.bands or 0, remaining)
        return GrammarState(phase, resume, height, remaining)

    def finished(self, state: GrammarState) -> Tensor:
        """Which rows have written their last id, (B,) bool."""
        return state.phase <= Phase.DONE  # ILLEGAL or DONE

    def _on(self, device: torch.device) -> _Tables:
        if device not in self._tables:
            cpu = self._tables[torch.device("cpu")]
            self._tables[device] = _Tables(*(table.to(device) for table in cpu))
        return self._tables[device]


def _build_tables(v: Vocabulary) -> _Tables:
    classes = torch.zeros(v.size, dtype=torch.uint8)  # Class.OTHER
    for kind, code in (("text", Class.TEXT), ("image", Class.IMAGE_CODE), ("audio", Class.AUDIO_CODE)):
        if kind in v.kinds:
            classes[v.range(kind).start : v.range(kind).stop] = code
    classes[v.height(1) : v.height(MAX_SIDE) + 1] = Class.HEIGHT
    classes[v.width(1) : v.width(MAX_SIDE) + 1] = Class.WIDTH
    classes[v.pad], classes[v.eos], classes[v.end] = Class.PAD, Class.EOS, Class.END
    classes[v.image_end], classes[v.audio_end] = Class.IMAGE_END, Class.AUDIO_END
    # Without ids for its codes a picture or sound could never be closed: then its tag stays OTHER.
    if "image" in v.kinds:
        classes[v.image] = Class.IMAGE
    if "audio" in v.kinds:
        classes[v.audio] = Class.AUDIO

    next_phase = torch.full((len(Phase), len(Class)), int(Phase.ILLEGAL))
    allowed_class = torch.zeros(len(Phase), len(Class), dtype=torch.bool)
    for phase, after in NEXT.items():
        for kind, then in after.items():
            next_phase[phase, kind] = int(then)
            allowed_class[phase, kind] = True
    resume = torch.tensor([int(RESUME.get(phase, phase)) for phase in Phase])
    counted = torch.tensor([int(COUNTED.get(phase, phase)) for phase in Phase])
    closers = torch.zeros(v.size, dtype=torch.bool)
    closers[[v.pad, v.end, v.eos, v.image_end, v.audio_end]] = True
    return _Tables(classes, next_phase, allowed_class[:, classes.long()], resume, counted, closers)
