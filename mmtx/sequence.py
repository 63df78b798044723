"""The stream: documents to ids and back, and which ids are trained.

    stream := <bos> turn* <eos>
    turn   := <user> part* <end> | <assistant> part* <end> | part*
    part   := text pieces | <image> <h:H> <w:W> H*W codes </image> | <audio> codes </audio>

Media of further modalities are enclosed in their own tags, in one of these two layouts ("grid" and "steps"). Where the vocabulary
merges the features of a kind, a medium of a user turn has a token for each group of neighbours, and the size that follows from that.

Shapes: T tokens of a stream, D width of features.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mmtx.document import Document, MediaPart, Part, TextPart, Turn
from mmtx.embedding import Features
from mmtx.errors import InputError
from mmtx.vocabulary import MAX_SIDE, NUMBERED, Vocabulary

# -- Documents to ids ----------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Features of a medium in a user turn, which may replace its codes as inputs of a model."""

    kind: str
    start: int  # position of its first code in the stream
    values: Tensor  # (tokens, D), or patches (tokens, P) for a decoder with encoders
    grid: tuple[int, int] | None = None  # rows and columns of the tokens; encoders need it
    merge: tuple[int, int] = (1, 1)  # rows and columns of features that are one token, see `Vocabulary.merging`
    codes: np.ndarray | None = None  # if merged: all codes of the medium, of which the stream has one for each token


class Rendered(NamedTuple):
    """A document as one stream."""

    ids: np.ndarray  # (T,) int32
    loss_mask: np.ndarray  # (T,) bool: whether ids[i] is a target that counts
    spans: tuple[Span, ...] = ()


class Pair(NamedTuple):
    """Two documents that differ in their answers, of which the first is preferred."""

    chosen: Rendered
    rejected: Rendered


class Prompt(NamedTuple):
    """The stream that a model is to continue."""

    ids: np.ndarray  # (T,) int32
    spans: tuple[Span, ...] = ()


def render(document: Document, vocabulary: Vocabulary) -> Rendered:
    """Write a document as ids. Raises InputError on codes or sizes that the vocabulary has no ids for."""
    v, place = vocabulary, 1
    pieces: list[Sequence[int] | np.ndarray] = [[v.bos]]
    spans: list[Span] = []
    for turn in document.turns:
        given = [_merge(part, v) if turn.role == "user" and isinstance(part, MediaPart) else part for part in turn.parts]
        parts = [_part(part, v) for part in given]
        if turn.role is not None:
            pieces.append([v.user if turn.role == "user" else v.assistant])
            place += 1
        for whole, part, ids in zip(turn.parts, given, parts, strict=True):
            if turn.role == "user" and (features := getattr(part, "features", None)) is not None:
                first = place + (3 if v.layout(part.kind) == "grid" else 1)  # after <kind> <h> <w>, or <kind>
                spans.append(Span(part.kind, first, features.flatten(0, 1), tuple(features.shape[:2]), v.merge(part.kind),
                                  None if part is whole else whole.array))
            pieces.append(ids)
            place += len(ids)
        if turn.role is not None:
            pieces.append([v.end])
            place += 1
    ids = np.concatenate([*pieces, [v.eos]]).astype(np.int32)
    ids, places = apply_chat_format(ids, v)
    spans = [span._replace(start=int(places[span.start])) for span in spans]
    return Rendered(ids, loss_mask(ids, vocabulary), tuple(spans))


def prompt(document: Document, vocabulary: Vocabulary) -> Prompt:
    """The stream that a model is to continue.

    After a user turn an <assistant> turn is opened; a last assistant turn or plain turn is left open.
    """
    ids, _, spans = render(document, vocabulary)
    role = document.turns[-1].role if document.turns else None
    chat = vocabulary.chat_format
    if role == "user":
        opening = [vocabulary.assistant] if chat is None else chat.assistant
        return Prompt(np.append(ids[:-1], np.asarray(opening, np.int32)), spans)
    end = 1 if chat is None else len(chat.end)
    return Prompt(ids[:-1 - end] if role == "assistant" else ids[:-1], spans)


def gather_features(streams: Iterable[tuple[int, Sequence[Span]]]) -> dict[str, Features]:
    """(index of its first token in the flattened batch, spans) of each stream -> the features of each kind."""
    found: dict[str, list[tuple[int, Span]]] = {}
    for start, spans in streams:
        for span in spans:
            found.setdefault(span.kind, []).append((start, span))
    return {kind: Features(torch.cat([torch.arange(len(span.values)) + (start + span.start) for start, span in given]),
                           torch.cat([span.values for _, span in given]), tuple(cast(Any, span.grid) for _, span in given),
                           given[0][1].merge) for kind, given in found.items()}


def loss_mask(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Which ids (T,) of a legal stream are trained as targets, (T,) bool; decided here alone.

    In an assistant turn: everything after <assistant>, including <end>. In a plain turn: everything, and the <eos> that
    follows it. Nothing in user turns, and never <bos>, <user>, <assistant>, <pad>, or an <eos> after a role turn. Several
    streams may be concatenated and padded.
    """
    return _of_tags(ids, vocabulary, _trained)


def _of_tags(ids: np.ndarray, v: Vocabulary, chosen: Callable[[np.ndarray, Vocabulary], np.ndarray]) -> np.ndarray:
    """`chosen` of a stream (T,) that may be in a chat format, as if it had tags; False for all but the first id of a tag."""
    if v.chat_format is None:
        return chosen(np.asarray(ids), v)
    tags, kept = read_chat_format(ids, v)
    mask = np.zeros(len(kept), bool)
    mask[kept] = chosen(tags[kept], v)
    return mask


def _trained(ids: np.ndarray, v: Vocabulary) -> np.ndarray:
    owner = _owners(ids, v)
    previous = np.concatenate([[v.eos], ids[:-1]])
    in_plain = _one_of(owner, v.bos, v.end)
    plain = in_plain & ~_one_of(ids, v.bos, v.eos, v.user, v.assistant, v.pad)
    plain_end = (ids == v.eos) & in_plain & ~_one_of(previous, v.bos, v.end)
    return (owner == v.assistant) | plain | plain_end


def in_user_turns(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Which ids (T,) of a legal stream lie between <user> and its <end>, (T,) bool."""
    return _of_tags(ids, vocabulary, lambda tags, v: (_owners(tags, v) == v.user) & ~_one_of(tags, *_tags(v)))


def apply_chat_format(ids: np.ndarray, v: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Replace the tags of a stream (T,) by a pretrained model's chat format -> its ids, and the new position of each id (T,)."""
    if (m := v.chat_format) is None:
        return ids, np.arange(len(ids))
    of = {v.user: m.user, v.assistant: m.assistant, v.end: m.end}
    pieces = [of.get(id, (id,)) for id in ids.tolist()]
    if len(ids) > 1 and ids[1] in (v.user, v.assistant):
        pieces[0] = m.begin
    lengths = np.array([len(piece) for piece in pieces])
    return np.concatenate(pieces).astype(ids.dtype), np.cumsum(lengths) - lengths


def read_chat_format(ids: Any, v: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """A stream (T,) in a chat format -> the stream with a tag where each marker begins, and a mask (T,) without their rest.

    Every marker begins with a special token, and texts contain none, so text is never taken for a marker.
    """
    ids = np.array(ids)
    kept, m = np.ones(len(ids), bool), v.chat_format
    for tag, piece in ((v.bos, m.begin), (v.user, m.user), (v.assistant, m.assistant), (v.end, m.end)):
        if not piece or len(ids) < len(piece):
            continue
        starts = np.flatnonzero((ids[:len(ids) - len(piece) + 1] == piece[0]) & kept[:len(ids) - len(piece) + 1])
        starts = starts[(ids[starts[:, None] + np.arange(len(piece))] == piece).all(1)]
        ids[starts] = tag
        kept[(starts[:, None] + np.arange(1, len(piece))).ravel()] = False
    return ids, kept


def _tags(v: Vocabulary) -> tuple[int, ...]:
    return v.bos, v.eos, v.user, v.assistant, v.end


def _owners(ids: np.ndarray, v: Vocabulary) -> np.ndarray:
    """The last tag before each id (T,); plain content follows <bos> and <end>."""
    last = np.maximum.accumulate(np.where(_one_of(ids, *_tags(v)), np.arange(len(ids)), 0))
    return np.concatenate([[v.eos], ids[last][:-1]])


def _one_of(ids: np.ndarray, *values: int) -> np.ndarray:
    """np.isin for a few values, ten times as fast."""
    return np.logical_or.reduce([ids == value for value in values])


def code_follows(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """After which ids (T,) of a stream the next id must be a code of a medium or its closing tag, (T,) bool."""
    v = vocabulary
    ids = np.asarray(ids)
    width = (ids >= v.width(1)) & (ids <= v.width(MAX_SIDE))
    stepped = [v.opening(kind) for kind in v.media if v.layout(kind) == "steps"]
    return np.logical_or.reduce([v.modality_of(ids) > NUMBERED.index("text"), width, *(ids == tag for tag in stepped)])


def _merge(part: MediaPart, v: Vocabulary) -> MediaPart:
    """A medium whose features are merged: each group of neighbours side by side, with the code of its first.

    Edges are filled up by repeating the last row and column.
    """
    rows, columns = v.merge(part.kind)
    if rows == columns == 1:
        return part
    if part.features is None:
        raise InputError(f"{part.kind} part: found codes alone in a user turn, expected features with them: this vocabulary merges "
                         f"{rows} x {columns} features to a token")
    h, w = part.codes.shape
    down, across = (torch.arange(-(-side // size) * size).clamp_max(side - 1) for side, size in ((h, rows), (w, columns)))
    grid = part.features[down][:, across].unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
    return MediaPart(part.kind, part.codes[::rows, ::columns], grid.flatten(2))


def _part(part: Part, v: Vocabulary) -> np.ndarray:
    ids = v.to_global(part.kind, part.array)
    if isinstance(part, TextPart):
        return ids
    if (bands := v.bands(part.kind)) is None:
        rows, columns = ids.shape
        size = [v.height(rows), v.width(columns)]
    elif len(ids) == 0 or ids.shape[1] != bands:
        raise InputError(f"{part.kind} part: found shape {ids.shape}, expected (t, {bands}) with t > 0")
    else:
        size = []
    return np.concatenate([[v.opening(part.kind), *size], ids.ravel(), [v.closing(part.kind)]])


# -- Ids to documents ----------------------------------------------------------------------------------------


def parse(ids: Any, vocabulary: Vocabulary) -> Document:
    """Read a stream (T,) back: `parse(render(d, v).ids, v) == d`. Raises InputError that names the position.

    For generated ids: parse the prompt, what was generated, and the <eos> together.
    """
    ids = np.asarray(ids, np.int64)
    places = np.arange(len(ids) + 1)
    if vocabulary.chat_format is not None:
        tags, kept = read_chat_format(ids, vocabulary)
        ids, places = tags[kept], places[np.append(kept, True)]
        if not vocabulary.chat_format.begin and len(ids) and ids[0] in (vocabulary.user, vocabulary.assistant):
            ids, places = np.append(np.int64(vocabulary.bos), ids), np.append(0, places)
    return _Reader(ids, vocabulary, places).document()


class _Reader:
    """A recursive-descent parser of this file's grammar, with one method per rule.

    Errors report `places`: the positions of each id, and of the end, in the caller's input, which may be in a chat format.
    """

    def __init__(self, ids: np.ndarray, vocabulary: Vocabulary, places: np.ndarray):
        self.ids, self.v, self.places, self.at = ids, vocabulary, places, 0
        self.kinds = {vocabulary.opening(kind): kind for kind in vocabulary.media}
        outside = (ids < 0) | (ids >= vocabulary.size)
        if outside.any():
            at = int(outside.argmax())
            raise InputError(f"stream position {places[at]}: found id {ids[at]}, expected [0, {vocabulary.size})")

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
        """The parts from here up to the next tag of a turn or the end."""
        v = self.v
        parts: list[Part] = []
        while (id := self.peek()) not in (v.user, v.assistant, v.eos, v.end, None):
            if id in self.kinds:
                parts.append(self.medium(self.kinds[id]))
            else:
                parts.append(TextPart(self.codes("text", minimum=1)))
        return tuple(parts)

    def medium(self, kind: str) -> MediaPart:
        v = self.v
        self.expect(v.opening(kind))
        if (bands := v.bands(kind)) is None:
            rows = self.side(v.height(1), "<h:1> to <h:64>")
            columns = self.side(v.width(1), "<w:1> to <w:64>")
            codes = self.codes(kind, minimum=rows * columns, maximum=rows * columns).reshape(rows, columns)
        else:
            codes = self.codes(kind, minimum=1)
            if len(codes) % bands:
                raise self.error(f"{bands} {kind} codes a time step")
            codes = codes.reshape(-1, bands)
        self.expect(v.closing(kind))
        return MediaPart(kind, codes)

    def codes(self, kind: str, minimum: int, maximum: int | None = None) -> np.ndarray:
        """The run of ids of `kind` from here, as local codes."""
        stop = None if maximum is None else self.at + maximum
        first = self.v.range(kind)
        inside = (self.ids[self.at : stop] >= first.start) & (self.ids[self.at : stop] < first.stop)
        inside &= self.ids[self.at : stop] != self.v.end  # in a chat format an id of the text tokenizer
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
        return InputError(f"stream position {self.places[self.at]}: found {found}, expected {expected}")
