"""The samples that a run trains on and is evaluated on: the `train` and `validation` lists of every config."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_type_hints

import yaml
from tqdm import tqdm

from mmtx.data.field_names import names
from mmtx.data.read_options import ReadOptions
from mmtx.data.sample import Sample
from mmtx.data.selection import Selection
from mmtx.data.skip_counter import MAX_BAD, SkipCounter
from mmtx.data.sources import read_rows
from mmtx.data.storage import scrub
from mmtx.data.variants import load_variants
from mmtx.data.yaml_check import Loader, read_yaml_text
from mmtx.errors import InputError
from mmtx.schema import fitted

Task = Literal["caption", "generate"]


@dataclass(frozen=True)
class DataSource:
    """Manifests, folders or shards that belong together.

    paths: files, folders, glob patterns or URLs. select: keep samples whose metadata field is one of the values. split: keep a
    range of the samples, by a hash of their key or of the field `split_by`: [0, 0.9] to train on and [0.9, 1] to validate on are
    nine and one of ten, never share a value of that field, and stay as they are when samples are added or moved.
    repeat: how often an epoch shows each sample. limit: keep this many samples, evenly spaced.
    task: "caption" reads samples as they are, with the medium as question and the text as answer; "generate" swaps the two.
    List a source twice to train both. cond_drop_prob: share of the views of a sample whose user turns are emptied, so that the
    model learns to do without them, as classifier-free guidance needs. trusted: rows of a source at a URL may name local files,
    private addresses and schemes other than https; by default only what lies below its own address, and public https. fields:
    maps the fields that are read to their names in the rows, as in {"image": "img_path", "text": "label"}; null for a field
    that looks like a medium but is not to be read. follow_links: also follow links in a folder that lead outside it.
    variants: a function "FILE.py:FUNCTION" that replaces each `Sample` with several, such as a note in several pitches, each with
    its own name. reader: likewise a function, with which `mmtx evaluate` scores captions field by field
    (`mmtx.evaluation.FieldReader`).
    """

    paths: list[str]
    select: dict[str, list[str | int | float | bool]] | None = None
    split: list[float] | None = None
    split_by: str | None = None
    repeat: int = 1
    limit: int | None = None
    task: Task = "caption"
    cond_drop_prob: float = 0.0
    trusted: bool = False
    fields: dict[str, str | None] | None = None
    follow_links: bool = False
    variants: str | None = None
    reader: str | None = None

    def __post_init__(self):
        if isinstance(self.paths, (str, os.PathLike)):
            object.__setattr__(self, "paths", [self.paths])
        for name, kind in get_type_hints(DataSource).items():
            object.__setattr__(self, name, fitted(kind, getattr(self, name), name))
        if self.split_by is not None and self.split is None:
            raise InputError(f"split_by: found {self.split_by!r} without split, expected both")
        self.selection.check()
        given = {name: value for name, value in (self.fields or {}).items() if value is not None}
        if wrong := sorted(set(given) - set(names().read)):
            raise InputError(f"fields: found {wrong[0]!r}, expected one of {', '.join(names().read)}")
        if len(set(given.values())) < len(given):
            raise InputError(f"fields: found {list(given.values())}, expected a different field for each")
        if not 0 <= self.cond_drop_prob <= 1:
            raise InputError(f"cond_drop_prob: found {self.cond_drop_prob}, expected a share from 0 to 1")
        for name in ("repeat", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}: found {value!r:.40}, expected a whole number of at least 1")

    @property
    def selection(self) -> Selection:
        """Which samples are kept."""
        return Selection(self.select or {}, self.split or (0, 1), self.split_by or "key")


# Options of decoder training that do not go with prepared shards, which hold the outputs of frozen encoders one by one.
ENCODERS = ("train_encoder", "encoders_from", "image_encoder", "image_encoder_lr", "audio_encoder", "audio_encoder_lr",
            "merge_size")


class TrainingData(NamedTuple):
    """The data of a decoder's configuration."""

    train: list[DataSource]
    validation: list[DataSource]
    tokenizers: list[str]    # folders
    continuous_inputs: bool  # whether the decoder takes features
    encoders: list[str]      # those of ENCODERS that are set: none if all encoders are frozen
    max_bad: float           # share of the rows of a source that may be unusable


def read_config(path: str | Path) -> TrainingData:
    """Read the configuration of a decoder. Raises InputError when it is another."""
    try:
        config = yaml.load(read_yaml_text(path), Loader)
        data, model = (config[name]["init_args"] for name in ("data", "model"))
        folders = [folder for folder in data["tokenizers"].values() if folder is not None]
        train, held_out = ([DataSource(**source) for source in data[name]] for name in ("train", "validation"))
        encoders = [name for name in ENCODERS if model.get(name)]
        return TrainingData(train, held_out, folders, bool(model.get("continuous_inputs")), encoders,
                            float(data.get("max_bad", MAX_BAD)))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the configuration of a decoder ({type(error).__name__}: {scrub(str(error))})") from None


def read_source(source: DataSource, max_bad: float = MAX_BAD) -> list[Sample]:
    """The samples of one source, in order. Raises InputError as `mmtx.data.sources.read` does."""
    skipped = SkipCounter(max_bad)
    samples = _read(source, skipped)
    skipped.finish(to_stderr)
    return samples


def _read(source: DataSource, skipped: SkipCounter, captions: bool = True) -> list[Sample]:
    options = ReadOptions(source.trusted, source.fields, source.follow_links, captions, to_stderr)
    samples = read_rows(source.paths, skipped, options, source.selection)
    read, variants = len(samples), load_variants(source.variants)
    made = [variants(sample) for sample in samples]
    skipped.rows += sum(max(0, len(some) - 1) for some in made)  # a row that they leave out still counts
    samples = [sample for some in made for sample in some]
    if not samples:
        raise InputError(f"variants {source.variants}: no sample is left of {read}")
    if source.limit is not None and source.limit < len(samples):
        samples = [samples[i * len(samples) // source.limit] for i in range(source.limit)]
    if source.task == "generate":
        samples = [swap_turns(sample) for sample in samples]
    return [replace(sample, cond_drop_prob=source.cond_drop_prob) for sample in samples] if source.cond_drop_prob else samples


def swap_turns(sample: Sample) -> Sample:
    """The sample with question and answer swapped. Raises InputError unless it has exactly one of each."""
    roles = [turn.role for turn in sample.turns]
    if roles != ["user", "assistant"]:
        found = ", ".join(role or "plain" for role in roles)
        raise InputError(f"{sample.where}: found turns {found}, expected user, assistant for task \"generate\"")
    question, answer = sample.turns
    return replace(sample, turns=(replace(question, parts=answer.parts), replace(answer, parts=question.parts)))


class Collected(NamedTuple):
    """The samples of several sources, in order."""

    samples: list[Sample]
    repeats: list[int]            # how often an epoch shows each
    counters: list[SkipCounter]   # of the source of each sample, for those found unusable later; `finish` reports them

    def finish(self) -> None:
        """Raise InputError if too many rows of any source were bad, else report the bad ones on stderr."""
        for skipped in dict.fromkeys(self.counters):
            skipped.finish(to_stderr)


def read_sources(sources: Sequence[DataSource], max_bad: float, captions: bool = True) -> Collected:
    """Read all sources; without `captions`, also media without a text. Raises InputError as `mmtx.data.sources.read` does."""
    whole = Collected([], [], [])
    for source in sources:
        skipped = SkipCounter(max_bad)
        found = _read(source, skipped, captions)
        whole.samples.extend(found)
        whole.repeats.extend([source.repeat] * len(found))
        whole.counters.extend([skipped] * len(found))
    return whole


def require_sources(sources: list[DataSource], name: str) -> list[DataSource]:
    """The sources of an option. Raises InputError if there are none."""
    if not sources:
        raise InputError(f"data.{name}: found none, expected at least one source, as in [{{paths: [FILE]}}]")
    return sources


def test_sources(sources: list[DataSource] | None) -> list[DataSource]:
    """The sources of `mmtx test`. Raises InputError if there are none."""
    if not sources:
        raise InputError("data.test: found none, expected sources for mmtx test (mmtx validate takes those of data.validation)")
    return sources


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def progress(name: str) -> Callable[[Iterable], Iterable]:
    """A progress bar for long work: `progress("encode")(items)`; not shown if stderr is a log file."""
    return lambda items: tqdm(items, desc=name, leave=False, **quiet_in_logs())


def quiet_in_logs() -> dict:
    """Options of a progress bar that is not shown if stderr is a log file."""
    return {} if "TQDM_DISABLE" in os.environ else {"disable": None}  # None: if stderr is no terminal
