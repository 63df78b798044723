"""All sources of a run as one list of documents: media, which are encoded when a batch needs them, and prepared shards."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from mmtx.data.collection import DataSource, read_sources, to_stderr
from mmtx.data.documents import Documents
from mmtx.data.patterns import expand
from mmtx.data.prepared import Prepared
from mmtx.data.sample import Sample
from mmtx.data.skip_counter import MAX_BAD
from mmtx.data.sources import is_prepared
from mmtx.data.storage import display
from mmtx.data.tokens import Augmentation
from mmtx.errors import InputError
from mmtx.modality.base import Tokenizer
from mmtx.sequence import Pair, Rendered
from mmtx.vocabulary import Vocabulary


class Content(NamedTuple):
    """The contents of a source: equal digests mean equal samples, wherever they lie and whenever they were written."""

    digests: np.ndarray             # int64 (samples,), or (1,) for a whole prepared folder
    where: Callable[[int], str]     # index of a digest -> file and row, or the folder


class Corpus:
    """The documents of several parts, concatenated."""

    def __init__(self, parts: Sequence[Documents | Prepared], repeats: Sequence[np.ndarray | int]):
        """`repeats`: how often an epoch shows the documents of each part, one number for all or one for each."""
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])
        # The lengths of a single prepared folder stay memory-mapped.
        self.lengths = parts[0].lengths if len(parts) == 1 else np.concatenate([part.lengths for part in parts])
        self.repeats = None if all(np.all(np.equal(count, 1)) for count in repeats) else np.concatenate(
            [np.broadcast_to(count, len(part)) for part, count in zip(parts, repeats, strict=True)])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def samples(self) -> list[Sample]:
        """The samples whose media are available, that is, without those of prepared shards."""
        return [sample for part in self.parts if isinstance(part, Documents) for sample in part.samples]

    def where(self, number: int) -> str:
        """File and row of a document."""
        part = self._part(number)
        return self.parts[part].where(number - int(self.starts[part]))

    def contents(self) -> list[Content]:
        """The contents of the parts, for comparison with those of an earlier run."""
        return [Content(part.digests, _always(part.path) if isinstance(part, Prepared) else part.where)
                for part in self.parts]

    def render(self, chosen: Sequence[tuple[int, int]]) -> list[Rendered | Pair]:
        """Documents of (document, view) pairs; those of a part are rendered together, to share passes of the encoder."""
        owners = [self._part(number) for number, _ in chosen]
        found: list[Rendered | Pair | None] = [None] * len(chosen)
        for part in sorted(set(owners)):
            places = [place for place, owner in enumerate(owners) if owner == part]
            start = int(self.starts[part])
            rendered = self.parts[part].render([(chosen[i][0] - start, chosen[i][1]) for i in places])
            for place, document in zip(places, rendered, strict=True):
                found[place] = document
        return found

    def _part(self, number: int) -> int:
        return int(np.searchsorted(self.starts, number, "right")) - 1


def _always(path: str) -> Callable[[int], str]:
    return lambda _: path


def read_corpus(
    sources: Sequence[DataSource],
    tokenizers: Mapping[str, Tokenizer],
    vocabulary: Vocabulary,
    *,
    max_seq_len: int,
    augmentation: Augmentation = Augmentation(),
    seed: int = 0,
    max_bad: float = MAX_BAD,
    features: bool = False,
    patches: Collection[str] = (),
    pairs: bool = False,
    num_workers: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Corpus:
    """Open all sources. Raises InputError as `Documents` and `Prepared` do.

    `features`: whether the decoder takes features; `patches`: the kinds of media of which it takes patches instead; `pairs`: whether
    it learns from preferred and rejected answers, which prepared shards do not have.
    """
    parts: list[Documents | Prepared] = []
    repeats: list[np.ndarray | int] = []
    number = 0
    common: dict[str, Any] = dict(max_seq_len=max_seq_len, augmentation=augmentation, seed=seed)
    whole = [replace(source, paths=[path for pattern in source.paths for path in expand(pattern)]) for source in sources]
    for prepared, group in groupby(whole, _is_prepared):
        if not prepared:
            found = read_sources(list(group), max_bad)
            documents = Documents(found.samples, tokenizers, vocabulary, counters=found.counters, first=number,
                                  patches=patches, pairs=pairs, num_workers=num_workers, progress=progress, **common)
            found.finish()
            if not pairs:
                _tell_of_rejected(documents.samples)
            parts.append(documents)
            repeats.append(np.array(found.repeats)[np.array(documents.numbers) - number])
            number += len(found.samples)
            continue
        for source in group:
            if pairs:
                raise InputError(f"paths: found {display(source.paths[0])}, which is prepared, expected rows with a preferred and a "
                                 "rejected answer, for model.dpo")
            for path in source.paths:
                shards = Prepared(source, path, vocabulary, max_bad=max_bad, first=number, features=features,
                                  patches=patches, **common)
                parts.append(shards)
                repeats.append(source.repeat)
                number += shards.samples
    return Corpus(parts, repeats)


def _tell_of_rejected(samples: Sequence[Sample]) -> None:
    """Say how many rejected answers are left out, if there are any."""
    if count := sum(sample.rejected is not None for sample in samples):
        to_stderr(f"{count} rows have a rejected answer, which only training with model.dpo reads; their preferred answers are kept")


def _is_prepared(source: DataSource) -> bool:
    """Raises InputError if only some of the paths are prepared, or if `limit` would apply to each of several folders."""
    prepared = [path for path in source.paths if is_prepared(path)]
    if prepared and len(prepared) < len(source.paths):
        raise InputError(f"paths: found {display(prepared[0])}, which is prepared, beside media; expected a source for each")
    if len(prepared) > 1 and source.limit is not None:
        raise InputError(f"limit: found {len(prepared)} prepared folders in one source, expected a source for each")
    return bool(prepared)
