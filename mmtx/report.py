"""A model's captions of held-out samples beside the true ones: examples, figures, and a control that learned nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmtx.data.collection import Collected, DataSource, progress, read_sources
from mmtx.data.media import load_image
from mmtx.data.sample import Media, Sample
from mmtx.data.sources import MAX_BAD
from mmtx.data.storage import display
from mmtx.data.tokens import load_sound, usable
from mmtx.errors import InputError
from mmtx.evaluation import (
    NAME_FIELDS,
    NOTE_FIELDS,
    NearestNeighbour,
    Score,
    confidence_interval,
    field_scores,
    mel_features,
    name_reader,
    note_reader,
    pixel_features,
    table,
    word_errors,
)
from mmtx.pipeline import Model

WIDEST = 60            # characters of a predicted caption that are shown
CONTROL_RATE = 16_000  # Hz; the control hears at one rate, whatever the model's is


def report(model: Model, held_out: Sequence[DataSource], train: Sequence[DataSource], show: int = 8,
           max_bad: float = MAX_BAD) -> Iterator[str]:
    """Yield a section for each held-out source: examples, then a table of figures.

    Figures are the exact caption, the fields that the samples' metadata allow (names of the starter data: group and
    subgroup; notes: instrument, family and note) and the word error rate. With `train` a nearest-neighbour control
    answers the same samples with the caption of the training sample that looks or sounds most alike. Fields that only
    training samples can tell of a caption (the group of a name, the family of an instrument) are left out without them.
    Up to `max_bad` of the rows of a source may be unusable.
    """
    training = read_sources(train, max_bad)
    known = training.samples
    controls: dict[str, NearestNeighbour | None] = {}
    for source in held_out:
        found = read_sources([source], max_bad)
        pairs = usable(found.samples, model.tokenizers, found.counters[0], progress("encode"))
        found.finish()
        if not pairs:
            raise InputError(f"no sample can be used: {found.counters[0].summary()}")
        samples, documents = zip(*pairs, strict=True)
        predicted = model.caption_documents(documents)
        true = [sample.caption for sample in samples]
        kind = _kind(samples)
        nearest = None
        if known and kind:
            if kind not in controls:
                controls[kind] = _control(training, kind)
            if controls[kind] is not None:
                nearest = controls[kind].predict([_features(sample, kind) for sample in samples])
        figures, unknown = _figures(samples, known, predicted)
        control = _figures(samples, known, nearest)[0] if nearest else {}
        rows = [(name, score, control.get(name)) for name, score in figures.items()]
        told = [f"left out: {', '.join(unknown)} (only training samples tell {'it' if len(unknown) == 1 else 'them'} of a "
                "caption, see --train)"] if unknown else []
        yield "\n".join([f"\n{', '.join(Path(display(path)).name for path in source.paths)}: {len(samples)} samples",
                         *_examples(predicted, true, show), "", table(rows), *told])
    training.finish()


def _control(training: Collected, kind: str) -> NearestNeighbour | None:
    """What remembers the training samples of a kind that can be used, if there are any."""
    features, captions = [], []
    alike = [(sample, skipped) for sample, skipped in zip(training.samples, training.counters, strict=True)
             if _kind([sample]) == kind]
    for sample, skipped in progress("control")(alike):
        try:
            features.append(_features(sample, kind))
            captions.append(sample.caption)
        except InputError as error:
            skipped.skip(error)
            skipped.check()
    return NearestNeighbour.fit(features, captions) if features else None


def _examples(predicted: list[str], true: list[str], show: int) -> list[str]:
    if not show:
        return []
    show = min(show, len(true))
    chosen = [i * len(true) // show for i in range(show)]
    shown = {i: predicted[i] if len(predicted[i]) <= WIDEST else predicted[i][:WIDEST - 3] + "..." for i in chosen}
    width = max(len("predicted"), *map(len, shown.values()))
    lines = [f"  {'' if predicted[i] == true[i] else 'x':1} {shown[i]:<{width}}  {true[i]}" for i in chosen]
    return [f"    {'predicted':<{width}}  true", *lines]


def _figures(samples: Sequence[Sample], known: list[Sample], predicted: list[str]) -> tuple[dict[str, Score], list[str]]:
    """Name of each figure -> its score, and names of those that nothing is known of; the metadata say what there are."""
    facts = [{**sample.metadata, "caption": sample.caption} for sample in samples]
    learned = [{**sample.metadata, "caption": sample.caption} for sample in known]
    fields, reader, unknown = ("caption",), (lambda caption: {"caption": caption}), []
    for names, make, taught in ((NAME_FIELDS, name_reader, ("group", "subgroup")), (NOTE_FIELDS, note_reader, ("family",))):
        if all(name in fact for fact in facts for name in names):
            teachers = [fact for fact in learned if all(name in fact for name in names)]
            reader, unknown = make(teachers), [] if teachers else list(taught)
            fields = [name for name in names if name not in unknown]
    scores = {f"exact {name}": confidence_interval(values)
              for name, values in field_scores(predicted, facts, reader, fields).items()}
    errors, counts = word_errors(predicted, [fact["caption"] for fact in facts])
    if sum(counts):  # or there is no rate
        scores["word error rate"] = confidence_interval(errors, counts)
    return scores, [f"exact {name}" for name in unknown]


def _kind(samples: Sequence[Sample]) -> str | None:
    """The kind of media that all samples begin with, if they do."""
    kinds = {next((part.kind for turn in s.turns for part in turn.parts if isinstance(part, Media)), None)
             for s in samples}
    return kinds.pop() if len(kinds) == 1 else None


def _features(sample: Sample, kind: str):
    media = next(part for turn in sample.turns for part in turn.parts if isinstance(part, Media))
    if kind == "image":
        return pixel_features(load_image(media.source.read(), media.name))
    return mel_features(load_sound(media, CONTROL_RATE))
