"""`mmtx prepare`: tokenizes sources into a folder of shards (format: mmtx/data/prepared.py), in several processes.

Rows are split into shards in source order, and each shard is a pure function of its rows: whatever the number of processes
and machines, and wherever a run was killed and restarted, the resulting folder is the same byte for byte.

Several machines can take one part each: part k of n writes every n-th shard to a folder of its own in the output, independently
of the others. A run without a part takes these shards over, makes the missing ones, and writes the index.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from tqdm import tqdm

from mmtx.data.collection import DataSource, to_stderr
from mmtx.data.output import LOCK, check_output, lock_folder
from mmtx.data.prepared import DONE, FORMAT, INDEX, shard_name, tensors
from mmtx.data.prepared import digest as _digest
from mmtx.data.sample import Media, Sample
from mmtx.data.skip_counter import MAX_BAD, SkipCounter
from mmtx.data.sources import PLAN, scan
from mmtx.data.storage import recorded
from mmtx.data.tokens import ENCODE_AT_ONCE, Augmentation, encode_samples, load_sample
from mmtx.data.variants import load_variants
from mmtx.data.workers import WorkerDied, Workers
from mmtx.document import Document, MediaPart
from mmtx.errors import InputError
from mmtx.files import write_file
from mmtx.json_files import read_json, write_json
from mmtx.modality.base import Tokenizer
from mmtx.schema import within
from mmtx.sequence import render
from mmtx.vocabulary import Vocabulary

ROWS = 2048  # per shard: 34 MB if each row is a picture of 64 codes with features, 0.6 MB without features
AHEAD = 2    # shards per process that are read ahead
UNFINISHED = re.compile(r"(plan\.json|shard-\d+\.safetensors|index\.safetensors|prepared\.json)\.\d+\.part|\.probe-\d+")
MOST_WORKERS = 1024
PART = re.compile(r"part-\d+-of-\d+")
SHARD = re.compile(r"shard-\d+\.safetensors")


def prepare(
    source: DataSource,
    tokenizers: Mapping[str, Tokenizer],
    output: str | Path,
    *,
    features: bool = False,
    rows: int = ROWS,
    num_workers: int = 1,
    max_bad: float = MAX_BAD,
    part: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Write `output`, or finish one that was begun with the same sources and tokenizers -> the content of its prepared.json.

    For a part, returns only the numbers of its "shards" and "rows"; `max_bad` is checked when the parts are joined.

    Args:
        source: its `paths`, `select`, `split`, `split_by`, `fields`, `follow_links`, `trusted` and `variants`. The rest applies
            in training, which finds all samples.
        tokenizers: by kind; all that the sources need.
        output: a new folder, or one that was begun with the same arguments (`num_workers` and `max_bad` may differ).
        features: store the encoder's features of all pictures and sounds, for decoders with `continuous_inputs: true`.
        rows: rows per shard.
        num_workers: processes that read and encode.
        max_bad: share of the rows of the source that may be unusable.
        part: (k, n) with k from 1 to n: only every n-th shard from the k-th on, into a folder of its own in `output`. Without
            it, the shards of all parts in `output` are taken over first.

    Raises:
        InputError: the folder holds something else, sources or tokenizers changed since it was begun, it cannot be
            written, or too many rows are unusable; finished shards are kept.
    """
    within("rows", rows, 1, 2**32)
    within("num_workers", num_workers, 1, MOST_WORKERS)
    skipped, vocabulary = SkipCounter(max_bad), Vocabulary.build(tokenizers)
    options = ("split", "split_by", "fields", "follow_links", "variants")
    reading = {name: value for name in options if (value := getattr(source, name))}
    plan = {"format": FORMAT, "sources": [as_utf8(recorded(path)) for path in source.paths], "select": source.select,
            "shard_rows": rows, "features": features, "vocabulary": json.loads(vocabulary.to_json()), **reading}
    folder = check_output(os.fspath(output))
    if part is not None:
        if (folder / DONE).exists():
            raise InputError(f"{folder}: is already complete, expected no --part, or another --output")
        for other in sorted(path for path in folder.glob(f"part-*/{PLAN}") if PART.fullmatch(path.parent.name)):
            _compare(other.parent, plan)  # now, and not when the parts are joined
        folder = check_output(os.fspath(folder / "part-{}-of-{}".format(*part)))
    with lock_folder(folder, "output"):
        _begin(folder, plan)
        try:
            if part is None:
                _take_over(folder, plan)
            shards, samples = _shards(source, (folder, dict(tokenizers), vocabulary, features), rows, num_workers, skipped, part)
            if part is not None:
                return {"shards": len(shards), "rows": sum(shard["rows"] for shard in shards)}
            return _finish(folder, plan, shards, samples, skipped)
        finally:
            for path in folder.iterdir():
                if UNFINISHED.fullmatch(path.name):  # of processes that were killed, now or earlier
                    path.unlink(missing_ok=True)


def _take_over(folder: Path, plan: dict) -> None:
    """Move the shards of all parts, finished or not, to where a run without parts keeps them."""
    for made in sorted(path for path in folder.iterdir() if PART.fullmatch(path.name) and path.is_dir()):
        with lock_folder(made, "output"):
            if (made / PLAN).is_file():
                _compare(made, plan)
            # The plan goes last: after a kill, the next run must know what the shards were made from.
            for path in sorted(made.iterdir(), key=lambda path: path.name == PLAN):
                if SHARD.fullmatch(path.name):
                    os.replace(path, folder / path.name)
                elif path.name == PLAN or UNFINISHED.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            made.rmdir()  # unless it holds files that are not ours


def _shards(source: DataSource, setting: tuple, rows: int, num_workers: int, skipped: SkipCounter,
            part: tuple[int, int] | None) -> tuple[list[dict], int]:
    """Write the shards -> facts about each, and the number of samples; rows are counted in `skipped`."""
    folder, number, samples = setting[0], 0, 0
    place, step = (0, 1) if part is None else (part[0] - 1, part[1])
    shards: dict[int, dict] = {}
    running: set[Future] = set()
    pool = Workers(num_workers, _make, setting)
    try:
        with tqdm(desc="prepare", unit=" rows", unit_scale=True) as bar:
            def collect(busy: int) -> None:
                nonlocal running
                while len(running) > busy:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for number, facts in (future.result() for future in done):
                        shards[number] = facts
                        bar.set_postfix(shards=len(shards), skipped=sum(fact["skipped"] for fact in shards.values()))
                        bar.update(facts["rows"])

            for number, block in enumerate(_blocks(source, rows, skipped), 1):
                if (number - 1) % step == place:
                    running.add(pool.submit(_packed(number - 1, samples, block)))
                samples += sum(isinstance(row, Sample) for row in block)
                collect(AHEAD * num_workers)
            collect(0)
    except WorkerDied as died:
        raise InputError(f"{folder}: one of the {num_workers} worker processes (--num_workers) {died}; the same command "
                         "resumes") from None
    finally:
        pool.end()
    wanted = set(map(shard_name, range(number)))
    if beyond := sorted(path for path in folder.iterdir() if SHARD.fullmatch(path.name) and path.name not in wanted):
        raise InputError(f"{beyond[0]}: the sources have no rows for it, they changed since it was "
                         "written; expected the same sources, or another --output")
    return [shards[i] for i in sorted(shards)], samples


def _packed(number: int, first: int, rows: list[Sample | InputError]) -> bytes:
    """The pickled arguments of `_make`. Metadata nested too deeply to pickle are left out; shards do not store them."""
    try:
        return pickle.dumps((number, first, rows))
    except RecursionError:
        return pickle.dumps((number, first, [_flat(row, pickle.dumps) for row in rows]))


def _flat(row: Sample | InputError, use: Callable[[Any], Any]) -> Sample | InputError:
    """The row, without its metadata if they are nested too deeply for `use`."""
    try:
        use(row)
        return row
    except RecursionError:
        assert isinstance(row, Sample)  # an error has no metadata
        return replace(row, metadata={})


def as_utf8(text: str) -> str:
    """Text for JSON, with what is not valid UTF-8 escaped, as in some file names."""
    return text.encode("utf-8", "backslashreplace").decode()


def _begin(folder: Path, plan: dict) -> None:
    """Write the plan to the folder, or compare it with the plan there."""
    if (folder / PLAN).is_file() and any(folder.glob("shard-*.safetensors")):
        _compare(folder, plan)
        return
    if any(path.name not in (PLAN, LOCK) and not UNFINISHED.fullmatch(path.name) and not PART.fullmatch(path.name)
           for path in folder.iterdir()):
        raise InputError(f"{folder}: holds other files, expected a new folder or one that `mmtx prepare` began")
    write_file(folder / PLAN, write_json(plan))


def _compare(folder: Path, plan: dict) -> None:
    """Raise InputError unless the plan in a folder equals this one."""
    begun = read_json(folder / PLAN)
    for name in plan:
        found, expected = plan[name], begun.get(name) if isinstance(begun, dict) else None
        if found != expected:
            if name == "vocabulary":
                name, found, expected = "tokenizers", _fingerprints(found), _fingerprints(expected)
            option = name.removeprefix("shard_")
            raise InputError(f"{folder}: was begun with {option} {expected}, found {found}; expected the same, or another --output")


def _fingerprints(vocabulary: Any) -> str:
    entries = vocabulary.get("modalities", ()) if isinstance(vocabulary, dict) else ()
    return ", ".join(f"{entry['kind']} {entry['fingerprint'][:12]}" for entry in entries) or "none"


def _blocks(source: DataSource, rows: int, skipped: SkipCounter) -> Iterator[list[Sample | InputError]]:
    """The rows of a source in blocks, with errors in place of unreadable ones; all rows are counted."""
    block: list[Sample | InputError] = []
    for row in _rows(source, skipped):
        block.append(row)
        if len(block) == rows:
            yield block
            block = []
    if block:
        yield block


def _rows(source: DataSource, skipped: SkipCounter) -> Iterator[Sample | InputError]:
    variants = load_variants(source.variants)
    for path in source.paths:
        for row in scan(path, source.trusted, source.fields, source.follow_links, to_stderr):
            skipped.rows += 1
            if isinstance(row, InputError):
                yield row
            elif source.selection.has(row):
                made = variants(row)
                skipped.rows += max(0, len(made) - 1)  # a row that they leave out still counts
                yield from made


def _finish(folder: Path, plan: dict, shards: Sequence[dict], samples: int,
            skipped: SkipCounter) -> dict[str, Any]:
    """Write the index and the totals."""
    skipped.count = sum(shard["skipped"] for shard in shards)
    skipped.first = [error for shard in shards for error in shard["errors"]][:3]
    skipped.check()
    if skipped.count == sum(shard["rows"] for shard in shards):
        raise InputError(f"{', '.join(plan['sources'])}: no sample is left of {skipped.rows} rows")
    numbers, lengths = [], []
    features: dict[str, int] = {}
    for number in range(len(shards)):
        # Not through the cache: a process can hold some ten thousand memory maps, and a large corpus has more tensors.
        maps = tensors.__wrapped__(folder / shard_name(number))
        numbers.append(np.array(maps["numbers"]))
        lengths.append(np.diff(maps["ends.ids"]).astype(np.uint32))
        features |= {name.removeprefix("features."): values.shape[1] for name, values in maps.items()
                     if name.startswith("features.")}
    index = {
        "lengths": np.concatenate(lengths),
        "numbers": np.concatenate(numbers).astype(np.uint32 if samples <= 2**32 else np.uint64),
        "starts": np.cumsum([0, *map(len, lengths)], dtype=np.uint64),
        "sizes": np.array([(folder / shard_name(n)).stat().st_size for n in range(len(shards))], np.uint64),
    }
    media: dict[str, int] = {}
    for shard in shards:
        for kind, codes in shard["media"].items():
            media[kind] = media.get(kind, 0) + codes
    facts = {
        **plan, "rows": skipped.rows, "samples": samples, "documents": len(index["lengths"]), "tokens": int(index["lengths"].sum()),
        "skipped": skipped.count, "errors": skipped.first, "media": media,
        "features": features,
        "exchanges": all(shard["exchanges"] for shard in shards), "shards": len(shards),
        "sha256": hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest(),
    }
    write_file(folder / INDEX, safetensors.numpy.save(index))
    write_file(folder / DONE, write_json(facts))
    return facts


# -- In the processes ----------------------------------------------------------------------------------------


def _make(setting: tuple, number: int, first: int, rows: list[Sample | InputError]) -> tuple[int, dict]:
    """Write a shard, unless it is there already -> its number and its facts."""
    torch.set_num_threads(1)
    folder, tokenizers, vocabulary, features = setting
    path, stamp = folder / shard_name(number), stamp_of(rows)
    if (facts := _facts(path)) is not None:
        if facts["stamp"] != stamp:
            raise InputError(f"{path}: the sources changed since it was written, expected the same, or another --output")
        return number, facts
    made, facts = make_shard(rows, first, tokenizers, vocabulary, features)
    facts |= {"stamp": stamp, "sha256": _digest(made)}
    # A single metadata entry: the library writes several in no fixed order.
    write_file(path, safetensors.numpy.save(made, {"mmtx": json.dumps(facts, sort_keys=True)}))
    return number, facts


def make_shard(rows: Sequence[Sample | InputError], first: int, tokenizers: Mapping[str, Tokenizer],
               vocabulary: Vocabulary, features: bool) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors of a shard, and facts about it; `first` is the number of its first sample."""
    documents: list[Document] = []
    ids, numbers, names, skipped = [], [], [], SkipCounter(1.0)
    numbered = [(place, row) for place, row in _numbered(rows, first)]
    for start in range(0, len(rows), ENCODE_AT_ONCE):
        chosen, media = [], []
        for number, row in numbered[start:start + ENCODE_AT_ONCE]:
            try:
                if isinstance(row, InputError):
                    raise row
                media.append(load_sample(row, tokenizers))
                chosen.append((number, row))
            except InputError as error:
                skipped.skip(error)
        encoded = encode_samples([row for _, row in chosen], media, tokenizers, Augmentation(), [0] * len(chosen))
        for (number, row), document in zip(chosen, encoded, strict=True):
            try:
                stream = render(document, vocabulary)
                if not stream.loss_mask.any():
                    raise InputError(f"{row.where}: found nothing to learn, expected an assistant turn or a plain document")
            except InputError as error:
                skipped.skip(error)
                continue
            documents.append(document)
            ids.append(stream.ids)
            numbers.append(number)
            names.append(np.frombuffer(row.where.encode("utf-8", "replace"), np.uint8))
    small = np.uint16 if vocabulary.size <= 2**16 else np.uint32
    made = {
        "ids": _joined(ids, small), "ends.ids": _ends(map(len, ids)), "numbers": np.array(numbers, np.uint64),
        "names": _joined(names, np.uint8), "ends.names": _ends(map(len, names)),
    }
    counts: dict[str, int] = {}
    for kind in vocabulary.kinds[1:]:
        parts = [[part for turn in document.turns for part in turn.parts if isinstance(part, MediaPart) and part.kind == kind]
                 for document in documents]
        if codes := sum(part.codes.size for some in parts for part in some):
            counts[kind] = codes
            values = [part.features for some in parts for part in some]
            if features and values[0] is not None:
                made[f"features.{kind}"] = torch.cat([value.flatten(0, 1) for value in values]).numpy()
                made[f"ends.{kind}"] = _ends(sum(part.codes.size for part in some) for some in parts)
    facts = {
        "rows": len(rows), "skipped": skipped.count, "errors": list(map(as_utf8, skipped.first)), "media": counts,
        "exchanges": all([turn.role for turn in document.turns] == ["user", "assistant"] for document in documents),
    }
    return made, facts


def _numbered(rows: Iterable[Sample | InputError], number: int) -> Iterator[tuple[int, Sample | InputError]]:
    """Rows with the numbers of their samples in the source, as training on media counts them."""
    for row in rows:
        yield number, row
        number += isinstance(row, Sample)


def stamp_of(rows: Iterable[Sample | InputError]) -> str:
    """A digest of the contents of rows, and of what is known about their media without reading them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(_flat(row, repr)).encode("utf-8", "backslashreplace"))
        for turn in getattr(row, "turns", ()):
            for part in turn.parts:
                if isinstance(part, Media):
                    stamp = part.source.stamp() + (repr(part.options).encode() if part.options else b"")
                    digest.update(f"{len(stamp)}:".encode() + stamp)
    return digest.hexdigest()


def _joined(parts: list[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate(parts).astype(kind) if parts else np.empty(0, kind)


def _ends(sizes: Iterable[int]) -> np.ndarray:
    """The ends of concatenated parts of these sizes, after a leading 0."""
    return np.cumsum([0, *sizes], dtype=np.uint64)


def _facts(path: Path) -> dict | None:
    """The facts stored in a finished shard; None if it is missing or damaged."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            facts = json.loads(file.metadata()["mmtx"])
            made = {name: file.get_tensor(name) for name in file.keys()}
        return facts if _digest(made) == facts["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None
