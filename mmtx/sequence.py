"""The grammar: documents to ids, ids to documents, which ids are trained, and which ids may come next.

    stream := <bos> turn* <eos>
    turn   := <user> part* <end> | <assistant> part* <end> | part*
    part   := text pieces | <image> <h:H> <w:W> H*W codes </image> | <audio> codes </audio>

Shape letters: B batch, T tokens, V vocabulary, h/w patch rows/cols, t audio time steps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtx.errors import InputError
from mmtx.vocabulary import MAX_SIDE, MODALITIES, Vocabulary

ROLES = ("user", "assistant", None)


# -- Documents -----------------------------------------------------------------------------------------------


class Part:
    """Local codes of one medium in an int64 array; equal when kind, shape and codes are."""

    kind: ClassVar[str]
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
        return type(self) is type(other) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash((self.kind, self.array.shape, self.array.tobytes()))


@dataclass(frozen=True, eq=False)
class TextPart(Part):
    """Text pieces, (T,)."""

    ids: np.ndarray
    kind: ClassVar[str] = "text"
    ndim: ClassVar[int] = 1
    field: ClassVar[str] = "ids"


@dataclass(frozen=True, eq=False)
class ImagePart(Part):
    """Patch codes of a picture, (h, w), and if known the encoder's features of each patch, (h, w, D)."""

    codes: np.ndarray
    features: Tensor | None = None
    kind: ClassVar[str] = "image"
    ndim: ClassVar[int] = 2


@dataclass(frozen=True, eq=False)
class AudioPart(Part):
    """Patch codes of a sound, (t, bands): time steps, then frequency; and if known their features, (t, bands, D)."""

    codes: np.ndarray
    features: Tensor | None = None
    kind: ClassVar[str] = "audio"
    ndim: ClassVar[int] = 2


@dataclass(frozen=True)
class Turn:
    """Parts by one speaker; role None is plain content outside a conversation.

    Adjacent text parts become one and empty ones vanish, because a stream cannot show them apart.
    """

    role: str | None
    parts: tuple[Part, ...]

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
    """Turns in order. Adjacent plain turns become one and empty ones vanish, as with text parts."""

    turns: tuple[Turn, ...]

    def __post_init__(self):
        merged: list[Turn] = []
        for turn in self.turns:
            if turn.role is None and merged and merged[-1].role is None:
                turn = Turn(None, merged.pop().parts + turn.parts)
            if turn.role is not None or turn.parts:
                merged.append(turn)
        object.__setattr__(self, "turns", tuple(merged))


# -- Documents to ids ----------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Features of a picture or sound of a user turn: they may stand in for its codes at the input of a model."""

    kind: str
    start: int  # place of its first code in the stream
    values: Tensor  # (codes, D)


class Rendered(NamedTuple):
    """A document as one stream."""

    ids: np.ndarray  # (T,) int32
    trained: np.ndarray  # (T,) bool: whether ids[i] is a target that counts
    spans: tuple[Span, ...] = ()


class Prompt(NamedTuple):
    """The stream that a model is to continue."""

    ids: np.ndarray  # (T,) int32
    spans: tuple[Span, ...] = ()


class Features(NamedTuple):
    """Features that stand in for the codes of one kind in a batch."""

    places: Tensor  # (n,) indices into the B*T flat tokens
    values: Tensor  # (n, D)


def render(document: Document, vocabulary: Vocabulary) -> Rendered:
    """Write a document as ids. Raises InputError on codes or sizes that the vocabulary has no ids for."""
    v, place = vocabulary, 1
    pieces, spans = [[v.bos]], []
    for turn in document.turns:
        parts = [_part(part, v) for part in turn.parts]
        if turn.role is not None:
            pieces.append([v.user if turn.role == "user" else v.assistant])
            place += 1
        for part, ids in zip(turn.parts, parts, strict=True):
            if turn.role == "user" and (features := getattr(part, "features", None)) is not None:
                first = place + (3 if isinstance(part, ImagePart) else 1)  # behind <image> <h> <w>, or <audio>
                spans.append(Span(part.kind, first, features.flatten(0, 1)))
            pieces.append(ids)
            place += len(ids)
        if turn.role is not None:
            pieces.append([v.end])
            place += 1
    ids = np.concatenate([*pieces, [v.eos]]).astype(np.int32)
    return Rendered(ids, trained(ids, vocabulary), tuple(spans))


def prompt(document: Document, vocabulary: Vocabulary) -> Prompt:
    """The stream that a model is to continue.

    After a user turn an <assistant> turn is opened; a last assistant turn or plain turn is left open.
    """
    ids, _, spans = render(document, vocabulary)
    role = document.turns[-1].role if document.turns else None
    if role == "user":
        return Prompt(np.append(ids[:-1], np.int32(vocabulary.assistant)), spans)
    return Prompt(ids[:-2] if role == "assistant" else ids[:-1], spans)


def gather_features(streams: Iterable[tuple[int, Sequence[Span]]]) -> dict[str, Features]:
    """(place of its first token in the batch, spans) of each stream -> the features of each kind."""
    found: dict[str, tuple[list, list]] = {}
    for start, spans in streams:
        for span in spans:
            places, values = found.setdefault(span.kind, ([], []))
            places.append(torch.arange(len(span.values)) + (start + span.start))
            values.append(span.values)
    return {kind: Features(torch.cat(places), torch.cat(values)) for kind, (places, values) in found.items()}


def trained(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Which ids (T,) of a legal stream are targets that count, (T,) bool. The one place that decides it.

    Of an assistant turn: everything after <assistant>, <end> included. Of a plain turn: everything, and the
    <eos> that follows it. Nothing of user turns, and never <bos>, <user>, <assistant>, <pad>, or an <eos>
    after a role turn. Streams may stand one behind another and be padded.
    """
    v = vocabulary
    ids = np.asarray(ids)
    # The owner of an id is the last of these tags before it: <bos> and <end> are followed by plain content.
    tag = _one_of(ids, v.bos, v.eos, v.user, v.assistant, v.end)
    last = np.maximum.accumulate(np.where(tag, np.arange(len(ids)), 0))
    owner = np.concatenate([[v.eos], ids[last][:-1]])
    previous = np.concatenate([[v.eos], ids[:-1]])
    in_plain = _one_of(owner, v.bos, v.end)
    plain = in_plain & ~_one_of(ids, v.bos, v.eos, v.user, v.assistant, v.pad)
    plain_end = (ids == v.eos) & in_plain & ~_one_of(previous, v.bos, v.end)
    return (owner == v.assistant) | plain | plain_end


def _one_of(ids: np.ndarray, *values: int) -> np.ndarray:
    """np.isin for a few values, ten times as fast."""
    return np.logical_or.reduce([ids == value for value in values])


def code_follows(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Behind which ids (T,) of a stream a code of a picture or sound, or its end, must come, (T,) bool."""
    v = vocabulary
    ids = np.asarray(ids)
    width = (ids >= v.width(1)) & (ids <= v.width(MAX_SIDE))
    return (v.modality_of(ids) >= MODALITIES.index("image")) | width | (ids == v.audio)


def _part(part: Part, v: Vocabulary) -> np.ndarray:
    ids = v.to_global(part.kind, part.array)
    if isinstance(part, ImagePart):
        rows, columns = ids.shape
        return np.concatenate([[v.image, v.height(rows), v.width(columns)], ids.ravel(), [v.image_end]])
    if isinstance(part, AudioPart):
        if len(ids) == 0 or ids.shape[1] != v.bands:
            raise InputError(f"audio part: found shape {ids.shape}, expected (t, {v.bands}) with t > 0")
        return np.concatenate([[v.audio], ids.ravel(), [v.audio_end]])
    return ids


# -- Ids to documents ----------------------------------------------------------------------------------------


def parse(ids: Any, vocabulary: Vocabulary) -> Document:
    """Read a stream (T,) back: `parse(render(d, v).ids, v) == d`. Raises InputError that names the position.

    For generated ids: parse the prompt, what was generated, and the <eos> together.
    """
    return _Reader(np.asarray(ids, np.int64), vocabulary).document()


class _Reader:
    """A cursor over ids that steps through the grammar of this file, one method a rule."""

    def __init__(self, ids: np.ndarray, vocabulary: Vocabulary):
        self.ids, self.v, self.at = ids, vocabulary, 0
        outside = (ids < 0) | (ids >= vocabulary.size)
        if outside.any():
            at = int(outside.argmax())
            raise InputError(f"stream position {at}: found id {ids[at]}, expected [0, {vocabulary.size})")

    def document(self) -> Document:
        v, turns = self.v, []
        self.expect(v.bos)
        while self.peek() not in (v.eos, None):
            role = {v.user: "user", v.assistant: "assistant"}.get(self.peek())
            if role is not None:
                self.at += 1
                turns.append(Turn(role, self.parts()))
                self.expect(v.end)
            elif self.peek() != v.end:
                turns.append(Turn(None, self.parts()))
            else:
                raise self.error("a turn or <eos>")
        self.expect(v.eos)
        if self.at < len(self.ids):
            raise self.error("the end of the stream")
        return Document(tuple(turns))

    def parts(self) -> tuple[Part, ...]:
        """All parts from here."""
        v, parts = self.v, []
        while (id := self.peek()) not in (v.user, v.assistant, v.eos, v.end, None):
            if id == v.image and "image" in v.kinds:
                parts.append(self.image())
            elif id == v.audio and "audio" in v.kinds:
                parts.append(self.audio())
            else:
                parts.append(TextPart(self.codes("text", minimum=1)))
        return tuple(parts)

    def image(self) -> ImagePart:
        self.expect(self.v.image)
        rows = self.side(self.v.height(1), "<h:1> to <h:64>")
        columns = self.side(self.v.width(1), "<w:1> to <w:64>")
        codes = self.codes("image", minimum=rows * columns, maximum=rows * columns)
        self.expect(self.v.image_end)
        return ImagePart(codes.reshape(rows, columns))

    def audio(self) -> AudioPart:
        self.expect(self.v.audio)
        codes = self.codes("audio", minimum=1)
        if len(codes) % self.v.bands:
            raise self.error(f"{self.v.bands} audio codes a time step")
        self.expect(self.v.audio_end)
        return AudioPart(codes.reshape(-1, self.v.bands))

    def codes(self, kind: str, minimum: int, maximum: int | None = None) -> np.ndarray:
        """The run of ids of `kind` from here, as local codes."""
        stop = None if maximum is None else self.at + maximum
        first = self.v.range(kind)
        inside = (self.ids[self.at : stop] >= first.start) & (self.ids[self.at : stop] < first.stop)
        length = len(inside) if inside.all() else int(inside.argmin())
        start, self.at = self.at, self.at + length
        if length < minimum:
            raise self.error(f"{kind} codes")
        return self.v.to_local(kind, self.ids[start : self.at])

    def side(self, first: int, what: str) -> int:
        count = -1 if self.peek() is None else self.peek() - first + 1
        if not 1 <= count <= MAX_SIDE:
            raise self.error(what)
        self.at += 1
        return count

    def expect(self, id: int) -> None:
        if self.peek() != id:
            raise self.error(self.v.name(id))
        self.at += 1

    def peek(self) -> int | None:
        return int(self.ids[self.at]) if self.at < len(self.ids) else None

    def error(self, expected: str) -> InputError:
        found = "the end" if self.peek() is None else self.v.name(self.peek())
        return InputError(f"stream position {self.at}: found {found}, expected {expected}")


# -- Which ids may come next ---------------------------------------------------------------------------------


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
