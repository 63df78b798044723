"""Folders of tokenized shards, as `mmtx prepare` writes them: read by memory map, so that a corpus need not fit in memory.

    plan.json                 what is prepared: sources, vocabulary, rows a shard, features or not; written first
    shard-00000.safetensors   documents of a fixed range of rows
    index.safetensors         of all shards: length and number of each document, and where each shard begins and ends
    prepared.json             totals, and the digest of all shards; written last, so that a folder with it is whole

A shard holds `ids` (uint16, or uint32 where the vocabulary is larger), `numbers` (of the samples in the source), `names`
(file and row, UTF-8), and for each kind of media with features `features.KIND` (codes, D) float16. What varies in length
lies end to end: `ends.ids`, `ends.names` and `ends.KIND` (documents + 1) say where each document's part begins and ends.

Shapes: T tokens of a document, D width of features, S shards.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from mmtx.data.collection import DataSource
from mmtx.data.storage import display, is_url, open_binary
from mmtx.data.sources import SkipCounter
from mmtx.data.tokens import Augmentation, seed_of
from mmtx.errors import InputError
from mmtx.sequence import Rendered, Span, trained
from mmtx.vocabulary import Vocabulary

FORMAT = 1
INDEX, DONE = "index.safetensors", "prepared.json"
OPEN = 256  # shards that a process keeps mapped
TYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "F16": np.float16}


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


@lru_cache(maxsize=OPEN)
def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as memory maps. Raises InputError when it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        # A map of no bytes is refused by the system.
        return {name: np.memmap(path, TYPES[fact["dtype"]], "r", 8 + size + fact["data_offsets"][0], tuple(fact["shape"]))
                if 0 not in fact["shape"] else np.empty(fact["shape"], TYPES[fact["dtype"]])
                for name, fact in header.items()}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise InputError(f"{path}: not a whole shard ({type(error).__name__})") from None


class Prepared:
    """The documents of a prepared folder or URL, like `mmtx.data.tokens.Documents` of the media they were made of.

    The files of a URL are downloaded when they are needed, and kept in ~/.cache/mmtx (or $MMTX_CACHE).
    """

    def __init__(
        self,
        source: DataSource,
        path: str,
        vocabulary: Vocabulary,
        *,
        context: int,
        augmentation: Augmentation = Augmentation(),
        seed: int = 0,
        max_bad: float = 0.01,
        first: int = 0,
        features: bool = False,
    ):
        """`first` is the number of the first sample; `features` says whether the decoder takes them.

        Raises InputError for a folder that is not whole, other tokenizers, or what can be done to media only.
        """
        self.path, self.vocabulary, self.seed, self.drop = display(path).rstrip("/"), vocabulary, seed, source.drop
        self.turned = source.task == "generate"
        self.remote = path.rstrip("/") if is_url(path) else None
        if self.remote is None and not os.path.isfile(os.path.join(path, DONE)):
            raise InputError(f"{self.path}: prepared in part only, expected a whole folder: the same `mmtx prepare` "
                             "finishes it")
        with open_binary(f"{path.rstrip('/')}/{DONE}") as file:
            whole = file.read()
        self.folder = Path(path) if self.remote is None else _cache_of(whole)
        try:
            facts = json.loads(whole)
        except ValueError:
            facts = {}
        if facts.get("format") != FORMAT:
            raise InputError(f"{self.path}/{DONE}: expected a prepared folder of format {FORMAT}")
        self._check(source, facts, augmentation, features)
        self._fetch(INDEX)
        index = tensors(self.folder / INDEX)
        self.starts, self.sizes = np.array(index["starts"], np.int64), index["sizes"]  # (S + 1,), (S,)
        if self.remote is None:
            for shard in range(len(self.sizes)):
                self._check_size(shard)
        lengths, numbers = index["lengths"], index["numbers"]
        chosen = slice(None)
        if source.limit is not None and source.limit < facts["samples"]:
            wanted = np.arange(source.limit) * facts["samples"] // source.limit  # as of the samples of media
            chosen = np.flatnonzero(np.isin(numbers, wanted, assume_unique=True))
            numbers = np.searchsorted(wanted, numbers[chosen])
        skipped, room = SkipCounter(max_bad), context + 1
        total, fits = len(lengths[chosen]), lengths[chosen] <= room
        self.rows: np.ndarray | None = None if isinstance(chosen, slice) else chosen  # documents of the folder; None: all
        if not fits.all():
            rows = np.arange(total) if self.rows is None else self.rows
            for row in rows[~fits][:3].tolist():
                skipped.skip(InputError(f"{self._name(row)}: found {lengths[row]} tokens, "
                                        f"expected at most context + 1 = {room}"))
            skipped.count = int(np.count_nonzero(~fits))
            skipped.check(total)
            self.rows, numbers = rows[fits], numbers[fits]
        self.lengths = lengths if self.rows is None else lengths[self.rows]  # (documents,) tokens of each
        self.numbers, self.samples = numbers, min(source.limit or facts["samples"], facts["samples"])
        self.first = first
        self.digests = np.frombuffer(hashlib.sha256(str(facts["sha256"]).encode()).digest()[:8], "<i8")  # one for all shards
        if not len(self.lengths):
            raise InputError(f"{self.path}: no sample can be used: {skipped.summary(total)}")

    def __len__(self) -> int:
        return len(self.lengths)

    def where(self, number: int) -> str:
        """File and row of a document, as they were when it was prepared."""
        return self._name(number if self.rows is None else int(self.rows[number]))

    def render(self, chosen: Sequence[tuple[int, int]]) -> list[Rendered]:
        """Documents of (document, view) pairs. All views are the same, but those whose user turns are dropped."""
        return [self._render(number, view) for number, view in chosen]

    def _render(self, number: int, view: int) -> Rendered:
        shard, place = self._place(number if self.rows is None else int(self.rows[number]))
        ids, v = shard["ids"][_part(shard, "ids", place)].astype(np.int32), self.vocabulary
        order = np.arange(len(ids))
        if self.turned:
            order = order[turned_round(ids, v)]
        if self.drop:
            random = np.random.default_rng(seed_of(self.seed, self.first + int(self.numbers[number]), view))
            if random.random() < self.drop:
                order = order[~in_user_turns(ids[order], v)]
        spans, whole, ids = [], ids, ids[order]
        for kind in v.kinds:
            if f"features.{kind}" in shard:
                values = shard[f"features.{kind}"][_part(shard, kind, place)]
                if len(values):
                    spans += _spans(kind, values, whole, order, v)
        return Rendered(ids, trained(ids, v), tuple(spans))

    def _name(self, row: int) -> str:
        shard, place = self._place(row)
        return bytes(shard["names"][_part(shard, "names", place)]).decode()

    def _place(self, row: int) -> tuple[dict[str, np.ndarray], int]:
        """The shard of a document of the folder, and its place there."""
        number = int(np.searchsorted(self.starts, row, "right")) - 1
        if self.remote is not None and self._fetch(shard_name(number)):
            self._check_size(number)
        return tensors(self.folder / shard_name(number)), row - int(self.starts[number])

    def _check(self, source: DataSource, facts: dict, augmentation: Augmentation, features: bool) -> None:
        """Raise InputError unless a run can train on this folder."""
        entries = {entry.kind: entry for entry in self.vocabulary.entries}
        for made in facts["vocabulary"]["modalities"]:
            kind, entry = made["kind"], entries.get(made["kind"])
            found = "none" if entry is None else entry.fingerprint[:12]
            if entry is None or (entry.fingerprint, entry.size) != (made["fingerprint"], made["size"]):
                raise InputError(f"{self.path}: prepared with the {kind} tokenizer {made['fingerprint'][:12]}, found "
                                 f"{found}; expected the same one")
            if entry.start != made["start"]:
                raise InputError(f"{self.path}: its {kind} ids begin at {made['start']}, those of this run at "
                                 f"{entry.start}; expected the same tokenizers of all kinds")
        if source.select is not None:
            raise InputError(f"select: {self.path} is prepared, its samples have no fields; expected none, or a folder "
                             "that was prepared with this `select`")
        if self.turned and not facts["exchanges"]:
            raise InputError(f"task: {self.path} holds documents that are not one question with one answer, "
                             'expected "caption"')
        for kind, change in augmentation._asdict().items():
            if change is not None and kind in facts["media"]:
                raise InputError(f"{kind}_augmentation: {self.path} is prepared, what its media look or sound like cannot "
                                 "change; expected null, or the media themselves")
        for kind in facts["media"] if features else ():
            if self.vocabulary.levels(kind) and kind not in facts["features"]:
                raise InputError(f"{self.path}: prepared without features of {kind}, the decoder takes them "
                                 "(continuous: true); expected `mmtx prepare --features`")

    def _fetch(self, name: str) -> bool:
        """Download a file that is not there yet; whether it was."""
        if self.remote is None or (self.folder / name).is_file():
            return False
        download(f"{self.remote}/{name}", self.folder / name)
        return True

    def _check_size(self, shard: int) -> None:
        path, expected = self.folder / shard_name(shard), int(self.sizes[shard])
        found = path.stat().st_size if path.is_file() else "no such file"
        if found != expected:
            if self.remote is not None:
                path.unlink()
            raise InputError(f"{self.path}/{path.name}: found {found}, expected {expected} bytes")


def in_user_turns(ids: np.ndarray, v: Vocabulary) -> np.ndarray:
    """Which ids (T,) of a document lie between <user> and its <end>, (T,) bool."""
    tag = (ids == v.user) | (ids == v.assistant) | (ids == v.end)
    last = np.maximum.accumulate(np.where(tag, np.arange(len(ids)), 0))
    return (ids[last] == v.user) & ~tag


def turned_round(ids: np.ndarray, v: Vocabulary) -> np.ndarray:
    """The order (T,) of the ids of one question and one answer in which their contents change places."""
    places = np.arange(len(ids))
    (user,), (answer,) = np.flatnonzero(ids == v.user), np.flatnonzero(ids == v.assistant)
    return np.concatenate([places[:user + 1], places[answer + 1:-2], places[answer - 1:answer + 1],
                           places[user + 1:answer - 1], places[-2:]])


def _part(shard: dict[str, np.ndarray], name: str, place: int) -> slice:
    return slice(int(shard[f"ends.{name}"][place]), int(shard[f"ends.{name}"][place + 1]))


def _spans(kind: str, values: np.ndarray, whole: np.ndarray, order: np.ndarray, v: Vocabulary) -> list[Span]:
    """Features (codes, D) of all media of a kind in the document `whole` -> spans of user turns of `whole[order]`."""
    span = v.range(kind)
    coded = (whole >= span.start) & (whole < span.stop)
    ids, rows = whole[order], (np.cumsum(coded) - 1)[order]
    places = np.flatnonzero(coded[order] & in_user_turns(ids, v))
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return [Span(kind, int(run[0]), torch.from_numpy(np.array(values[rows[run]]))) for run in runs if len(run)]


def download(url: str, path: Path) -> None:
    """Copy a remote file, which appears whole or not at all. Raises InputError that names it."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file, open_binary(url) as source:
            while data := source.read(2**20):
                try:
                    file.write(data)
                except OSError as error:  # or it would be taken for one of the source
                    raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)


def _cache_of(facts: bytes) -> Path:
    """Where the files of a remote folder are kept: by its contents, so that a new one at the same place is another."""
    cache = Path(os.environ.get("MMTX_CACHE") or Path.home() / ".cache" / "mmtx")
    return cache / hashlib.sha256(facts).hexdigest()[:32]
