"""Folders of tokenized shards, written by `mmtx prepare`: memory-mapped, so that a corpus need not fit in memory.

    plan.json                 what is prepared: sources, vocabulary, rows per shard, with features or not; written first
    shard-00000.safetensors   documents of a fixed range of rows
    index.safetensors         length and number of each document; first document and bytes of each shard
    prepared.json             totals, and the digest of all shards; written last, so that a folder with it is complete

A shard holds `ids` (uint16, or uint32 for a larger vocabulary), `numbers` (of the samples in the source), `names` (file and
row, UTF-8), and for each kind of media with features `features.KIND` (codes, D) float16. Parts of varying length are
concatenated: `ends.ids`, `ends.names` and `ends.KIND` (documents + 1) hold the boundaries of each document's part.

Shapes: T tokens of a document, D width of features, S shards.
"""

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtx.data.collection import DataSource
from mmtx.data.skip_counter import MAX_BAD, SkipCounter
from mmtx.data.storage import cache, display, download, join, read
from mmtx.data.tokens import Augmentation, seed_of
from mmtx.data.urls import is_url
from mmtx.errors import InputError
from mmtx.files import open_regular
from mmtx.json_files import parse_json
from mmtx.schema import build, shown, within
from mmtx.sequence import Rendered, Span, in_user_turns, loss_mask
from mmtx.vocabulary import Vocabulary
from mmtx.weights import Header, read_header

FORMAT = 1
INDEX, DONE = "index.safetensors", "prepared.json"
MOST_FACTS = 64 * 2**20  # bytes of prepared.json, which lists all sources
OPEN = 256  # shards that a process keeps mapped
TYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "F16": np.float16}


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


@lru_cache(maxsize=OPEN)
def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as memory maps. Raises InputError if it is missing or damaged."""
    header = header_of(path)
    try:
        # The system cannot map zero bytes.
        return {name: np.memmap(path, TYPES[place.dtype], "r", header.data + place.start, place.shape)
                if place.stop > place.start else np.empty(place.shape, TYPES[place.dtype])
                for name, place in header.tensors.items()}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a whole shard ({type(error).__name__})") from None


def header_of(path: Path) -> Header:
    """The header of a safetensors file. Raises InputError unless the file is complete."""
    try:
        with open(open_regular(path), "rb") as file:
            return read_header(file, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def digest(made: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the tensors of a shard."""
    found = hashlib.sha256()
    for name, values in sorted(made.items()):
        found.update(f"{name} {values.dtype} {values.shape}".encode())
        found.update(np.ascontiguousarray(values))  # type: ignore[arg-type]  # arrays are typed as buffers only from Python 3.12 on
    return found.hexdigest()


@dataclass(frozen=True)
class Facts:
    """The fields of prepared.json that training uses."""

    format: int
    vocabulary: Any
    rows: int
    skipped: int
    errors: tuple[str, ...]  # of the first rows that were skipped
    samples: int
    documents: int
    tokens: int
    shards: int
    media: Mapping[str, int]
    features: Mapping[str, int]  # widths
    exchanges: bool
    sha256: str

    @classmethod
    def of(cls, data: bytes, where: str) -> "Facts":
        """Parse prepared.json. Raises InputError for anything that `mmtx prepare` does not write."""
        values = parse_json(data, where)
        if not isinstance(values, dict) or type(values.get("format")) is not int or values["format"] != FORMAT:
            raise InputError(f"{where}: expected a prepared folder of format {FORMAT}")
        facts = build(cls, {field.name: values[field.name] for field in fields(cls) if field.name in values}, where)
        for name in ("rows", "skipped", "samples", "documents", "tokens", "shards"):
            within(f"{where}: {name}", getattr(facts, name), 0, 2**48)
        return replace(facts, vocabulary=Vocabulary.of(facts.vocabulary, f"{where}: field 'vocabulary'"))


class Prepared:
    """The documents of a prepared folder or URL, with the interface of `mmtx.data.documents.Documents`.

    The files of a URL are downloaded when needed, and kept in ~/.cache/mmtx (or $MMTX_CACHE).
    """

    def __init__(
        self,
        source: DataSource,
        path: str,
        vocabulary: Vocabulary,
        *,
        max_seq_len: int,
        augmentation: Augmentation = Augmentation(),
        seed: int = 0,
        max_bad: float = MAX_BAD,
        first: int = 0,
        features: bool = False,
        patches: Collection[str] = (),
    ):
        """`first` is the number of the first sample.

        `features` says whether the decoder takes features, `patches` for which kinds it takes patches instead. Raises InputError
        for an incomplete folder, other tokenizers, or options that apply to media only.
        """
        self.path, self.vocabulary, self.seed = display(path).rstrip("/"), vocabulary, seed
        self.cond_drop_prob = source.cond_drop_prob
        self.swapped = source.task == "generate"
        self.remote = path if is_url(path) else None
        if self.remote is None and not os.path.isfile(os.path.join(path, DONE)):
            raise InputError(f"{self.path}: found an unfinished prepared folder, expected a complete one; the same "
                             "`mmtx prepare` finishes it")
        whole = read(join(path, DONE), MOST_FACTS)
        self.folder = Path(path) if self.remote is None else cache() / hashlib.sha256(whole).hexdigest()[:32]
        self.facts = facts = Facts.of(whole, f"{self.path}/{DONE}")
        self._check(source, facts, augmentation, features, patches)
        self._fetch(INDEX)
        tensors.cache_clear()  # the folder may have been prepared anew under the same name
        self.index = index = tensors(self.folder / INDEX)
        self._check_index(index)
        self.starts, self.sizes = np.array(index["starts"], np.int64), index["sizes"]  # (S + 1,), (S,)
        # Which shards were compared with their digests, by any of the processes that read them.
        self.compared = torch.zeros(facts.shards, dtype=torch.uint8).share_memory_()
        if self.remote is None:
            for shard in range(len(self.sizes)):
                self._check_size(shard)
            found = hashlib.sha256("".join(self._digest(shard) for shard in range(facts.shards)).encode()).hexdigest()
            if found != facts.sha256:
                raise InputError(f"{self.path}: found shards of the checksum {found[:12]}, expected {shown(facts.sha256[:12])} as "
                                 f"in {DONE}: one of them has been changed or replaced")
        lengths, numbers = index["lengths"], index["numbers"]
        chosen = slice(None)
        if source.limit is not None and source.limit < facts.samples:
            wanted = np.arange(source.limit) * facts.samples // source.limit  # the same samples as with media
            chosen = np.flatnonzero(np.isin(numbers, wanted, assume_unique=True))
            numbers = np.searchsorted(wanted, numbers[chosen])
        # The count continues that of `mmtx prepare`, so that a folder is accepted if its media would be.
        skipped, room = SkipCounter(max_bad, facts.rows), max_seq_len + 1
        skipped.count, skipped.first = facts.skipped, list(facts.errors[:3])
        total, fits = len(lengths[chosen]), lengths[chosen] <= room
        self.rows: np.ndarray | None = None if isinstance(chosen, slice) else chosen  # documents of the folder; None: all
        if not fits.all():
            rows = np.arange(total) if self.rows is None else self.rows
            for row in rows[~fits][:3].tolist():
                skipped.skip(InputError(f"{self._name(row)}: found {lengths[row]} tokens, "
                                        f"expected at most max_seq_len + 1 = {room}"))
            skipped.count = facts.skipped + int(np.count_nonzero(~fits))
            self.rows, numbers = rows[fits], numbers[fits]
        self.lengths = lengths if self.rows is None else lengths[self.rows]  # (documents,) tokens of each
        self.numbers, self.samples = numbers, min(source.limit or facts.samples, facts.samples)
        self.first = first
        self.digests = np.frombuffer(hashlib.sha256(facts.sha256.encode()).digest()[:8], "<i8")  # one for all shards
        skipped.check()
        if not len(self.lengths):
            raise InputError(f"{self.path}: no sample can be used: {skipped.summary()}")

    def __len__(self) -> int:
        return len(self.lengths)

    def where(self, number: int) -> str:
        """File and row of a document, as they were when it was prepared."""
        return self._name(number if self.rows is None else int(self.rows[number]))

    def render(self, chosen: Sequence[tuple[int, int]]) -> list[Rendered]:
        """Documents of (document, view) pairs. All views of a document are equal, except those without user turns."""
        return [self._render(number, view) for number, view in chosen]

    def _render(self, number: int, view: int) -> Rendered:
        shard, place = self._place(number if self.rows is None else int(self.rows[number]))
        ids, v = shard["ids"][_part(shard, "ids", place)].astype(np.int32), self.vocabulary
        order = np.arange(len(ids))
        if self.swapped:
            order = order[swapped_order(ids, v)]
        if self.cond_drop_prob:
            random = np.random.default_rng(seed_of(self.seed, self.first + int(self.numbers[number]), view))
            if random.random() < self.cond_drop_prob:
                order = order[~in_user_turns(ids[order], v)]
        spans, whole, ids = [], ids, ids[order]
        for kind in v.kinds:
            if f"features.{kind}" in shard:
                values = shard[f"features.{kind}"][_part(shard, kind, place)]
                if len(values):
                    spans += _spans(kind, values, whole, order, v)
        return Rendered(ids, loss_mask(ids, v), tuple(spans))

    def _name(self, row: int) -> str:
        shard, place = self._place(row)
        return bytes(shard["names"][_part(shard, "names", place)]).decode("utf-8", "replace")

    def _place(self, row: int) -> tuple[dict[str, np.ndarray], int]:
        """The shard that holds a document of the folder, and the document's index there."""
        number = int(np.searchsorted(self.starts, row, "right")) - 1
        path = self.folder / shard_name(number)
        if self.remote is not None and self._fetch(path.name):
            self._check_size(number)
        shard = tensors(path)
        if not self.compared[number]:
            try:
                self._check_shard(shard, number)
            except InputError:
                if self.remote is not None:
                    path.unlink(missing_ok=True)
                tensors.cache_clear()
                raise
            self.compared[number] = 1
        return shard, row - int(self.starts[number])

    def _check_index(self, index: dict[str, np.ndarray]) -> None:
        """Raise InputError unless the index is consistent with prepared.json."""
        facts, where = self.facts, f"{self.path}/{INDEX}"
        _expect(index, where, lengths=(facts.documents, "uint32"), numbers=(facts.documents, "uint32", "uint64"),
                starts=(facts.shards + 1, "uint64"), sizes=(facts.shards, "uint64"))
        starts, lengths, numbers = index["starts"], index["lengths"], index["numbers"]
        if not _ends_fit(starts, facts.documents):
            raise InputError(f"{where}: 'starts' are not the offsets of the {facts.documents} documents")
        if facts.documents and (lengths.min() < 1 or int(lengths.sum(dtype=np.uint64)) != facts.tokens):
            raise InputError(f"{where}: found {lengths.sum(dtype=np.uint64)} tokens, expected {facts.tokens}, and 1 or more "
                             "in each document")
        if facts.documents and (numbers[-1] >= facts.samples or not (numbers[1:] > numbers[:-1]).all()):
            raise InputError(f"{where}: 'numbers' of samples do not ascend, or are not all below {facts.samples}")

    def _check_shard(self, shard: dict[str, np.ndarray], number: int) -> None:
        """Raise InputError unless a shard is unchanged and consistent with the index."""
        where = f"{self.path}/{shard_name(number)}"
        chosen = slice(int(self.starts[number]), int(self.starts[number + 1]))
        count, vocabulary = chosen.stop - chosen.start, self.facts.vocabulary
        media = [kind for kind in vocabulary.kinds if f"features.{kind}" in shard]
        _expect(shard, where, ids=(None, "uint16", "uint32"), numbers=(count, "uint64"), names=(None, "uint8"),
                **{f"ends.{name}": (count + 1, "uint64") for name in ("ids", "names", *media)},
                **{f"features.{kind}": ((None, self.facts.features.get(kind, 0)), "float16") for kind in media})
        ids = shard["ids"]
        for name, values in (("ids", ids), ("names", shard["names"]), *((kind, shard[f"features.{kind}"]) for kind in media)):
            if not _ends_fit(shard[f"ends.{name}"], len(values)):
                raise InputError(f"{where}: 'ends.{name}' are not the offsets of its {len(values)} {name}")
        if len(ids) and ids.max() >= vocabulary.size:
            raise InputError(f"{where}: found id {ids.max()}, expected less than {vocabulary.size}, the size of its vocabulary")
        ends = shard["ends.ids"].astype(np.int64)
        if not np.array_equal(np.diff(ends), self.index["lengths"][chosen]):
            raise InputError(f"{where}: its documents are not as long as {INDEX} says")
        if not np.array_equal(shard["numbers"], self.index["numbers"][chosen]):
            raise InputError(f"{where}: its documents have other numbers than {INDEX} says")
        for kind in media:
            codes = vocabulary.range(kind)
            coded = np.concatenate([[0], np.cumsum((ids >= codes.start) & (ids < codes.stop))])
            if not np.array_equal(coded[ends], shard[f"ends.{kind}"]):
                raise InputError(f"{where}: found {len(shard[f'features.{kind}'])} features of {kind}, expected one for each "
                                 f"of its {coded[-1]} codes")
        if digest(shard) != self._digest(number):
            raise InputError(f"{where}: its checksum does not fit: it has changed since it was written")

    def _digest(self, number: int) -> str:
        """The digest that is stored in a shard."""
        path = self.folder / shard_name(number)
        facts = parse_json(header_of(path).metadata.get("mmtx", "{}").encode(), path)
        if not isinstance(facts, dict) or not isinstance(found := facts.get("sha256"), str):
            raise InputError(f"{self.path}/{path.name}: found no checksum in its metadata, expected one of `mmtx prepare`")
        return found

    def _check(self, source: DataSource, facts: Facts, augmentation: Augmentation, features: bool,
               patches: Collection[str]) -> None:
        """Raise InputError unless a run can train on this folder."""
        entries = {entry.kind: entry for entry in self.vocabulary.entries}
        for made in facts.vocabulary.entries:
            kind, entry = made.kind, entries.get(made.kind)
            found = "none" if entry is None else entry.fingerprint[:12]
            if entry is None or (entry.fingerprint, entry.size) != (made.fingerprint, made.size):
                raise InputError(f"{self.path}: prepared with the {kind} tokenizer {made.fingerprint[:12]}, found "
                                 f"{found} in this run; expected the same one (mmtx prepare --config or --tokenizers names it)")
            if entry.start != made.start:
                raise InputError(f"{self.path}: its {kind} ids begin at {made.start}, those of this run at "
                                 f"{entry.start}; expected the same tokenizers of all kinds")
            if kind in facts.media and entry.merge is not None:
                raise InputError(f"merge_size.{kind}: {self.path} is prepared, with a token for each feature; expected none, or the "
                                 "media themselves")
        for name in ("select", "split"):
            if getattr(source, name) is not None:
                raise InputError(f"{name}: {self.path} is prepared, its samples have no fields; expected none, or a folder "
                                 f"that was prepared with this `{name}`")
        if source.variants is not None:
            raise InputError(f"variants: {self.path} is prepared, its samples are as they are; expected none, or a folder that was "
                             "prepared with these `variants`")
        if self.swapped and not facts.exchanges:
            raise InputError(f"task: {self.path} holds documents that are not one question with one answer, "
                             'expected "caption"')
        for kind, change in augmentation._asdict().items():
            if change is not None and kind in facts.media:
                raise InputError(f"{kind}_augmentation: {self.path} is prepared, what its media look or sound like cannot "
                                 "change; expected null, or the media themselves")
        for kind in facts.media:
            if self.vocabulary.levels(kind) and kind in patches:
                raise InputError(f"{self.path}: prepared, which stores no patches of {kind}; the decoder takes them "
                                 "(train_encoder: true), expected the media themselves")
        for kind in facts.media if features else ():
            if self.vocabulary.levels(kind) and kind not in facts.features:
                raise InputError(f"{self.path}: prepared without features of {kind}, the decoder takes them "
                                 "(continuous_inputs: true); expected `mmtx prepare --features`")

    def _fetch(self, name: str) -> bool:
        """Download a file unless it is there; returns whether it was downloaded."""
        if self.remote is None or (self.folder / name).is_file():
            return False
        download(join(self.remote, name), self.folder / name)
        return True

    def _check_size(self, shard: int) -> None:
        path, expected = self.folder / shard_name(shard), int(self.sizes[shard])
        found = path.stat().st_size if path.is_file() else "no such file"
        if found != expected:
            if self.remote is not None:
                path.unlink()
            raise InputError(f"{self.path}/{path.name}: found {found}, expected {expected} bytes")


def swapped_order(ids: np.ndarray, v: Vocabulary) -> np.ndarray:
    """The permutation (T,) of the ids of one question and one answer that swaps their contents."""
    if v.chat_format is not None:
        raise InputError("task: found a tokenizer with the chat format of a pretrained model, expected the tags of the stream")
    places = np.arange(len(ids))
    users, answers = np.flatnonzero(ids == v.user), np.flatnonzero(ids == v.assistant)
    if len(users) != 1 or len(answers) != 1 or users[0] > answers[0] or len(ids) < 6:
        raise InputError(f"task: found a document of {len(users)} questions and {len(answers)} answers, expected one and one")
    (user,), (answer,) = users, answers
    return np.concatenate([places[:user + 1], places[answer + 1:-2], places[answer - 1:answer + 1],
                           places[user + 1:answer - 1], places[-2:]])


def _expect(found: dict[str, np.ndarray], where: str, **expected: tuple) -> None:
    """Raise InputError unless exactly these tensors are found, each with its shape (None: any size) and one of its types."""
    if found.keys() != expected.keys():
        raise InputError(f"{where}: found the tensors {shown(', '.join(sorted(found)))}, expected {', '.join(sorted(expected))}")
    for name, (shape, *types) in expected.items():
        shape, values = shape if isinstance(shape, tuple) else (shape,), found[name]
        fits = len(shape) == values.ndim and all(size in (None, real) for size, real in zip(shape, values.shape))
        if not fits or values.dtype.name not in types:
            raise InputError(f"{where}: {name!r} is {values.dtype.name} {shown(str(values.shape))}, expected "
                             f"{' or '.join(types)} {str(shape).replace('None', 'any')}")


def _ends_fit(ends: np.ndarray, length: int) -> bool:
    """Whether `ends` are the boundaries of consecutive parts of `length` items."""
    return bool(len(ends) and ends[0] == 0 and ends[-1] == length and (ends[1:] >= ends[:-1]).all())


def _part(shard: dict[str, np.ndarray], name: str, place: int) -> slice:
    return slice(int(shard[f"ends.{name}"][place]), int(shard[f"ends.{name}"][place + 1]))


def _spans(kind: str, values: np.ndarray, whole: np.ndarray, order: np.ndarray, v: Vocabulary) -> list[Span]:
    """Features (codes, D) of all media of a kind in the document `whole` -> spans in the user turns of `whole[order]`."""
    span = v.range(kind)
    coded = (whole >= span.start) & (whole < span.stop)
    ids, rows = whole[order], (np.cumsum(coded) - 1)[order]
    places = np.flatnonzero(coded[order] & in_user_turns(ids, v))
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return [Span(kind, int(run[0]), torch.from_numpy(np.array(values[rows[run]])), _grid(kind, ids, run, v))
            for run in runs if len(run)]


def _grid(kind: str, ids: np.ndarray, run: np.ndarray, v: Vocabulary) -> tuple[int, int]:
    """Rows and columns of a medium with codes at the places `run`: in the layout "grid", the id before them gives the columns."""
    columns = v.bands(kind) or int(ids[run[0] - 1]) - v.width(1) + 1
    return len(run) // columns, columns
