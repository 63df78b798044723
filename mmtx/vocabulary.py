"""One global id for every code of every tokenizer, in ranges that never move.

    [0, size of text)    text pieces, first so that a pretrained text model keeps its rows
    + SLOTS ids          special tokens, each in a fixed slot
    + one range a kind   codes of the media, in the order in which they were added

A modality's entry has all that is needed to read and write its streams, so that its code is not.

Shape letters: V vocabulary.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from mmtx.errors import InputError
from mmtx.files import user_path, write_file
from mmtx.json_files import read_json, write_json
from mmtx.modality.base import ChatFormat, Tokenizer, check_codes
from mmtx.modality.registry import MODALITIES, unknown
from mmtx.schema import build, shown, typed, within

FORMAT = 1
MOST_IDS = 2**30  # of a kind; ids have 32 bits
SLOTS = 256  # reserved for special tokens; the unused ones let later versions add some without moving an id
MAX_SIDE = 64  # patch rows or columns of a picture
NUMBERED = ("special", "text", "image", "audio")  # indices that `modality_of` returns; they never change

# The order is the file format: append only.
NAMES = (
    *("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<end>"),
    *("<image>", "</image>", "<audio>", "</audio>"),
    *(f"<h:{n}>" for n in range(1, MAX_SIDE + 1)),
    *(f"<w:{n}>" for n in range(1, MAX_SIDE + 1)),
)


@dataclass(frozen=True)
class Entry:
    """The ids [start, start + size) of one tokenizer, and what other modules need to know about it."""

    OPTIONAL: ClassVar = ("tags", "merge")  # omitted from the file if None

    kind: str
    start: int
    size: int
    fingerprint: str
    levels: tuple[int, ...] | None = None  # FSQ levels of a codec, None if it has none
    bands: int | None = None  # codes per time step in the layout "steps", None in others
    tags: tuple[int, ...] | None = None  # slots of <kind> and </kind> if NAMES has none
    merge: tuple[int, ...] | None = None  # rows and columns of features that are one token of a user turn; None: 1 and 1

    @property
    def layout(self) -> Literal["pieces", "grid", "steps"]:
        """How the stream arranges its codes, see `Modality.layout`."""
        return "pieces" if self.kind == "text" else "grid" if self.bands is None else "steps"

    @property
    def slots(self) -> tuple[int, int]:
        """Slots of the opening and closing tag of a medium."""
        if self.tags:
            return self.tags[0], self.tags[1]
        return NAMES.index(f"<{self.kind}>"), NAMES.index(f"</{self.kind}>")


@dataclass(frozen=True)
class VocabularyFile:
    """A vocabulary as stored in its file."""

    format: int
    slots: int
    modalities: tuple[Entry, ...]
    markup: ChatFormat | None = None


def _special(name: str) -> property:
    slot = NAMES.index(name)
    return property(lambda self: self.entries[0].size + slot, doc=f"Id of {name}.")


@dataclass(frozen=True)
class Vocabulary:
    """Frozen id ranges; make one with `build`, `add` or `load`."""

    entries: tuple[Entry, ...]  # text first
    chat_format: ChatFormat | None = None  # how the pretrained model of the text tokenizer writes turns; None: with tags

    pad = _special("<pad>")
    bos = _special("<bos>")
    eos = _special("<eos>")
    user = _special("<user>")
    assistant = _special("<assistant>")
    image = _special("<image>")
    image_end = _special("</image>")
    audio = _special("<audio>")
    audio_end = _special("</audio>")

    @property
    def end(self) -> int:
        """Id of <end>, or the id that ends an answer in the chat format of a pretrained model."""
        return self.entries[0].size + NAMES.index("<end>") if self.chat_format is None else self.chat_format.end[0]

    @classmethod
    def build(cls, tokenizers: Mapping[str, Tokenizer]) -> "Vocabulary":
        """Assign ids to `tokenizers`, by kind: text (required), then the others in the order given."""
        if "text" not in tokenizers:
            raise InputError(f"vocabulary: found tokenizers for {sorted(tokenizers)}, expected one for text")
        vocabulary = cls((_entry("text", tokenizers["text"], 0),), tokenizers["text"].chat_format)
        for kind, tokenizer in tokenizers.items():
            if kind != "text":
                vocabulary = vocabulary.add(kind, tokenizer)
        return vocabulary

    def add(self, kind: str, tokenizer: Tokenizer) -> "Vocabulary":
        """Return a vocabulary with one more modality, whose ids follow all existing ones."""
        if kind in self.kinds:
            raise InputError(f"vocabulary: found {kind}, which it already has, expected a new kind")
        # Further modalities take slots from the end, since NAMES grows from the beginning.
        free = SLOTS - 2 * sum(entry.tags is not None for entry in self.entries)
        tags = None if kind in NUMBERED else (free - 2, free - 1)
        return replace(self, entries=(*self.entries, _entry(kind, tokenizer, self.size, tags)))

    def merging(self, sizes: Mapping[str, Sequence[int]]) -> "Vocabulary":
        """Return a vocabulary with other merge sizes: (rows, columns) of neighbouring features that enter as one token, by kind.

        As the patch merger of Qwen2-VL (https://arxiv.org/abs/2409.12191): fewer tokens for the same picture or sound. Only media
        of user turns are merged, since what is generated are single codes. Raises InputError for a kind without features.
        """
        for kind in sizes:
            self._entry(kind)
        entries = tuple(replace(entry, merge=None if (size := tuple(sizes.get(entry.kind, (1, 1)))) == (1, 1) else size)
                        for entry in self.entries)
        for entry in entries:
            _check_merge(entry, f"merge_size.{entry.kind}")
        return replace(self, entries=entries)

    def merge(self, kind: str) -> tuple[int, int]:
        """Rows and columns of features of `kind` that are one token of a user turn."""
        rows, columns = self._entry(kind).merge or (1, 1)
        return rows, columns

    @property
    def size(self) -> int:
        """V: number of ids, including unused special slots."""
        return SLOTS + sum(entry.size for entry in self.entries)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media that have ids, text included, in the order of their ranges."""
        return tuple(entry.kind for entry in self.entries)

    @property
    def media(self) -> tuple[str, ...]:
        """`kinds` without text."""
        return self.kinds[1:]

    @cached_property
    def modality_names(self) -> tuple[str, ...]:
        """Names for the numbers of `modality_of`: those in NUMBERED, whether they have ids or not, then further kinds."""
        return (*NUMBERED, *(kind for kind in self.kinds if kind not in NUMBERED))

    def layout(self, kind: str) -> Literal["pieces", "grid", "steps"]:
        """How the stream arranges codes of `kind`: as they are, after their rows and columns, or in steps of `bands`."""
        return self._entry(kind).layout

    def bands(self, kind: str) -> int | None:
        """Codes per time step of `kind`; None if its layout is not "steps"."""
        return self._entry(kind).bands

    def opening(self, kind: str) -> int:
        """Id of <kind>."""
        return self.entries[0].size + self._entry(kind).slots[0]

    def closing(self, kind: str) -> int:
        """Id of </kind>."""
        return self.entries[0].size + self._entry(kind).slots[1]

    def levels(self, kind: str) -> tuple[int, ...] | None:
        """FSQ levels of the codec of `kind`; None if it has none, such as text."""
        return self._entry(kind).levels

    def height(self, rows: int) -> int:
        """Id of <h:rows>. Raises InputError outside 1..64."""
        return self._side("<h:1>", rows, "rows")

    def width(self, columns: int) -> int:
        """Id of <w:columns>. Raises InputError outside 1..64."""
        return self._side("<w:1>", columns, "columns")

    def range(self, kind: str) -> range:
        """The ids of one kind of media, or of "special"."""
        if kind == "special":
            return range(self.entries[0].size, self.entries[0].size + SLOTS)
        entry = self._entry(kind)
        return range(entry.start, entry.start + entry.size)

    def to_global(self, kind: str, codes: Any) -> np.ndarray:
        """Codes of one tokenizer (any shape) to ids, int64. Raises InputError on a code outside [0, size)."""
        entry = self._entry(kind)
        codes = np.asarray(codes, np.int64)
        check_codes(codes, range(entry.size), f"{kind} codes")
        return codes + entry.start

    def to_local(self, kind: str, ids: Any) -> np.ndarray:
        """Ids (any shape) to codes of one tokenizer, int64. Raises InputError on an id of another kind."""
        entry = self._entry(kind)
        ids = np.asarray(ids, np.int64)
        check_codes(ids, self.range(kind), f"{kind} ids")
        return ids - entry.start

    @cached_property
    def modalities(self) -> np.ndarray:
        """(V,) uint8: for every id, its index in `modality_names`."""
        table = np.zeros(self.size, np.uint8)
        for entry in self.entries:
            table[entry.start : entry.start + entry.size] = self.modality_names.index(entry.kind)
        table.flags.writeable = False
        return table

    def modality_of(self, ids: Any) -> np.ndarray:
        """Ids (any shape) to uint8: 0 special, 1 text, 2 image, 3 audio, 4.. others. Raises InputError outside [0, V)."""
        ids = np.asarray(ids, np.int64)
        check_codes(ids, range(self.size), "ids")
        return self.modalities[ids]

    def kind(self, id: int) -> str:
        """ "special", "text" or a kind of media. Raises InputError outside [0, V)."""
        return self.modality_names[int(self.modality_of(id))]

    def name(self, id: int) -> str:
        """A readable name of one id: "<h:8>", "image:1234", "text:17"."""
        kind = self.kind(id)
        code = int(id) - self.range(kind).start
        if kind != "special":
            return f"{kind}:{code}"
        for entry in self.entries:
            if entry.tags and code in entry.tags:
                return f"<{'/' * entry.tags.index(code)}{entry.kind}>"
        return NAMES[code] if code < len(NAMES) else f"<reserved:{code}>"

    def check(self, tokenizers: Mapping[str, Tokenizer]) -> None:
        """Raise InputError unless `tokenizers` are exactly those that this vocabulary was built from."""
        for kind in (*self.kinds, *tokenizers):
            if kind not in tokenizers or kind not in self.kinds:
                found, expected = sorted(tokenizers), sorted(self.kinds)
                raise InputError(f"{kind} tokenizer: found {found}, the vocabulary expects {expected}")
        for kind, tokenizer in tokenizers.items():
            entry, found = self._entry(kind), _entry(kind, tokenizer, 0)
            if (found.size, found.fingerprint) != (entry.size, entry.fingerprint):
                raise InputError(
                    f"{kind} tokenizer: found fingerprint {found.fingerprint[:12]} with {found.size} codes, "
                    f"the vocabulary expects {entry.fingerprint[:12]} with {entry.size} codes"
                )
            if (found.levels, found.bands) != (entry.levels, entry.bands):
                raise InputError(f"{kind} tokenizer: found levels {found.levels} and {found.bands} bands, the vocabulary "
                                 f"expects {entry.levels} and {entry.bands}")

    def to_json(self) -> bytes:
        """The content of the file that `save` writes."""
        modalities = [{name: value for name, value in asdict(entry).items() if name not in Entry.OPTIONAL or value is not None}
                      for entry in self.entries]
        chat = {} if self.chat_format is None else {"markup": asdict(self.chat_format)}
        return write_json({"format": FORMAT, "slots": SLOTS, "modalities": modalities, **chat})

    def save(self, path: str | Path) -> None:
        """Write it as a JSON file. Raises InputError if it cannot be written."""
        write_file(user_path(path), self.to_json())

    @classmethod
    @typed
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read what `save` wrote. Raises InputError if it is missing, damaged or of another format."""
        return cls.of(read_json(user_path(path)), path)

    @classmethod
    def of(cls, value: Any, path: str | Path) -> "Vocabulary":
        """The vocabulary from its JSON value, read from `path`. Raises InputError unless it is one that `to_json` can write."""
        found = build(VocabularyFile, value, path, optional=("markup",))
        if (found.format, found.slots) != (FORMAT, SLOTS):
            raise InputError(f"{path}: expected a vocabulary of format {FORMAT} with {SLOTS} special slots")
        entries = found.modalities
        starts = [entry.start for entry in entries]
        ends = [entry.start + entry.size for entry in entries]
        kinds = [entry.kind for entry in entries]
        for kind in kinds:
            if kind not in MODALITIES and re.fullmatch("[a-z][a-z0-9_]*", kind):
                raise unknown(kind, path)
        if kinds[:1] != ["text"] or len(set(kinds)) < len(kinds) or not set(kinds) <= MODALITIES.keys():
            raise InputError(f"{path}: field 'kind' reads {shown(', '.join(kinds))}, expected text, then other kinds once each")
        for entry in entries:
            _check_entry(entry, path)
        tags = [tag for entry in entries for tag in entry.tags or ()]
        if len(set(tags)) < len(tags):
            raise InputError(f"{path}: field 'tags' reads {shown(str(tags))}, expected distinct slots")
        ends[0] += SLOTS  # the special tokens are between text and the rest
        if starts != [0, *ends[:-1]]:
            raise InputError(f"{path}: field 'start' reads {starts}, expected {[0, *ends[:-1]]}, ranges without gaps")
        if found.markup is not None:
            ids = [id for part in astuple(found.markup) for id in part]
            if not found.markup.end or not all(0 <= id < entries[0].size for id in ids):
                raise InputError(f"{path}: field 'markup' is not a valid chat format, expected text ids, at least one in 'end'")
        return cls(entries, found.markup)

    def _entry(self, kind: str) -> Entry:
        for entry in self.entries:
            if entry.kind == kind:
                return entry
        raise InputError(f"vocabulary: found no {kind} ids, only {', '.join(self.kinds)}")

    def _side(self, first: str, count: int, what: str) -> int:
        if not 1 <= count <= MAX_SIDE:
            raise InputError(f"picture: found {count} patch {what}, expected 1 to {MAX_SIDE}")
        return self.entries[0].size + NAMES.index(first) + int(count) - 1


def _entry(kind: str, tokenizer: Tokenizer, start: int, tags: tuple[int, int] | None = None) -> Entry:
    if kind not in MODALITIES or tokenizer.kind != kind:
        raise InputError(
            f"vocabulary: found a tokenizer of kind {tokenizer.kind!r} under {kind!r}, "
            f"expected the same kind, one of {', '.join(MODALITIES)}"
        )
    levels = None if tokenizer.levels is None else tuple(int(level) for level in tokenizer.levels)
    bands = int(tokenizer.bands or 0) if MODALITIES[kind].layout == "steps" else None
    if bands == 0:
        raise InputError(f"{kind} tokenizer: found bands {tokenizer.bands}, expected 1 or more codes in a time step")
    return Entry(kind, start, tokenizer.size, tokenizer.fingerprint, levels, bands, tags)


def _check_entry(entry: Entry, path: str | Path) -> None:
    """Raise InputError for an entry that `_entry` would not make."""
    at, levels, stepped = f"{path}: {entry.kind}:", entry.levels, MODALITIES[entry.kind].layout == "steps"
    within(f"{at} size", entry.size, 1, MOST_IDS)
    if not re.fullmatch("[0-9a-f]{64}", entry.fingerprint):
        raise InputError(f"{at} field 'fingerprint' is {shown(entry.fingerprint)}, expected 64 hexadecimal digits")
    if levels is not None and (entry.kind == "text" or min(levels, default=0) < 2 or math.prod(levels) != entry.size):
        raise InputError(f"{at} field 'levels' is {shown(str(levels))}, expected {'null' if entry.kind == 'text' else ''}"
                         f"{'' if entry.kind == 'text' else f'numbers whose product is size={entry.size}'}")
    if (entry.bands is None) == stepped or entry.bands is not None and not 1 <= entry.bands <= entry.size:
        raise InputError(f"{at} field 'bands' is {shown(entry.bands)}, expected {'1 or more' if stepped else 'null'}")
    if (entry.tags is None) != (entry.kind in NUMBERED) or entry.tags and not (
            len(entry.tags) == 2 and len(NAMES) <= entry.tags[0] < entry.tags[1] < SLOTS):
        expected = "none" if entry.kind in NUMBERED else f"two slots from {len(NAMES)} to {SLOTS - 1}"
        raise InputError(f"{at} field 'tags' is {shown(str(entry.tags))}, expected {expected}")
    _check_merge(entry, f"{at} field 'merge'")


def _check_merge(entry: Entry, what: str) -> None:
    """Raise InputError for a merge size that streams of the entry's layout cannot have."""
    if entry.merge is None:
        return
    if entry.levels is None:
        raise InputError(f"{what}: found {str([*entry.merge]):.40}, expected none: a {entry.kind} tokenizer without a quantizer of "
                         "its own has no features")
    columns = MAX_SIDE if entry.layout == "grid" else 1  # bands stay apart, since each step has all of them
    if len(entry.merge) != 2 or not (1 <= entry.merge[0] <= MAX_SIDE and 1 <= entry.merge[1] <= columns):
        raise InputError(f"{what}: found {str([*entry.merge]):.40}, expected 1 to {MAX_SIDE} rows and "
                         f"{'1' if columns == 1 else f'1 to {columns}'} columns, such as [2, {min(2, columns)}]")
