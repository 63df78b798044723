"""Functions for the sources of the starter data in configs/: `reader` functions split captions into fields for `mmtx evaluate`, and
`variants` functions transpose sounds and add questions about the kind of an image.

    mmtx evaluate demos/data/starter/images-test-unseen-style.tar.gz --reader demos/data/starter_captions.py:names \
        --train demos/data/starter/images-train-*.tar.gz
    mmtx evaluate demos/data/starter/images-test-unseen-emoji.tar.gz --variants demos/data/starter_captions.py:kinds \
        --reader demos/data/starter_captions.py:kind_reader --train demos/data/starter/images-train-*.tar.gz
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from mmtx import InputError
from mmtx.data.collection import DataSource, read_source
from mmtx.data.sample import Media, Sample, SampleTurn, Text
from mmtx.evaluation import FieldReader

KIND_FIELDS = ("group", "subgroup")
NAME_FIELDS = ("caption", *KIND_FIELDS)
NOTE_FIELDS = ("caption", "instrument", "family", "note")
PITCHES = ("C", "C sharp", "D", "D sharp", "E", "F", "F sharp", "G", "G sharp", "A", "A sharp", "B")
SEMITONES = range(-3, 4)
WHAT_KIND, WHAT = "What kind of thing is it?", "And what is it?"


def names(train: Sequence[Mapping]) -> FieldReader:
    """Names of images, with the group and subgroup of the name in the training data; an unknown name has neither."""
    known: dict[str, Mapping] = {}
    for item in train:
        if not all(field in item for field in NAME_FIELDS):
            continue
        fields = {field: item[field] for field in NAME_FIELDS}
        if known.setdefault(item["caption"], fields) != fields:
            other = known[item["caption"]]
            raise InputError(f"caption {item['caption']!r}: found {fields} and {other}, expected one of them")

    def read(caption: str) -> Mapping:
        return known.get(caption, {"caption": caption})

    return FieldReader(NAME_FIELDS, read) if known else FieldReader(("caption",), read, unknown=("group", "subgroup"))


def notes(train: Sequence[Mapping]) -> FieldReader:
    """Notes, such as "trumpet, D sharp 4": instrument, note, and the family of the instrument in the training data."""
    families: dict[str, str] = {}
    for item in train:
        if "instrument" not in item or "family" not in item:
            continue
        if families.setdefault(item["instrument"], item["family"]) != item["family"]:
            raise InputError(f"instrument {item['instrument']!r}: found families {item['family']!r} and "
                             f"{families[item['instrument']]!r}, expected one")

    def read(caption: str) -> Mapping:
        instrument, comma, note = caption.rpartition(", ")
        if not comma:  # without a note, the whole text may still be an instrument
            instrument, note = caption, None
        family = families.get(instrument)
        found = {"caption": caption, "instrument": instrument, "note": note, "family": family}
        return {field: value for field, value in found.items() if value is not None}

    return (FieldReader(NOTE_FIELDS, read) if families
            else FieldReader(("caption", "instrument", "note"), read, unknown=("family",)))


def transposed(sample: Sample) -> list[Sample]:
    """A sound as it is, and transposed by up to three semitones down and up by playing it slower and faster, as a soundfont plays
    notes that were not recorded. The caption of a note is changed to the new note; other captions stay."""
    return [_moved(sample, semitones, lambda sound, semitones: sound.perturb_speed(2 ** (semitones / 12))) for semitones in SEMITONES]


def neighbours(sample: Sample) -> list[Sample]:
    """A note of `sounds-train`, and transposed by up to three semitones to each pitch for which it is the instrument's nearest note.

    Duration and loudness envelope are kept: played slower or faster, a note sounds like another instrument.
    """
    instrument, note = sample.metadata["instrument"], sample.metadata["midi_note"]
    near = [semitones for semitones in SEMITONES
            if min(_notes()[instrument], key=lambda known: (abs(known - note - semitones), known)) == note]
    return [_moved(sample, semitones, Media.shift_pitch) for semitones in near]


@lru_cache
def _notes() -> Mapping[str, list[int]]:
    """The MIDI note numbers of each instrument in `sounds-train`."""
    found = defaultdict(list)
    for sample in read_source(DataSource([str(Path(__file__).with_name("starter") / "sounds-train-*.tar.gz")])):
        found[sample.metadata["instrument"]].append(sample.metadata["midi_note"])
    return found


def _moved(sample: Sample, semitones: int, move: Callable[[Media, float], Media]) -> Sample:
    """A sound transposed up by `semitones` with `move`; 0 leaves it as it is."""
    if semitones == 0:
        return sample
    facts, caption = dict(sample.metadata), sample.caption
    if "note" in facts:
        facts["midi_note"] += semitones
        facts["note"] = f"{PITCHES[facts['midi_note'] % 12]} {facts['midi_note'] // 12 - 1}"
        caption = f"{facts['instrument']}, {facts['note']}"

    def changed(part: Text | Media) -> Text | Media:
        if isinstance(part, Media):
            return move(part, semitones)
        return Text(caption) if part.text == sample.caption else part

    turns = tuple(SampleTurn(turn.role, tuple(map(changed, turn.parts))) for turn in sample.turns)
    return replace(sample, key=f"{sample.key}{semitones:+}", turns=turns, metadata=facts)


def with_kinds(sample: Sample) -> list[Sample]:
    """An image as it is, and once more with a question about its kind before that about its name (`kinds`).

    The kind is answered before the name is known, so that the model learns visual features of kinds, which also fit things that it
    has no name for.
    """
    return [sample, *(replace(asked, turns=(*asked.turns, SampleTurn("user", (Text(WHAT),)), sample.turns[1]))
                      for asked in kinds(sample) if asked is not sample)]


def kinds(sample: Sample) -> list[Sample]:
    """An image with a question about its kind, answered by its group and subgroup: "objects, medical"."""
    if not all(field in sample.metadata for field in KIND_FIELDS) or [turn.role for turn in sample.turns] != ["user", "assistant"]:
        return [sample]
    asked = SampleTurn("user", (*sample.turns[0].parts, Text(WHAT_KIND)))
    return [replace(sample, key=f"{sample.key} kind", turns=(asked, SampleTurn("assistant", (Text(kind_of(sample.metadata)),))))]


def kind_of(facts: Mapping) -> str:
    """"animals-nature" and "animal-mammal" -> "animals nature, animal mammal"."""
    return ", ".join(str(facts[field]).replace("-", " ") for field in KIND_FIELDS)


def kind_reader(train: Sequence[Mapping]) -> FieldReader:
    """Kinds, as answered in `kinds`: group and subgroup, as in the training data."""
    told = [item for item in train if all(field in item for field in KIND_FIELDS)]
    known = {kind_of(item): {field: item[field] for field in KIND_FIELDS} for item in told}
    groups = {facts["group"].replace("-", " "): {"group": facts["group"]} for facts in known.values()}
    return FieldReader(KIND_FIELDS, lambda caption: known.get(caption) or groups.get(caption.split(", ")[0], {}))
