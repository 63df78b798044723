"""Reads manifests, folders and shards as samples (`Sample`).

| source | rows |
| --- | --- |
| `.jsonl`, `.json` | JSON objects, one per line or in a list, in the forms of `mmtx.data.forms` |
| `.csv`, `.tsv` | the same as a table with a header |
| folder | media with captions beside them: x.png + x.txt or x.json, in all subfolders |
| `.tar`, `.tar.gz`, `.tgz` | WebDataset shard: KEY.webp + KEY.json with "caption" or "text", or KEY.txt |
| `hf://NAME[:SPLIT]`, folder of `save_to_disk` | Hugging Face dataset with columns named like the fields of a manifest |

All but the last may also be a glob pattern, a name with braces (`train-{000..127}.tar`) or an fsspec URL (folders: local only). A
medium with a caption becomes a user turn (the medium) and an assistant turn (the caption). Other fields become metadata. Tars are
never extracted.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from mmtx.data import hub
from mmtx.data.folder import read_folder
from mmtx.data.manifest import MANIFESTS, parse_row, read_manifest
from mmtx.data.patterns import expand
from mmtx.data.read_options import Fields, ReadOptions
from mmtx.data.sample import Sample, attempt, suffix
from mmtx.data.selection import Selection
from mmtx.data.skip_counter import MAX_BAD, SkipCounter
from mmtx.data.storage import bare, display
from mmtx.data.urls import is_url, scheme_of
from mmtx.data.webdataset import SHARDS, read_tar
from mmtx.errors import InputError

PLAN = "plan.json"  # in a folder of `mmtx prepare` from the start
COLUMNS = (".csv", ".tsv")  # whose rows have the same fields
TABLES = (".parquet", ".arrow")  # which the package `datasets` reads


def read(
    sources: str | Iterable[str],
    max_bad: float = MAX_BAD,
    select: dict[str, list] | None = None,
    report: Callable[[str], None] | None = None,
    trusted: bool = False,
    fields: Fields = None,
    follow_links: bool = False,
) -> list[Sample]:
    """Read all samples of all sources into memory (media stay on disk, except those of compressed tars).

    Bad rows, up to the share `max_bad` of all rows, are skipped and summarised to `report` in one line. `select`
    keeps the samples whose metadata field (or "key", or "caption") is one of the listed values. `trusted`, `fields` and
    `follow_links` are those of a `DataSource`.
    Raises InputError for a missing or empty source, too many bad rows, or if nothing is left.
    """
    skipped = SkipCounter(max_bad)
    samples = read_rows(sources, skipped, ReadOptions(trusted, fields, follow_links, report=report), Selection(select or {}))
    skipped.finish(report)
    return samples


def read_rows(sources: str | Iterable[str], skipped: SkipCounter, options: ReadOptions,
              selection: Selection = Selection()) -> list[Sample]:
    """`read` with the counter of a source that goes through further stages, the last of which reports it."""
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not sources:
        raise InputError("no data source is given, expected at least one manifest, folder or shard")
    samples = []
    for source in sources:
        for row in _scan(source, options):
            skipped.rows += 1
            if isinstance(row, InputError):
                skipped.skip(row)
            else:
                samples.append(row)
    skipped.check()
    names = ", ".join(display(os.fspath(source)) for source in sources)
    none = f"{names}: no sample is left of {skipped.rows} rows"
    kept = selection.keep(samples, none)
    if not kept:
        raise InputError(none)
    return kept


def scan(source: str, trusted: bool = False, fields: Fields = None, follow_links: bool = False,
         report: Callable[[str], None] | None = None, captions: bool = True) -> Iterator[Sample | InputError]:
    """The samples of one source, in a fixed order; a bad row is yielded as its InputError, so that the caller can continue.

    Files that are left out and count as no row, and names in `fields` that no row has, are told to `report`, each in one line.
    Without `captions`, a medium without a text is a sample, too. Raises InputError if the source as a whole is missing, empty,
    damaged or of an unknown kind.
    """
    return _scan(source, ReadOptions(trusted, fields, follow_links, captions, report))


def _scan(source: str, options: ReadOptions) -> Iterator[Sample | InputError]:
    for path in expand(os.fspath(source)):
        options, empty, told = replace(options, seen=set()), True, False
        columns = suffix(path) in COLUMNS or hub.is_dataset(path)
        for row in _reader(path, options):
            if columns and options.seen and not told:  # before a caller that wants only some rows has them
                options.report_unseen(display(path))
                told = True
            empty = False
            yield row
        if empty:
            raise InputError(f"{display(path)}: no samples in it{_hint(path)}")
        if not told:
            options.report_unseen(display(path))


def is_prepared(path: str) -> bool:
    """Whether a path is an output of `mmtx prepare`, complete or not: a folder with a plan, or any URL that is a folder's."""
    if is_url(path):
        return scheme_of(path) not in ("hf", "data") and (bare(path).endswith("/") or not suffix(path)) and "*" not in path
    return os.path.isfile(os.path.join(path, PLAN))


def is_rows(path: str) -> bool:
    """Whether a file is a manifest or a tar, by its name."""
    return suffix(path) in MANIFESTS or bare(path).lower().endswith(SHARDS)


def _reader(path: str, options: ReadOptions) -> Iterator[Sample | InputError]:
    name = bare(path).lower()
    folder = not is_url(path) and os.path.isdir(path)
    if suffix(path) in MANIFESTS and not folder:
        return read_manifest(path, options)
    if name.endswith(SHARDS) and not folder:
        return read_tar(path, options)
    if hub.is_dataset(path):
        return _dataset(path, options)
    if is_prepared(path):
        raise InputError(f"{display(path)}: found shards of `mmtx prepare`, which only the training of a decoder reads, "
                         "expected pictures, sounds or texts")
    if folder:
        tables = (*MANIFESTS.keys() - {".json"}, *SHARDS, *TABLES)  # .json is a caption there
        return read_folder(path, options, tables)
    if not is_url(path) and not os.path.exists(path):
        raise InputError(f"{display(path)}: no such file or folder")
    raise InputError(f"{display(path)}: unknown kind of data, expected a folder, {', '.join((*MANIFESTS, *SHARDS))}{_hint(path)}")


def _hint(path: str) -> str:
    """How a table, or a folder of tables, that the package `datasets` reads is named."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    tables = [path] if folder != path else glob.glob("**/*", root_dir=folder, recursive=True)
    found = not is_url(path) and any(suffix(name) in TABLES for name in tables)
    return f"; {hub.PREFIX}{folder} reads {' and '.join(TABLES)} files" if found else ""


def _dataset(path: str, options: ReadOptions) -> Iterator[Sample | InputError]:
    base = hub.base_of(path, options.trusted)
    for number, row in enumerate(hub.rows(path, base), 1):
        yield attempt(parse_row, row, base, number, f"{display(path)} row {number}", options)
