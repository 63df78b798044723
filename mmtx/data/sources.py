"""Manifests, folders and shards to `Sample`s.

| source | rows |
| --- | --- |
| `.jsonl` | JSON objects: {"image"|"audio": path, "text": ...}, {"text": ...} or {"messages": [...]} |
| folder | media with a caption beside: x.png + x.txt or x.json, in all subfolders |
| `.tar`, `.tar.gz`, `.tgz` | WebDataset shard: KEY.webp + KEY.json with "caption" or "text", or KEY.txt |
| `hf://NAME[:SPLIT]`, folder of `save_to_disk` | Hugging Face dataset, its columns named like the fields of a manifest |

Each but the last may also be a glob pattern or an fsspec URL (folders: local only). A medium with a caption becomes a user
turn (the medium) and an assistant turn (the caption). Other fields become metadata. Tars are never extracted.
"""

import glob
import gzip
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from mmtx.data import hub
from mmtx.data.sample import (
    MAX_BYTES,
    DatasetSource,
    FileSource,
    Media,
    MediaSource,
    MemorySource,
    Part,
    Sample,
    SampleTurn,
    Text,
    display,
    is_url,
    kind_of,
    open_binary,
    suffix,
)
from mmtx.errors import InputError

SHARDS = (".tar", ".tar.gz", ".tgz")
PLAN = "plan.json"  # in a folder of `mmtx prepare`, from the first moment on
CONTENT = {"image": "image", "image_url": "image", "audio": "audio", "audio_url": "audio"}  # part -> kind


class SkipCounter:
    """Counts rows that cannot be used and says when they are too many."""

    def __init__(self, limit: float):
        """`limit` is the share of rows that may be bad, 0 to 1."""
        if not 0 <= limit <= 1:
            raise InputError(f"max_bad is {limit}, expected a share from 0 to 1")
        self.limit = limit
        self.count = 0
        self.first: list[str] = []

    def skip(self, error: InputError) -> None:
        """Count one bad row; the first three are kept for the message."""
        self.count += 1
        if len(self.first) < 3:
            self.first.append(str(error))

    def summary(self, total: int) -> str:
        """One line: how many rows of `total` were bad, and the first of them."""
        return f"{self.count} of {total} rows cannot be used; first: {'; '.join(self.first)}"

    def check(self, total: int) -> None:
        """Raise InputError when more than the share `limit` of `total` rows were bad."""
        if self.count > self.limit * total:
            raise InputError(f"{self.summary(total)} (at most {self.limit:.3%} may be bad)")


def read(
    sources: str | Iterable[str],
    max_bad: float = 0.01,
    select: dict[str, list] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Sample]:
    """Read all samples of all sources into memory (media stay on disk, except those of compressed tars).

    Bad rows are skipped up to the share `max_bad` of all rows, and told to `report` in one line. `select`
    keeps the samples whose metadata field (or "key", or "caption") is one of the listed values.
    Raises InputError for a missing or empty source, too many bad rows, or when nothing is left.
    """
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not sources:
        raise InputError("no data source is given, expected at least one manifest, folder or shard")
    skipped, samples = SkipCounter(max_bad), []
    for source in sources:
        for row in scan(source):
            if isinstance(row, InputError):
                skipped.skip(row)
            else:
                samples.append(row)
    total = len(samples) + skipped.count
    skipped.check(total)
    if skipped.count and report is not None:
        report("skipped: " + skipped.summary(total))
    kept = _select(samples, select or {})
    if not kept:
        names = ", ".join(display(os.fspath(source)) for source in sources)
        raise InputError(f"{names}: no sample is left of {total} rows")
    return kept


def _select(samples: list[Sample], wanted: dict[str, list]) -> list[Sample]:
    for field, values in wanted.items():
        if not isinstance(values, (list, tuple)):
            raise InputError(f"select: field {field!r} has {_shown(values)}, expected a list of values")
        facts = [_facts(sample) for sample in samples]
        known = sorted({name for fact in facts for name in fact})
        if samples and field not in known:
            raise InputError(f"select: no sample has the field {field!r}, expected one of {known}")
        pairs = zip(samples, facts, strict=True)
        samples = [sample for sample, fact in pairs if field in fact and fact[field] in values]
    return samples


def is_selected(sample: Sample, wanted: dict[str, list]) -> bool:
    """Whether `select` keeps a sample."""
    facts = _facts(sample)
    return all(field in facts and facts[field] in values for field, values in wanted.items())


def _facts(sample: Sample) -> dict[str, Any]:
    return {"key": sample.key, "caption": sample.caption, **sample.metadata}


def open_source(source: str) -> Iterator[Sample]:
    """Yield the samples of one source, in a fixed order; the first bad row raises InputError."""
    for row in scan(source):
        if isinstance(row, InputError):
            raise row
        yield row


def scan(source: str) -> Iterator[Sample | InputError]:
    """Like `open_source`, but a bad row is yielded as its InputError, so that the caller may go on.

    Raises InputError when the source as a whole is missing, empty, damaged or of no known kind.
    """
    for path in expand(os.fspath(source)):
        empty = True
        for row in _reader(path):
            empty = False
            yield row
        if empty:
            raise InputError(f"{display(path)}: no samples in it")


def is_prepared(path: str) -> bool:
    """Whether a path is what `mmtx prepare` wrote, also in part: a folder with its plan, or a URL of any folder."""
    if is_url(path):
        return not path.startswith((hub.PREFIX, "data:")) and (path.endswith("/") or not suffix(path)) and "*" not in path
    return os.path.isfile(os.path.join(path, PLAN))


def expand(source: str) -> list[str]:
    """Paths that a glob pattern stands for, sorted; anything else is itself."""
    if is_url(source):
        if "*" not in source:
            return [source]
        import fsspec

        try:
            files, pattern = fsspec.core.url_to_fs(source)
            found = sorted(files.unstrip_protocol(path) for path in files.glob(pattern))
        except Exception as error:  # every back end raises classes of its own
            raise InputError(f"{display(source)}: cannot be listed ({type(error).__name__})") from None
    elif os.path.exists(source) or not glob.has_magic(source):
        return [source]
    else:
        found = sorted(glob.glob(source, recursive=True))
    if not found:
        raise InputError(f"{display(source)}: no file matches this pattern")
    return found


def _reader(path: str) -> Iterator[Sample | InputError]:
    name = display(path).lower()
    if name.endswith(".jsonl"):
        return _manifest(path)
    if name.endswith(SHARDS):
        return _shard(path)
    if hub.is_dataset(path):
        return _dataset(path)
    if is_prepared(path):
        raise InputError(f"{display(path)}: found shards of `mmtx prepare`, which only the training of a decoder reads, "
                         "expected pictures, sounds or texts")
    if not is_url(path) and os.path.isdir(path):
        return _folder(path)
    if not is_url(path) and not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder")
    raise InputError(f"{display(path)}: unknown kind of data, expected a folder, .jsonl, {', '.join(SHARDS)}")


# Shards and folders: media with captions beside.


def _shard(path: str) -> Iterator[Sample | InputError]:
    """The whole index is built first, because members of one sample need not be neighbours."""
    groups: dict[str, list[tuple[str, MediaSource]]] = {}
    for name, source in _members(path):
        # The key ends at the last dot (the webdataset package: at the first), for names like "v1.5-001.png".
        groups.setdefault(os.path.splitext(name)[0], []).append((name, source))
    for key, files in groups.items():
        where = f"{display(path)} member {key}"
        yield _attempt(partial(_captioned, key, files, where, name_prefix=f"{display(path)} member "))


def _members(path: str) -> Iterator[tuple[str, MediaSource]]:
    """Name and bytes of each medium and caption in a tar. Media of a plain tar are not read, only located."""
    compressed = not display(path).lower().endswith(".tar")
    with open_binary(path) as file:
        stream = gzip.GzipFile(fileobj=file) if compressed else file
        try:
            # "r:" over our own GzipFile, not "r|gz", which takes a truncated file for a whole one.
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    name, size = member.name, member.size
                    if not member.isfile() or not _wanted(name):
                        continue
                    if size > MAX_BYTES:
                        raise InputError(f"{display(path)} member {name}: {size} bytes, at most {MAX_BYTES}")
                    if kind_of(name) and not compressed:
                        yield name, FileSource(path, member.offset_data, size)
                    else:
                        yield name, MemorySource(tar.extractfile(member).read())
                # tarfile takes a damaged or missing header for the end: the true end is a block of zeros.
                stream.seek(tar.offset)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise InputError(f"{display(path)}: damaged or cut short at byte {tar.offset} of the tar")
                while compressed and stream.read(2**20):  # to the end, where gzip compares the checksum
                    pass
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            kind = "gzipped tar" if compressed else "plain tar"
            raise InputError(f"{display(path)}: not a whole {kind} ({error})") from None


def _folder(path: str) -> Iterator[Sample | InputError]:
    files = sorted(
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, names in os.walk(path)
        for name in names
        if _wanted(name)
    )
    groups: dict[str, list[tuple[str, MediaSource]]] = {}
    for name in files:
        source = FileSource(os.path.join(path, name))
        groups.setdefault(os.path.splitext(name)[0], []).append((name, source))
    for key, group in groups.items():
        # A text without a medium is a README or a licence here, no sample.
        if any(kind_of(name) for name, _ in group):
            where = os.path.join(path, key)
            yield _attempt(partial(_captioned, key, group, where, name_prefix=os.path.join(path, "")))


def _wanted(name: str) -> bool:
    """Media and captions, but no hidden files: macOS puts a "._x.png" beside each "x.png" of a tar."""
    known = kind_of(name) is not None or suffix(name) in (".json", ".txt")
    return known and not os.path.basename(name).startswith(".")


def _captioned(key: str, files: list[tuple[str, MediaSource]], where: str, name_prefix: str) -> Sample:
    """One medium with KEY.json, KEY.txt or both (JSON fields win)."""
    media = [(name, source) for name, source in files if kind_of(name)]
    if len(media) != 1:
        found = ", ".join(os.path.basename(name) for name, _ in media) or "none"
        raise InputError(f"{where}: found {found}, expected one picture or sound")
    beside = {suffix(name): source for name, source in files}
    row = _json_object(beside[".json"].read(), f"{where}.json") if ".json" in beside else {}
    if ".txt" in beside and not {"caption", "text"} & row.keys():
        row["caption"] = _decode(beside[".txt"].read(), f"{where}.txt").strip()
    name, source = media[0]
    caption = _pop_text(row, ("caption", "text"), where)
    medium = Media(kind_of(name), name_prefix + name, source)
    return Sample(key, _answered((medium,), caption), row, where)


def _answered(media: tuple[Media, ...], text: str) -> tuple[SampleTurn, ...]:
    return SampleTurn("user", media), SampleTurn("assistant", (Text(text),))


# Manifests.


def _manifest(path: str) -> Iterator[Sample | InputError]:
    base = os.path.dirname(path.split("?")[0] if is_url(path) else path)
    with open_binary(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _attempt(partial(_row, line, base, number, f"{display(path)} row {number}"))


def _row(line: bytes, base: str, number: int, where: str) -> Sample:
    return _sample(_json_object(line, where), base, number, where)


def _sample(row: dict[str, Any], base: str, number: int, where: str) -> Sample:
    key = next((row.pop(name) for name in ("key", "id") if name in row), number)
    if not isinstance(key, (str, int)):
        raise InputError(f"{where}: the key is {_shown(key)}, expected a string or a number")
    if "messages" in row:
        clash = sorted({"text", "image", "audio"} & row.keys())
        if clash:
            raise InputError(f"{where}: field 'messages' beside {clash}, expected these inside the messages")
        turns = _chat(row.pop("messages"), base, where)
    else:
        kinds = [kind for kind in ("image", "audio") if kind in row]
        media = tuple(_media(row.pop(kind), kind, base, where, kind) for kind in kinds)
        text = _pop_text(row, ("text", "caption") if media else ("text",), where)
        turns = _answered(media, text) if media else (SampleTurn(None, (Text(text),)),)
    return Sample(str(key), turns, row, where)


def _chat(messages: Any, base: str, where: str) -> tuple[SampleTurn, ...]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: field 'messages' is {_shown(messages)}, expected a list of messages")
    turns = []
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InputError(f"{where}: field {at!r} is {_shown(message)}, expected an object with a role")
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            known = "user, assistant or system"
            raise InputError(f"{where}: field {at!r} has role {_shown(role)}, expected {known}")
        if isinstance(content, list) and content:
            parts = tuple(_part(item, base, where, f"{at}.content[{n}]") for n, item in enumerate(content))
        else:
            parts = (Text(_text(content, where, f"{at}.content")),)
        # The stream has no system role: an instruction is a user turn of its own.
        turns.append(SampleTurn("assistant" if role == "assistant" else "user", parts))
    return tuple(turns)


def _part(item: Any, base: str, where: str, at: str) -> Part:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        return Text(_text(item.get("text"), where, f"{at}.text"))
    if kind not in CONTENT:
        raise InputError(f"{where}: field '{at}.type' is {_shown(kind)}, expected text, {', '.join(CONTENT)}")
    value = item.get(kind)
    if kind.endswith("_url") and isinstance(value, dict):
        value = value.get("url")
    return _media(value, CONTENT[kind], base, where, f"{at}.{kind}")


def _media(value: Any, kind: str, base: str, where: str, at: str) -> Media:
    if isinstance(value, DatasetSource):
        return Media(kind, where, value)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: field {at!r} is {_shown(value)}, expected a path or URL")
    path = value if is_url(value) else os.path.join(base, value)
    if kind_of(path) not in (kind, None):
        raise InputError(f"{where}: field {at!r} names {display(path)}, which is no {kind} file")
    if not is_url(path) and not os.path.isfile(path):
        raise InputError(f"{where}: field {at!r} names {path}: no such file")
    return Media(kind, f"{where}: {display(path)}", FileSource(path))


# Hugging Face datasets.


def _dataset(path: str) -> Iterator[Sample | InputError]:
    for number, row in enumerate(hub.rows(path), 1):
        yield _attempt(partial(_sample, row, "", number, f"{path} row {number}"))


# Fields.


def _attempt(parse: Callable[[], Sample]) -> Sample | InputError:
    try:
        return parse()
    except InputError as error:
        return error


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object without its null fields, which stand for absent ones."""
    try:
        row = json.loads(_decode(data, where))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}), found {_shown(data[:60])}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {_shown(row)}, expected a JSON object")
    return {name: value for name, value in row.items() if value is not None}


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from None


def _pop_text(row: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in row:
            return _text(row.pop(name), where, name)
    raise InputError(f"{where}: no field {' or '.join(map(repr, names))}, found the fields {sorted(row)}")


def _text(value: Any, where: str, at: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: field {at!r} is {_shown(value)}, expected text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{where}: field {at!r} holds half a surrogate pair, expected Unicode text")
    return value


def _shown(value: Any) -> str:
    """What was found, on one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
