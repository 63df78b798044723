"""Folders of media with captions beside them: x.png with x.txt or x.json, in all subfolders."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from mmtx.data.field_names import CHATS
from mmtx.data.pairs import answers_of
from mmtx.data.read_options import ReadOptions
from mmtx.data.row_media import MediaReader
from mmtx.data.sample import Media, Sample, attempt, kind_of, known_kind, suffix
from mmtx.data.storage import FileSource, MediaSource
from mmtx.data.text_files import decode, json_object
from mmtx.errors import InputError
from mmtx.modality.registry import MODALITIES

MAX_CAPTION = 2**20   # bytes of a caption or of the JSON beside a medium
METADATA = ("metadata.jsonl", "metadata.csv")  # a manifest inside a folder of media, as in `datasets`
FOLDER = "folder"     # in `fields`, what stands for the name of the folder that a medium lies in
SPECIAL = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a device", stat.S_IFCHR: "a device"}

Found = MediaSource | InputError  # the location of a file or member, or why it cannot be used


def read_folder(path: str, options: ReadOptions, sources: tuple[str, ...] = ()) -> Iterator[Sample | InputError]:
    """Samples of a folder; files whose names end like `sources` are sources of their own, which are reported and left out."""
    groups: dict[str, list[tuple[str, Found]]] = {}
    within = []
    for name, found in sorted(files_in(path, options.follow_links, sources), key=lambda file: file[0]):
        if not name.endswith(os.sep) and not is_wanted(name):
            within.append(name)
            continue
        # Names of unreadable folders end in a separator, which makes each a key of its own.
        groups.setdefault(os.path.splitext(name)[0], []).append((name, found))
    tables = [name for name in METADATA if os.path.isfile(os.path.join(path, name))]
    beside = (name for group in groups.values() if len(group) > 1 for name, _ in group)
    if options.captions and tables and all(map(known_kind, beside)):
        raise InputError(f"{path}: found {tables[0]} and no captions beside the media, expected {os.path.join(path, tables[0])} "
                         "as the source")
    alone = []
    for key, group in groups.items():
        # A text file without a medium, such as a README or a licence, is not a sample.
        if any(known_kind(name) or isinstance(found, InputError) for name, found in group):
            where = os.path.join(path, key)
            yield attempt(captioned, key, group, where, os.path.join(path, ""), options)
        else:
            alone += [name for name, _ in group]
    if alone and options.report is not None:
        options.report(f"{path}: left out {len(alone)} .txt and .json files without a picture or sound of their name; "
                       f"first: {alone[0]}")
    if within and options.report is not None:
        options.report(f"{path}: left out {len(within)} tables and tars, which are sources of their own; first: {within[0]}")


def files_in(path: str, follow_links: bool, more: tuple[str, ...] = ()) -> Iterator[tuple[str, Found]]:
    """Media and captions in a folder and its subfolders, by their names relative to `path`, with errors for unusable ones; also
    files whose names end like `more`.

    Links may point to files within the folder. Links that lead outside are followed only with `follow_links`: data from
    strangers must not decide which files of the user are read.
    """
    root = os.path.realpath(path)
    folders, seen = [""], {root}
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(os.path.join(path, folder)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            reason = InputError(f"{os.path.join(path, folder)}: found a folder that cannot be read ({error.strerror})")
            if not folder:
                raise reason from None
            yield folder + os.sep, reason
            continue
        for entry in entries:
            name = os.path.join(folder, entry.name)
            linked = entry.is_symlink()
            target = os.path.realpath(entry.path) if linked or follow_links else entry.path
            outside = linked and os.path.commonpath([root, target]) != root
            if os.path.isdir(entry.path) if linked else entry.is_dir(follow_symlinks=False):
                if outside and not follow_links:
                    yield name + os.sep, _link(entry.path, target)
                # A folder that is linked within the source is read once, at its own place; hidden ones never.
                elif (outside or not linked) and target not in seen and not entry.name.startswith("."):
                    folders.append(name)
                    seen.add(target)
            elif is_wanted(name) or more and name.lower().endswith(more) and not is_hidden(name):
                yield name, _link(entry.path, target) if outside and not follow_links else _file(entry, name)


def _file(entry: os.DirEntry, name: str) -> Found:
    if known_kind(name) and entry.is_file(follow_symlinks=False):
        return FileSource(entry.path)
    try:
        found = entry.stat()
    except OSError as error:  # a link to nothing, or to itself
        return InputError(f"{entry.path}: cannot be read ({error.strerror})")
    if not stat.S_ISREG(found.st_mode):
        kind = SPECIAL.get(stat.S_IFMT(found.st_mode), "something else")
        return InputError(f"{entry.path}: found {kind}, expected a file")
    if not known_kind(name) and found.st_size > MAX_CAPTION:
        return too_long(entry.path, found.st_size)
    return FileSource(entry.path)


def _link(path: str, target: str) -> InputError:
    return InputError(f"{path}: found a link to {target}, which is outside the source; expected a link to a file inside it, or "
                      "follow_links: true if you trust the link")


def too_long(where: str, size: int) -> InputError:
    return InputError(f"{where}: found {size} bytes, expected at most {MAX_CAPTION} for a caption and its fields")


def is_wanted(name: str) -> bool:
    """Whether a file is a medium or a caption, and not hidden."""
    return (known_kind(name) is not None or suffix(name) in (".json", ".txt")) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a file or any folder above it is hidden: macOS tars hold a "._x.png" for each "x.png", Jupyter makes hidden copies."""
    return any(part.startswith(".") and part != ".." for part in Path(name).parts)


def captioned(key: str, files: list[tuple[str, Found]], where: str, name_prefix: str, options: ReadOptions) -> Sample:
    """The sample of one medium with KEY.json, KEY.txt or both (JSON fields take precedence); without `captions`, or alone.

    If `fields` asks for FOLDER, its name is a field of the medium, so that it may be its caption.
    """
    sources: list[tuple[str, MediaSource]] = []
    for name, found in files:
        if isinstance(found, InputError):
            raise found
        sources.append((name, found))
    media = [(name, source) for name, source in sources if known_kind(name)]
    if len(media) != 1:
        names = ", ".join(os.path.basename(name) for name, _ in media) or "none"
        raise InputError(f"{where}: found {names}, expected one picture or sound")
    name, source = media[0]
    if not kind_of(name):
        known = ", ".join(extension for modality in MODALITIES.values() for extension in modality.extensions)
        raise InputError(f"{where}: found {os.path.basename(name)}, which is not read, expected one of {known}")
    beside = {suffix(name): source for name, source in sources}
    labelled = FOLDER in (options.fields or {}).values()
    if options.captions and len(files) == 1 and not labelled:
        raise InputError(f"{where}: found {os.path.basename(name)} alone, expected its caption beside it, in "
                         f"{os.path.basename(key)}.txt or .json, or the name of its folder as its caption: fields with "
                         f"text: {FOLDER}")
    if len(beside) < len(files):
        raise InputError(f"{where}: found {', '.join(os.path.basename(name) for name, _ in files)}, expected one of each")
    row = json_object(beside[".json"].read(), f"{where}.json") if ".json" in beside else {}
    if labelled:
        folder = os.path.dirname(key) or (os.path.abspath(name_prefix) if name_prefix.endswith(os.sep) else "")
        row = {FOLDER: os.path.basename(folder)} | row
    row, ignored = options.rename(row)
    if ".txt" in beside and not {"caption", "text"} & row.keys():
        row["caption"] = decode(beside[".txt"].read(), f"{where}.txt").strip()
    if {"caption", "text"} & row.keys():  # a caption takes precedence over a chat
        ignored |= {name: row.pop(name) for name in CHATS if name in row}
    medium = Media(kind_of(name), name_prefix + name, source)
    turns, rejected = answers_of(row, MediaReader(where, None), (medium,), captions=options.captions)
    return Sample(key, turns, row | ignored, where, rejected=rejected)
