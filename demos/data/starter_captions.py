"""What captions of the starter data say field by field: `reader` of its sources in configs/, for `mmtx evaluate`.

    mmtx evaluate demos/data/starter/images-test-unseen-style.tar.gz --reader demos/data/starter_captions.py:names \
        --train demos/data/starter/images-train-*.tar.gz
"""

from collections.abc import Mapping, Sequence

from mmtx import InputError
from mmtx.evaluation import FieldReader

NAME_FIELDS = ("caption", "group", "subgroup")
NOTE_FIELDS = ("caption", "instrument", "family", "note")


def names(train: Sequence[Mapping]) -> FieldReader:
    """Names of pictures: the group and subgroup that a caption has in training; an unknown one has neither."""
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
    """Notes, as in "trumpet, D sharp 4": instrument, note, and the family that the instrument has in training."""
    families: dict[str, str] = {}
    for item in train:
        if "instrument" not in item or "family" not in item:
            continue
        if families.setdefault(item["instrument"], item["family"]) != item["family"]:
            raise InputError(f"instrument {item['instrument']!r}: found families {item['family']!r} and "
                             f"{families[item['instrument']]!r}, expected one")

    def read(caption: str) -> Mapping:
        instrument, comma, note = caption.rpartition(", ")
        if not comma:  # without a note the whole text may still name the instrument
            instrument, note = caption, None
        family = families.get(instrument)
        found = {"caption": caption, "instrument": instrument, "note": note, "family": family}
        return {field: value for field, value in found.items() if value is not None}

    return (FieldReader(NOTE_FIELDS, read) if families
            else FieldReader(("caption", "instrument", "note"), read, unknown=("family",)))
