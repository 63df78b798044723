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
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from mmtx.data import hub
from mmtx.data.fields import attempt, shown
from mmtx.data.folder import read_folder
from mmtx.data.manifest import MANIFESTS, Fields, parse_row, read_manifest
from mmtx.data.sample import Sample, suffix
from mmtx.data.storage import bare, display, is_url, listed
from mmtx.data.trust import scheme_of
from mmtx.data.webdataset import SHARDS, read_tar
from mmtx.errors import InputError
from mmtx.files import user_name

MAX_BAD = 0.01      # share of the rows of a source that may be unusable, by default
PLAN = "plan.json"  # in a folder of `mmtx prepare` from the start
BRACES = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}")
MOST_NAMES = 10**6  # that braces may stand for
TABLES = (".parquet", ".arrow")  # which the package `datasets` reads


class SkipCounter:
    """Counts the unusable rows of a source, which are too many if they are more than a share (`max_bad`) of all its rows.

    All commands use this definition. A row is bad, once, whether it cannot be read, one of its media is damaged, or it needs
    too many tokens: one counter goes through all stages. All rows of a source count, including those that `select` or `limit`
    leave out, since a row that cannot be read has no fields to select it by.
    """

    def __init__(self, limit: float, rows: int = 0):
        """`limit` is the share of rows that may be bad, 0 to 1; `rows` is the number of rows so far."""
        if not 0 <= limit <= 1:
            raise InputError(f"max_bad is {limit}, expected a share from 0 to 1")
        self.limit, self.rows = limit, rows
        self.count = 0
        self.first: list[str] = []

    def skip(self, error: InputError) -> None:
        """Count one bad row; the first three are kept for the message."""
        self.count += 1
        if len(self.first) < 3:
            self.first.append(str(error))

    def summary(self) -> str:
        """One line: how many rows were bad, and the first of them."""
        return f"{self.count} of {self.rows} rows cannot be used; first: {'; '.join(self.first)}"

    def check(self) -> None:
        """Raise InputError if more than the share `limit` of the rows were bad."""
        if self.count > self.limit * self.rows:
            raise InputError(f"{self.summary()} (at most {self.limit:.3%} may be bad)")

    def finish(self, report: Callable[[str], None] | None) -> None:
        """`check` after the last stage, and `report` the summary if any rows were bad."""
        self.check()
        if self.count and report is not None:
            report("skipped: " + self.summary())


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
    samples = read_rows(sources, skipped, select, report, trusted=trusted, fields=fields, follow_links=follow_links)
    skipped.finish(report)
    return samples


def read_rows(sources: str | Iterable[str], skipped: SkipCounter, select: dict[str, list] | None = None,
              report: Callable[[str], None] | None = None, *, trusted: bool = False, fields: Fields = None,
              follow_links: bool = False, captions: bool = True) -> list[Sample]:
    """`read` with the counter of a source that goes through further stages, the last of which reports it; `captions` of `scan`."""
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not sources:
        raise InputError("no data source is given, expected at least one manifest, folder or shard")
    samples = []
    for source in sources:
        for row in scan(source, trusted, fields, follow_links, report, captions):
            skipped.rows += 1
            if isinstance(row, InputError):
                skipped.skip(row)
            else:
                samples.append(row)
    skipped.check()
    names = ", ".join(display(os.fspath(source)) for source in sources)
    none = f"{names}: no sample is left of {skipped.rows} rows"
    kept = _select(samples, select or {}, none)
    if not kept:
        raise InputError(none)
    return kept


def check_select(wanted: dict[str, list]) -> None:
    """Raise InputError unless each field has a list: the letters of a text would be taken for values."""
    for field, values in wanted.items():
        if not isinstance(values, (list, tuple)):
            raise InputError(f"select: field {field!r} has {shown(values)}, expected a list of values")


def _select(samples: list[Sample], wanted: dict[str, list], none: str) -> list[Sample]:
    check_select(wanted)
    for field, values in wanted.items():
        facts = [_facts(sample) for sample in samples]
        known = sorted({name for fact in facts for name in fact})
        if samples and field not in known:
            raise InputError(f"select: no sample has the field {field!r}, expected one of {known}")
        pairs = zip(samples, facts, strict=True)
        kept = [sample for sample, fact in pairs if field in fact and any(_same(fact[field], value) for value in values)]
        if samples and not kept:
            some = [*dict.fromkeys(shown(fact[field]) for fact in facts if field in fact)]
            some[5:] = ["..."] if len(some) > 5 else []
            raise InputError(f"{none}: found {', '.join(some)} in the field {field!r}, "
                             f"expected one of {shown(values)} (select)")
        samples = kept
    return samples


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; 1 is 1.0, but true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def is_selected(sample: Sample, wanted: dict[str, list]) -> bool:
    """Whether `select` keeps a sample."""
    facts = _facts(sample)
    return all(field in facts and any(_same(facts[field], value) for value in values) for field, values in wanted.items())


def _facts(sample: Sample) -> dict[str, Any]:
    return {"key": sample.key, "caption": sample.caption, **sample.metadata}


def scan(source: str, trusted: bool = False, fields: Fields = None, follow_links: bool = False,
         report: Callable[[str], None] | None = None, captions: bool = True) -> Iterator[Sample | InputError]:
    """The samples of one source, in a fixed order; a bad row is yielded as its InputError, so that the caller can continue.

    Files that are left out and count as no row are reported to `report`, in one line. Without `captions`, a medium without a text
    is a sample, too. Raises InputError if the source as a whole is missing, empty, damaged or of an unknown kind.
    """
    for path in expand(os.fspath(source)):
        empty = True
        for row in _reader(path, trusted, fields, follow_links, report, captions):
            empty = False
            yield row
        if empty:
            raise InputError(f"{display(path)}: no samples in it{_hint(path)}")


def is_prepared(path: str) -> bool:
    """Whether a path is an output of `mmtx prepare`, complete or not: a folder with a plan, or any URL that is a folder's."""
    if is_url(path):
        return scheme_of(path) not in ("hf", "data") and (bare(path).endswith("/") or not suffix(path)) and "*" not in path
    return os.path.isfile(os.path.join(path, PLAN))


def expand(source: str) -> list[str]:
    """The paths that a name with braces or a glob pattern stands for; anything else unchanged, but for a leading ~."""
    if scheme_of(source) == "data" or not is_url(source) and os.path.exists(source):
        return [source]
    names = [*islice(_braced(source), MOST_NAMES + 1)]
    if len(names) > MOST_NAMES:
        raise InputError(f"{display(source)}: found braces for more than {MOST_NAMES:,} names")
    return [path for name in dict.fromkeys(names) for path in _matches(name)]


def _braced(name: str) -> Iterator[str]:
    """The names that {000..127} and {a,b} in a name stand for, as in a shell."""
    if (found := BRACES.search(name)) is None:
        yield name
        return
    first, last, words = found.groups()
    if words is None:
        low, high = int(first), int(last)
        width = max(len(first), len(last)) if re.match(r"0\d", first) or re.match(r"0\d", last) else 0  # pads with zeros
        inside: Iterable[str] = (f"{number:0{width}}" for number in range(low, high + 1) or range(low, high - 1, -1))
    else:
        inside = words.split(",")
    for middle in inside:
        yield from _braced(name[:found.start()] + middle + name[found.end():])


def _matches(source: str) -> list[str]:
    """The paths that match a glob pattern, sorted; anything else unchanged, but for a leading ~."""
    if is_url(source):
        if "*" not in source:
            return [source]
        found = listed(source)
    else:
        source = user_name(source)
        if os.path.exists(source) or not glob.has_magic(source):
            return [source]
        found = sorted(glob.glob(source, recursive=True))
    if not found:
        raise InputError(f"{display(source)}: no file matches this pattern")
    return found


def _reader(path: str, trusted: bool, fields: Fields, follow_links: bool,
            report: Callable[[str], None] | None, captions: bool) -> Iterator[Sample | InputError]:
    name = bare(path).lower()
    folder = not is_url(path) and os.path.isdir(path)
    if suffix(path) in MANIFESTS and not folder:
        return read_manifest(path, trusted, fields, captions)
    if name.endswith(SHARDS) and not folder:
        return read_tar(path, fields, captions)
    if hub.is_dataset(path):
        return _dataset(path, trusted, fields, captions)
    if is_prepared(path):
        raise InputError(f"{display(path)}: found shards of `mmtx prepare`, which only the training of a decoder reads, "
                         "expected pictures, sounds or texts")
    if folder:
        tables = (*MANIFESTS.keys() - {".json"}, *SHARDS, *TABLES)  # .json is a caption there
        return read_folder(path, fields, follow_links, report, tables, captions)
    if not is_url(path) and not os.path.exists(path):
        raise InputError(f"{display(path)}: no such file or folder")
    raise InputError(f"{display(path)}: unknown kind of data, expected a folder, {', '.join((*MANIFESTS, *SHARDS))}{_hint(path)}")


def _hint(path: str) -> str:
    """How a table, or a folder of tables, that the package `datasets` reads is named."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    tables = [path] if folder != path else glob.glob("**/*", root_dir=folder, recursive=True)
    found = not is_url(path) and any(suffix(name) in TABLES for name in tables)
    return f"; {hub.PREFIX}{folder} reads {' and '.join(TABLES)} files" if found else ""


def _dataset(path: str, trusted: bool, fields: Fields, captions: bool) -> Iterator[Sample | InputError]:
    base = hub.base_of(path, trusted)
    for number, row in enumerate(hub.rows(path, base), 1):
        yield attempt(partial(parse_row, row, base, number, f"{display(path)} row {number}", fields, captions))
