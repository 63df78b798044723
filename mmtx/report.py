"""A model's captions of held-out samples beside the true ones: examples, figures, and a control that learned nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmtx.data.collection import DataSource, progress, read_source
from mmtx.data.media import load_image
from mmtx.data.sample import Media, Sample
from mmtx.data.tokens import load_sound, to_documents
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


def report(model: Model, held_out: Sequence[DataSource], train: Sequence[DataSource], show: int = 8) -> Iterator[str]:
    """Yield a section for each held-out source: examples, then a table of figures.

    Figures are the exact caption, the fields that the samples' metadata allow (names of the starter data: group and
    subgroup; notes: instrument, family and note) and the word error rate. With `train` a nearest-neighbour control
    answers the same samples with the caption of the training sample that looks or sounds most alike.
    """
    known = [sample for source in train for sample in read_source(source)]
    controls: dict[str, NearestNeighbour] = {}
    for source in held_out:
        samples = read_source(source)
        documents = to_documents(samples, model.tokenizers, progress("encode"))
        predicted = model.caption_documents(documents)
        true = [sample.caption for sample in samples]
        kind = _kind(samples)
        nearest = None
        if known and kind:
            if kind not in controls:
                alike = [sample for sample in known if _kind([sample]) == kind]
                controls[kind] = NearestNeighbour.fit(
                    [_features(sample, kind) for sample in progress("control")(alike)], [s.caption for s in alike])
            nearest = controls[kind].predict([_features(sample, kind) for sample in samples])
        figures = _figures(samples, known, predicted)
        control = _figures(samples, known, nearest) if nearest else {}
        rows = [(name, score, control.get(name)) for name, score in figures.items()]
        yield "\n".join([f"\n{', '.join(Path(path).name for path in source.paths)}: {len(samples)} samples",
                         *_examples(predicted, true, show), "", table(rows)])


def _examples(predicted: list[str], true: list[str], show: int) -> list[str]:
    if not show:
        return []
    show = min(show, len(true))
    chosen = [i * len(true) // show for i in range(show)]
    shown = {i: predicted[i] if len(predicted[i]) <= WIDEST else predicted[i][:WIDEST - 3] + "..." for i in chosen}
    width = max(len("predicted"), *map(len, shown.values()))
    lines = [f"  {'' if predicted[i] == true[i] else 'x':1} {shown[i]:<{width}}  {true[i]}" for i in chosen]
    return [f"    {'predicted':<{width}}  true", *lines]


def _figures(samples: list[Sample], known: list[Sample], predicted: list[str]) -> dict[str, Score]:
    """Name of each figure -> its score; the metadata say which figures there are."""
    facts = [{**sample.metadata, "caption": sample.caption} for sample in samples]
    learned = [{**sample.metadata, "caption": sample.caption} for sample in known]
    fields, reader = ("caption",), (lambda caption: {"caption": caption})
    for names, make in ((NAME_FIELDS, name_reader), (NOTE_FIELDS, note_reader)):
        if all(name in fact for fact in facts for name in names):
            fields = names
            reader = make([fact for fact in learned if all(name in fact for name in names)] or facts)
    scores = {f"exact {name}": confidence_interval(values)
              for name, values in field_scores(predicted, facts, reader, fields).items()}
    scores["word error rate"] = confidence_interval(*word_errors(predicted, [fact["caption"] for fact in facts]))
    return scores


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
