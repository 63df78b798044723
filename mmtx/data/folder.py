"""Folders of media with captions beside them: x.png + x.txt or x.json, in all subfolders."""

import os
from collections.abc import Iterator
from functools import partial

from mmtx.data.fields import attempt, decode, json_object, pop_text
from mmtx.data.sample import Media, Sample, SampleTurn, Text, kind_of, suffix
from mmtx.data.storage import FileSource, MediaSource
from mmtx.errors import InputError


def read_folder(path: str) -> Iterator[Sample | InputError]:
    files = sorted(
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, names in os.walk(path)
        for name in names
        if is_wanted(name)
    )
    groups: dict[str, list[tuple[str, MediaSource]]] = {}
    for name in files:
        source = FileSource(os.path.join(path, name))
        groups.setdefault(os.path.splitext(name)[0], []).append((name, source))
    for key, group in groups.items():
        # A text without a medium is a README or a licence here, no sample.
        if any(kind_of(name) for name, _ in group):
            where = os.path.join(path, key)
            yield attempt(partial(captioned, key, group, where, name_prefix=os.path.join(path, "")))


def is_wanted(name: str) -> bool:
    """Media and captions, but no hidden files: macOS puts a "._x.png" beside each "x.png" of a tar."""
    known = kind_of(name) is not None or suffix(name) in (".json", ".txt")
    return known and not os.path.basename(name).startswith(".")


def captioned(key: str, files: list[tuple[str, MediaSource]], where: str, name_prefix: str) -> Sample:
    """One medium with KEY.json, KEY.txt or both (JSON fields win)."""
    media = [(name, source) for name, source in files if kind_of(name)]
    if len(media) != 1:
        found = ", ".join(os.path.basename(name) for name, _ in media) or "none"
        raise InputError(f"{where}: found {found}, expected one picture or sound")
    beside = {suffix(name): source for name, source in files}
    row = json_object(beside[".json"].read(), f"{where}.json") if ".json" in beside else {}
    if ".txt" in beside and not {"caption", "text"} & row.keys():
        row["caption"] = decode(beside[".txt"].read(), f"{where}.txt").strip()
    name, source = media[0]
    caption = pop_text(row, ("caption", "text"), where)
    medium = Media(kind_of(name), name_prefix + name, source)
    return Sample(key, answered((medium,), caption), row, where)


def answered(media: tuple[Media, ...], text: str) -> tuple[SampleTurn, ...]:
    return SampleTurn("user", media), SampleTurn("assistant", (Text(text),))
