"""`split` of a source: a range of its samples by a hash, in which samples of one patient or recording stay together."""

import json

import pytest

from mmtx.data.collection import DataSource, read_source
from mmtx.data.prepare import prepare
from mmtx.data.selection import place_of
from mmtx.errors import InputError

ROWS = [{"key": f"row-{number}", "text": f"text {number}", "patient": number % 40} for number in range(400)]


def table(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def keys(*arguments, **options):
    return [sample.key for sample in read_source(DataSource(*arguments, **options))]


def test_ranges_part_the_samples(tmp_path):
    path = table(tmp_path / "rows.jsonl")
    train, held_out = keys([path], split=[0, 0.9]), keys([path], split=[0.9, 1])
    assert sorted(train + held_out) == sorted(row["key"] for row in ROWS)
    assert 20 < len(held_out) < 60
    assert keys([path], split=[0, 1]) == keys([path])


def test_a_sample_stays_where_it_is(tmp_path):
    """When others are added, in another order and place; and in later versions of mmtx."""
    held_out = keys([table(tmp_path / "rows.jsonl")], split=[0.9, 1])
    more = [{"key": f"new-{number}", "text": "new"} for number in range(50)]
    (tmp_path / "moved").mkdir()
    later = keys([table(tmp_path / "moved" / "all.jsonl", [*more, *reversed(ROWS)])], split=[0.9, 1])
    assert [key for key in later if key.startswith("row")] == held_out[::-1]
    assert [round(place_of(value), 6) for value in ("row-0", "row-1", 7)] == PLACES


# SHA-256 of the text, its first six bytes as a fraction; by `printf row-0 | sha256sum`.
PLACES = [round(int(digits, 16) / 16**12, 6) for digits in ("3c831eb5a239", "0f719b1f3a42", "7902699be42c")]


def test_samples_with_one_value_stay_together(tmp_path):
    path = table(tmp_path / "rows.jsonl")
    found = [read_source(DataSource([path], split=split, split_by="patient")) for split in ([0, 0.8], [0.8, 1])]
    train, held_out = ({sample.metadata["patient"] for sample in samples} for samples in found)
    assert train and held_out and not train & held_out and len(train | held_out) == 40
    assert sum(map(len, found)) == len(ROWS)


def test_select_comes_first_and_limit_last(tmp_path):
    path = table(tmp_path / "rows.jsonl")
    both = keys([path], select={"patient": [1, 2, 3]}, split=[0.5, 1])
    assert both == [key for key in keys([path], split=[0.5, 1]) if int(key[4:]) % 40 in (1, 2, 3)]
    assert keys([path], select={"patient": [1, 2, 3]}, split=[0.5, 1], limit=2) == [both[0], both[len(both) // 2]]


def test_shards_are_prepared_of_the_split_alone(tmp_path, tokenizers):
    source = DataSource([table(tmp_path / "rows.jsonl")], split=[0.9, 1], split_by="patient")
    prepare(source, {"text": tokenizers["text"]}, tmp_path / "shards")
    facts = json.loads((tmp_path / "shards" / "prepared.json").read_text())
    assert facts["documents"] == len(read_source(source)) < facts["rows"] == len(ROWS)
    with pytest.raises(InputError, match="split"):  # another split is another data set
        prepare(DataSource(source.paths, split=[0.8, 1], split_by="patient"), {"text": tokenizers["text"]}, tmp_path / "shards")


@pytest.mark.parametrize(("options", "told"), [
    ({"split": [0.9]}, "split: found [0.9], expected two numbers in ascending order, from 0 to 1"),
    ({"split": [0.9, 0.1]}, "split: found [0.9, 0.1], expected two numbers"),
    ({"split": [0, 1.5]}, "split: found [0, 1.5], expected two numbers"),
    ({"split": [0.5, 0.5]}, "split: found [0.5, 0.5], expected two numbers"),
    ({"split": [float("nan"), 1]}, "split: found [nan, 1], expected two numbers"),
    ({"split": "train"}, "split: found 'train', expected"),
    ({"split_by": "patient"}, "split_by: found 'patient' without split, expected both"),
])
def test_what_is_no_split_is_refused(options, told):
    with pytest.raises(InputError) as caught:
        DataSource(["rows.jsonl"], **options)
    assert told in str(caught.value)


def test_what_cannot_be_split_is_told(tmp_path):
    path = table(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"rows.jsonl row 1: no field 'person', found 'key', 'caption', 'patient' \(split_by\)"):
        keys([path], split=[0, 0.9], split_by="person")
    one = table(tmp_path / "one.jsonl", [{"text": "a", "patient": 5}, {"text": "b", "patient": 5}])
    with pytest.raises(InputError, match="one.jsonl: no sample is left of 2 rows: none of 2 is in the split .*'patient'"):
        keys([one], split=[place_of(5) / 2, place_of(5)], split_by="patient")
