"""Captions, labels and transcripts of many files, in which a bad file does not affect the others."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from mmtx.data.collection import DataSource
from mmtx.data.folder import files_in
from mmtx.data.sample import Media, kind_of
from mmtx.data.sources import is_rows, scan
from mmtx.data.storage import display
from mmtx.data.urls import is_url
from mmtx.errors import InputError
from mmtx.files import user_name
from mmtx.inference.sampling import Sampling
from mmtx.items import iterate
from mmtx.modality.registry import media_kinds
from mmtx.pipeline import Model

FILES_PER_CALL = 64  # files per call of the model: each thread of a CPU gets a batch, and captions appear as they come


File = str | Media  # a file or URL, or a medium of a row
Answer = Callable[[list[File], int], list[Any]]  # files, and the index of the first among all -> an answer for each


class Captioned(NamedTuple):
    """A file with its caption, labels or transcript (one with timestamps is a dict), or with the reason why it has none."""

    name: str
    caption: Any
    error: InputError | None = None


def find_media(names: str | Path | Sequence[str | Path], kind: str | None = None,
               fields: Mapping[str, str | None] | None = None) -> Iterator[File | InputError]:
    """Files, URLs, all media in folders, and those of the rows of manifests and tars, in order, with errors for those that are
    missing, empty or not of `kind`.

    Rows are those of `data.train` in a configuration, of which texts are ignored and may be missing; `fields` maps the fields that
    are read to their names there. A row may cut a sound out of a recording.
    """
    kinds = media_kinds() if kind is None else (kind,)
    fields = DataSource([], fields=dict(fields or {})).fields
    if kind is not None and kind not in media_kinds():
        raise InputError(f"kind: found {kind!r:.40}, expected one of {', '.join(media_kinds())}")
    for name in map(str, [names] if isinstance(names, (str, Path)) else iterate(names, "name")):
        try:
            path = Path(name := user_name(name))
            if not name:
                yield InputError("found an empty name, expected a file or folder")
            elif is_rows(name) and (is_url(name) or path.is_file()):
                yield from _media_of_rows(name, kinds, fields)
            elif is_url(name) or path.is_file():
                found = kind_of(name)
                yield name if found in (None, *kinds) else InputError(f"{display(name)}: found {found}, expected {kind}")
            elif path.is_dir():
                inside = [(file, found) for file, found in sorted(files_in(name, follow_links=True), key=lambda each: each[0])
                          if kind_of(file) in kinds or file.endswith(os.sep)]  # the latter is a folder that cannot be read
                yield from (found if isinstance(found, InputError) else str(path / file) for file, found in inside)
                if not inside:
                    yield InputError(f"{name}: found no {'pictures or sounds' if kind is None else kind} in this folder")
            elif path.exists():
                yield InputError(f"{name}: found neither a file nor a folder")
            else:
                yield InputError(f"{name}: no such file or folder")
        except InputError as error:
            yield error
        except (OSError, ValueError) as error:  # a folder that may not be listed, or an invalid name
            yield InputError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})")


def _media_of_rows(name: str, kinds: Sequence[str], fields: Mapping[str, str | None] | None) -> Iterator[Media | InputError]:
    for row in scan(name, fields=fields, captions=False):
        if isinstance(row, InputError):
            yield row
            continue
        media = [part for turn in row.turns for part in turn.parts if isinstance(part, Media) and part.kind in kinds]
        yield from media
        if not media:
            yield InputError(f"{row.where}: found no medium, expected {' or '.join(kinds)}")


def caption_files(model: Model, files: Iterable[File | InputError], **sampling: Any) -> Iterator[Captioned]:
    """Caption files and URLs, many at a time -> each in order, with its caption or its error.

    Args:
        model: as returned by `mmtx.load`.
        files: as found by `find_media`.
        **sampling: fields of `Sampling`; greedy by default.
    """
    Sampling.of(**sampling)  # a wrong option is reported once, not for each file
    return _answer_files(files, lambda names, first: cast(list[str], model.caption(names, start_index=first, **sampling)))


def classify_files(model: Model, files: Iterable[File | InputError], candidate_labels: Sequence[str], question: str | None = None,
                   top: int = 1) -> Iterator[Captioned]:
    """Classify files and URLs, many at a time -> each in order, with its `top` labels as "0.917 panda, 0.046 koala", or its error.

    Args:
        model: as returned by `mmtx.load`.
        files: as found by `find_media`.
        candidate_labels, question: of `Model.classify`.
        top: most labels of a file.
    """
    model.classify([], candidate_labels, question)  # a wrong label is reported once, not for each file
    write = lambda found: ", ".join(f"{share:.3f} {label}" for label, share in islice(found.items(), top))
    return _answer_files(files, lambda names, first: [write(found) for found in model.classify(names, candidate_labels, question)])


def transcribe_files(model: Model, files: Iterable[File | InputError], **options: Any) -> Iterator[Captioned]:
    """Transcribe files and URLs of sounds, many at a time -> each in order, with its transcript or its error.

    Args:
        model: as returned by `mmtx.load("demos/speech")`, or another that was trained with CTC.
        files: as found by `find_media(names, "audio")`.
        **options: of `Model.transcribe`.
    """
    model.transcribe([], **options)  # a wrong option or model is reported once, not for each file
    return _answer_files(files, lambda names, first: model.transcribe(names, **options))


def _answer_files(files: Iterable[File | InputError], answer: Answer) -> Iterator[Captioned]:
    waiting: list[File] = []
    first = 0  # index of the first waiting file
    for place, found in enumerate(iterate(files, "file")):
        if not isinstance(found, InputError):
            waiting.append(found)
            if len(waiting) < FILES_PER_CALL:
                continue
        yield from _answers(answer, waiting, first)
        waiting, first = [], place + 1
        if isinstance(found, InputError):
            yield Captioned(str(found).partition(": ")[0], None, found)
    yield from _answers(answer, waiting, first)


def _answers(answer: Answer, names: list[File], first: int) -> Iterator[Captioned]:
    """Answer files together; if one cannot be read, try the halves separately, down to that file."""
    if not names:
        return
    try:
        answers = answer(names, first)
    except InputError as error:
        if len(names) == 1:
            yield Captioned(_name(names[0]), None, error)
            return
        half = len(names) // 2
        yield from _answers(answer, names[:half], first)
        yield from _answers(answer, names[half:], first + half)
    else:
        yield from map(Captioned, map(_name, names), answers)


def _name(file: File) -> str:
    return file.name if isinstance(file, Media) else file
