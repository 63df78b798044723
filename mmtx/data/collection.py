"""Which samples a run trains on and is judged by: the `train` and `validation` lists of every config."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tqdm import tqdm

from mmtx.data.sample import Sample
from mmtx.data.sources import read
from mmtx.errors import InputError


@dataclass(frozen=True)
class DataSource:
    """Manifests, folders or shards that belong together.

    paths: files, folders, glob patterns or URLs. select: keep samples whose metadata field is one of the values.
    repeat: how often an epoch shows each sample. limit: keep this many samples, evenly spread.
    """

    paths: list[str]
    select: dict[str, list[str]] | None = None
    repeat: int = 1
    limit: int | None = None

    def __post_init__(self):
        for name in ("repeat", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}: found {value}, expected 1 or more")


def read_source(source: DataSource, max_bad: float = 0.01) -> list[Sample]:
    """The samples of one source, in order. Raises InputError as `mmtx.data.sources.read` does."""
    samples = read(source.paths, max_bad, source.select, lambda line: print(line, file=sys.stderr))
    if source.limit is not None and source.limit < len(samples):
        samples = [samples[i * len(samples) // source.limit] for i in range(source.limit)]
    return samples


def read_sources(sources: list[DataSource], max_bad: float) -> tuple[list[Sample], list[int]]:
    """The samples of all sources in order, and how often an epoch shows each."""
    samples: list[Sample] = []
    repeats: list[int] = []
    for source in sources:
        found = read_source(source, max_bad)
        samples += found
        repeats += [source.repeat] * len(found)
    return samples, repeats


def progress(name: str) -> Callable[[Iterable], Iterable]:
    """A progress bar for long work: `progress("encode")(items)`."""
    return lambda items: tqdm(items, desc=name, leave=False)
