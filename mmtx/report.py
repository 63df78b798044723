"""Evaluation of captions of held-out samples: examples, figures, and nearest-neighbour controls that learned nothing."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmtx.data.collection import Collected, DataSource, progress, read_sources
from mmtx.data.media import load_audio, load_image
from mmtx.data.sample import Media, Sample, with_captions
from mmtx.data.skip_counter import MAX_BAD
from mmtx.data.storage import display
from mmtx.data.tokens import data_of, usable
from mmtx.errors import InputError, escape
from mmtx.evaluation import (
    MELS,
    PIXELS,
    WHOLE_CAPTION,
    FieldReader,
    NearestNeighbour,
    Score,
    character_errors,
    confidence_interval,
    field_scores,
    mel_features,
    pixel_features,
    table,
    word_errors,
)
from mmtx.modality.registry import MODALITIES
from mmtx.pipeline import Model
from mmtx.plugins import call_function, import_function

WIDEST = 60            # characters of a predicted caption that are shown
WORD_ERRORS = "word error rate"
ERRORS = {WORD_ERRORS: word_errors, "character error rate": character_errors}  # lower is better
CONTROL_RATE = 16_000  # Hz of sounds for the control, whatever the model's rate is


def report(model: Model, held_out: Sequence[DataSource], train: Sequence[DataSource], show: int = 8,
           max_bad: float = MAX_BAD, transcribe: bool = False, closed_set: bool = False, per_class: bool = False) -> Iterator[str]:
    """Yield a section for each held-out source: examples, then a table of figures.

    The figures are exact matches of each field that the source's `reader` reads from captions, and the word error rate; without a
    reader, exact matches of the whole caption and, since captions may be transcripts, also the character error rate. With `train`,
    nearest-neighbour controls answer each sample with the caption of the most similar training sample, by each of several sets of
    features; the strongest control is shown for each figure, and figures in which the model is behind it are listed. Without
    `train`, fields that only training samples can determine are left out. Samples whose last turn is not an answer in text are
    left out with a note. Up to `max_bad` of the rows of a source may be unusable. With `transcribe`, `Model.transcribe` answers
    sounds; with `closed_set`, `Model.classify` chooses among the captions of the source. With `per_class`, a table of each field
    of the reader, or else of the captions, follows: how often each true value is there, is answered and is right, and what is
    answered most often in its place.
    """
    training = read_sources(train, max_bad)
    known = _facts(training.samples)
    readers = [_reader(source, known) for source in held_out]
    collected = [read_sources([source], max_bad) for source in held_out]
    answered = [with_captions(found.samples) for found in collected]
    if not any(answered):
        raise InputError(f"{', '.join(map(_names, held_out))}: the last turn of no sample is an answer in text, expected captions to "
                         "compare with")
    for source, reader, asked in zip(held_out, readers, answered, strict=True):
        _check_fields(asked, reader, source)  # for all sources before captioning the first, which may take hours
    controls: dict[str, dict[str, NearestNeighbour]] = {}
    for source, reader, found, asked in zip(held_out, readers, collected, answered, strict=True):
        others = f"left out: {len(found.samples) - len(asked)} of {len(found.samples)} samples, whose last turn is no answer in text"
        if not asked:
            found.finish()
            yield f"\n{_names(source)}: {others}"
            continue
        pairs = usable(asked, model.tokenizers, found.counters[0], progress("encode"), model.decoder.config.encoders)
        found.finish()
        if not pairs:
            raise InputError(f"no sample can be used: {found.counters[0].summary()}")
        samples, documents = zip(*pairs, strict=True)
        kind = _kind(samples)
        true = [sample.caption for sample in samples]
        if closed_set:
            predicted = [next(iter(found)) for found in model.classify_documents(documents, dict.fromkeys(true))]
        else:
            predicted = (model.transcribe_documents if transcribe and kind == "audio" else model.caption_documents)(documents)
        if known and kind and kind not in controls and MODALITIES[kind].controls is not None:
            controls[kind] = _controls(training, kind)
        figures = _figures(samples, reader, predicted)
        best = _strongest(samples, reader, controls.get(kind, {}), kind)
        rows = [(name, score, *best.get(name, (None, ""))) for name, score in figures.items()]
        behind = [name for name, score, control, _ in rows if control is not None and _is_better(name, control, score)]
        unknown = [f"exact {name}" for name in reader.unknown]
        told = [f"left out: {', '.join(unknown)} (only training samples tell {'it' if len(unknown) == 1 else 'them'} of a "
                "caption, see --train)"] if unknown else []
        told += [others] if len(asked) < len(found.samples) else []
        told += [f"behind a control that learns nothing: {', '.join(behind)}"] if behind else []
        yield "\n".join([f"\n{_names(source)}: {len(samples)} samples",
                         *_examples(predicted, true, show), "", table(rows), *told,
                         *(_classes(samples, reader, predicted) if per_class else [])])
    training.finish()


def _names(source: DataSource) -> str:
    return ", ".join(Path(display(path)).name for path in source.paths)


def _facts(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The fields of samples: their metadata and their captions."""
    return [{**sample.metadata, "caption": sample.caption} for sample in samples]


def _reader(source: DataSource, known: list[dict[str, Any]]) -> FieldReader:
    """The reader of a source's captions; `known` are the fields of the training samples. Raises InputError if there is none."""
    if source.reader is None:
        return WHOLE_CAPTION
    at = f"reader {source.reader}"
    found = call_function(import_function(source.reader, "reader"), known, at)
    if not isinstance(found, FieldReader):
        raise InputError(f"{at}: gave {type(found).__name__}, expected an mmtx.evaluation.FieldReader")

    def read(caption: str) -> Mapping[str, Any]:
        told = call_function(found.read, caption, f"{at}: caption {caption!r}")
        if not isinstance(told, Mapping):
            raise InputError(f"{at}: caption {caption!r}: gave {type(told).__name__}, expected a mapping of fields")
        return told

    return found if found is WHOLE_CAPTION else found._replace(read=read)


def _check_fields(samples: Sequence[Sample], reader: FieldReader, source: DataSource) -> None:
    """Raise InputError for the first sample whose metadata lack a field of its source's reader."""
    for sample in samples:
        for field in reader.fields:
            if field != "caption" and field not in sample.metadata:
                raise InputError(f"{sample.where}: field {field!r} is missing, with which reader {source.reader} compares; found "
                                 f"{', '.join(map(str, sample.metadata)) or 'no fields'}")


def _controls(training: Collected, kind: str) -> dict[str, NearestNeighbour]:
    """Controls fitted to the usable training samples of a kind, one for each set of features; none without samples."""
    features: dict[str, list[np.ndarray]] = {}
    captions = []
    alike = [(sample, skipped) for sample, skipped in zip(training.samples, training.counters, strict=True)
             if _kind([sample]) == kind]
    for sample, skipped in progress("control")(alike):
        try:
            found = _features(sample, kind)
        except InputError as error:
            skipped.skip(error)
            skipped.check()
            continue
        captions.append(sample.caption)
        for name, values in found.items():
            features.setdefault(name, []).append(values)
    return {name: NearestNeighbour(values, captions) for name, values in features.items()} if captions else {}


def _strongest(samples: Sequence[Sample], reader: FieldReader, controls: Mapping[str, NearestNeighbour],
               kind: str | None) -> dict[str, tuple[Score, str]]:
    """Name of each figure -> the best score of any control, and the name of that control."""
    best: dict[str, tuple[Score, str]] = {}
    features = [_features(sample, kind) for sample in samples] if controls else []
    for by, control in controls.items():
        for name, score in _figures(samples, reader, control.predict([found[by] for found in features])).items():
            if name not in best or _is_better(name, score, best[name][0]):
                best[name] = score, by
    return best


def _is_better(name: str, one: Score, other: Score) -> bool:
    return one.value < other.value if name in ERRORS else one.value > other.value


def _examples(predicted: list[str], true: list[str], show: int) -> list[str]:
    if not show:
        return []
    show = min(show, len(true))
    chosen = [i * len(true) // show for i in range(show)]
    shown = {i: _shown(predicted[i]) for i in chosen}
    width = max(len("predicted"), *map(len, shown.values()))
    lines = [f"  {'' if predicted[i] == true[i] else 'x':1} {shown[i]:<{width}}  {escape(true[i])}" for i in chosen]
    return [f"    {'predicted':<{width}}  true", *lines]


def _shown(text: str) -> str:
    text = escape(text)
    return text if len(text) <= WIDEST else text[:WIDEST - 3] + "..."


def _classes(samples: Sequence[Sample], reader: FieldReader, predicted: list[str]) -> list[str]:
    """For each field, or for the whole caption without a reader, a line for each true value, and the mean share of right answers."""
    facts, answers, lines = _facts(samples), list(map(reader.read, predicted)), list[str]()
    fields = [field for field in reader.fields if field != "caption"] or reader.fields
    for field, scores in field_scores(predicted, facts, reader.read, fields).items():
        true = [str(fact[field]) for fact in facts]
        said = [str(answer.get(field, "")) for answer in answers]
        count, answered, right, instead = Counter(true), Counter(said), Counter[str](), dict[str, str]()
        for value, score in zip(true, scores, strict=True):
            right[value] += int(score)
        mistakes = Counter((value, answer) for value, answer, score in zip(true, said, scores, strict=True) if not score)
        for (value, answer), times in mistakes.most_common():
            instead.setdefault(value, f"{_shown(answer) or '(nothing)'} ({times})")
        width = max(len(field), *(len(_shown(value)) for value in count))
        lines += ["", f"{field:<{width}}      n  right  answered  most often in its place"]
        lines += [f"{_shown(value):<{width}}  {n:>5}  {right[value]:>5}  {answered[value]:>8}  {instead.get(value, '-')}"
                  for value, n in sorted(count.items(), key=lambda item: (-item[1], item[0]))]
        mean = sum(right[value] / n for value, n in count.items()) / len(count)
        lines.append(f"right, mean over {len(count)} values: {mean:.3f}")
    return lines


def _figures(samples: Sequence[Sample], reader: FieldReader, predicted: list[str]) -> dict[str, Score]:
    """Name of each figure -> its score."""
    facts = _facts(samples)
    scores = {f"exact {name}": confidence_interval(values)
              for name, values in field_scores(predicted, facts, reader.read, reader.fields).items()}
    for name in ERRORS if reader is WHOLE_CAPTION else [WORD_ERRORS]:
        errors, counts = ERRORS[name](predicted, [fact["caption"] for fact in facts])
        if sum(counts):  # else there is no rate
            scores[name] = confidence_interval(errors, counts)
    return scores


def _kind(samples: Sequence[Sample]) -> str | None:
    """The kind of the first medium of every sample, if it is the same in all of them."""
    kinds = {next((part.kind for turn in s.turns for part in turn.parts if isinstance(part, Media)), None)
             for s in samples}
    return kinds.pop() if len(kinds) == 1 else None


def _features(sample: Sample, kind: str) -> dict[str, np.ndarray]:
    """Sets of features of the first medium of a sample, by name."""
    media = next(part for turn in sample.turns for part in turn.parts if isinstance(part, Media))
    data, options = data_of(media)
    return MODALITIES[kind].get("controls")(data, media.name, **options)


def picture_controls(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Sets of features of an encoded picture, by preset."""
    picture = load_image(data, name)
    return {preset: pixel_features(picture, **options) for preset, options in PIXELS.items()}


def sound_controls(data: bytes | np.ndarray, name: str, **played: Any) -> dict[str, np.ndarray]:
    """Sets of features of a sound, by preset; `played` are options of `load_audio`."""
    sound = load_audio(data, CONTROL_RATE, name, **played)
    return {preset: mel_features(sound, **options) for preset, options in MELS.items()}
