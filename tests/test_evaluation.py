"""Figures: metrics by hand, intervals against theory, the control against brute force and the starter set."""

import io
import json
import random
import re
import tarfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmtx import evaluation
from mmtx.data.collection import DataSource, read_source
from mmtx.data.sample import Sample, SampleTurn, Text
from mmtx.errors import InputError
from mmtx.evaluation import (
    MELS,
    PIXELS,
    NearestNeighbour,
    Score,
    character_errors,
    confidence_interval,
    field_scores,
    mel_features,
    pixel_features,
    table,
    word_errors,
    words,
)
from mmtx.plugins import import_file
from mmtx.report import report

STARTER = Path(__file__).parent.parent / "demos/data/starter"
CAPTIONS = import_file(STARTER.parent / "starter_captions.py", "captions")
NAME_FIELDS, NOTE_FIELDS = CAPTIONS.NAME_FIELDS, CAPTIONS.NOTE_FIELDS
NAMES, NOTES = (f"demos/data/starter_captions.py:{name}" for name in ("names", "notes"))


def test_predictions_and_items_are_as_many():
    for predicted, true in (([], []), (["cat"], []), (["cat"], ["cat", "dog"])):
        for errors in (word_errors, character_errors):
            with pytest.raises(InputError, match=f"found {len(predicted)} predictions for {len(true)} items"):
                errors(predicted, true)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Press 1, now!", ["press", "1", "now"]),
        ("don't DON\u2019T", ["dont", "dont"]),
        ("call-forward on\nbusy.", ["call", "forward", "on", "busy"]),
        ("\u00bfQu\u00e9? e\u0301", ["qu\u00e9", "\u00e9"]),  # a combining accent composes
        ("\u0939\u093f\u0928\u094d\u0926\u0940", ["\u0939\u093f\u0928\u094d\u0926\u0940"]),  # vowel signs
        ("...", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_word_errors_by_hand():
    predicted = ["a b c", "a c", "a b x c", "a x c", "", "b a", "x y z"]
    true = ["A, b c.", "a b c", "a b c", "a b c", "a b", "a b", ""]
    assert word_errors(predicted, true) == ([0, 1, 1, 1, 2, 2, 3], [3, 3, 3, 3, 2, 2, 0])


def test_word_error_rate_is_over_the_corpus():
    # 1 error of 1 word and 0 errors of 9: 0.1, where the mean over items would be 0.5.
    true = ["yes", "a b c d e f g h i"]
    assert confidence_interval(*word_errors(["no", true[1]], true)).value == pytest.approx(0.1)
    assert confidence_interval(*word_errors(["a b c"], ["a"])).value == 2.0
    with pytest.raises(InputError, match="weights that sum to 0"):
        confidence_interval(*word_errors(["a", "b"], ["...", ""]))


def test_character_errors_by_hand():
    predicted, true = ["A cat.", "the bat", "", "ab", "don't"], ["a cat", "the  cat", "abc", "", "dont"]
    assert character_errors(predicted, true) == ([0, 1, 3, 2, 0], [5, 7, 3, 0, 4])


def test_word_errors_equal_the_definition():
    def slow(p, t):
        if not p or not t:
            return len(p) + len(t)
        return min(slow(p[1:], t) + 1, slow(p, t[1:]) + 1, slow(p[1:], t[1:]) + (p[0] != t[0]))

    rng = random.Random(0)
    for _ in range(200):
        p, t = ([rng.choice("abc") for _ in range(rng.randrange(6))] for _ in range(2))
        assert word_errors([" ".join(p)], [" ".join(t)]) == ([slow(p, t)], [len(t)])


def test_confidence_interval_of_a_share():
    per_item = [1.0] * 300 + [0.0] * 100
    score = confidence_interval(per_item)
    error = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert score.value == 0.75 and score.n == 400
    assert [score.low, score.high] == pytest.approx([0.75 - error, 0.75 + error], abs=0.006)
    assert confidence_interval(per_item) == score  # the seed is fixed
    wide, narrow = confidence_interval(per_item, level=0.99), confidence_interval(per_item, level=0.5)
    assert wide.low < score.low < narrow.low and narrow.high < score.high < wide.high


def test_confidence_interval_of_three_items_by_hand():
    # 27 resamples: 1 has the mean 0, 3 have 1/3, ..., 3 have 7/3, and 1 has 3.
    assert confidence_interval([0, 1, 3]) == Score(pytest.approx(4 / 3), 0.0, 3.0, 3)
    assert confidence_interval([0, 1, 3], level=0.9) == Score(pytest.approx(4 / 3), pytest.approx(1 / 3), pytest.approx(7 / 3), 3)


def test_confidence_interval_covers_the_truth_at_its_level():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        score = confidence_interval(rng.random(100) < 0.3)
        hits += score.low <= 0.3 <= score.high
    assert 0.88 <= hits / 200 <= 0.99


def test_confidence_interval_claims_no_certainty():
    n = 52  # 0.025 ** (1 / 52) = 0.9315
    assert confidence_interval([1.0] * n) == Score(1.0, pytest.approx(0.9315, abs=1e-4), 1.0, n)
    assert confidence_interval([0.0] * n) == Score(0.0, 0.0, pytest.approx(0.0685, abs=1e-4), n)


def test_confidence_interval_of_a_rate_resamples_utterances():
    errors, counts = word_errors(["no", "a b c d e f g h i"] * 100, ["yes", "a b c d e f g h i"] * 100)
    score = confidence_interval(errors, counts)
    assert score.value == pytest.approx(0.1) and score.n == 200  # utterances, not the 1000 words
    # Delta method: residuals 0.9 and -0.9 for a mean of 5 words, so the deviation is 0.9 / 5 / sqrt(200).
    error = 1.96 * 0.9 / 5 / np.sqrt(200)
    assert [score.low, score.high] == pytest.approx([0.1 - error, 0.1 + error], abs=0.004)
    assert np.isfinite(confidence_interval([1, 0], [0, 5])).all()  # resamples without a word are left out


@pytest.mark.parametrize(
    "arguments",
    [([],), ([float("nan")],), ([1.0], [0.0]), ([1.0, 0.0], [1.0]), ([1.0], [-1.0]), ([1.0], None, 1.0)],
)
def test_confidence_interval_refuses(arguments):
    with pytest.raises(InputError, match="found .*expected"):
        confidence_interval(*arguments)


def test_name_fields():
    train = [
        {"caption": "grinning face", "group": "smileys", "subgroup": "smiling", "style": "noto"},
        {"caption": "grinning face", "group": "smileys", "subgroup": "smiling", "style": "other"},
        {"caption": "sad face", "group": "smileys", "subgroup": "concerned"},
        {"caption": "camel", "group": "animals", "subgroup": "mammal"},
    ]
    true = {"caption": "grinning face", "group": "smileys", "subgroup": "smiling"}
    predicted = ["grinning face", "sad face", "camel", "grinning faces"]
    assert field_scores(predicted, [true] * 4, CAPTIONS.names(train).read, NAME_FIELDS) == {
        "caption": [1, 0, 0, 0], "group": [1, 1, 0, 0], "subgroup": [1, 0, 0, 0],
    }
    # A name that training never held can be right itself, but has no group that could be.
    unseen = {"caption": "yak", "group": "animals", "subgroup": "mammal"}
    assert field_scores(["yak"], [unseen], CAPTIONS.names(train).read, NAME_FIELDS) == {
        "caption": [1], "group": [0], "subgroup": [0],
    }
    with pytest.raises(InputError, match="item 1: field 'group' is missing"):
        field_scores(["yak", "yak"], [unseen, {"caption": "yak"}], CAPTIONS.names(train).read, NAME_FIELDS)
    with pytest.raises(InputError, match="caption 'camel'"):
        CAPTIONS.names([*train, {"caption": "camel", "group": "food", "subgroup": "mammal"}])


def test_note_fields():
    train = [{"instrument": "trumpet", "family": "brass"}, {"instrument": "tuba", "family": "brass"},
             {"instrument": "violin", "family": "strings"}]
    true = {"caption": "trumpet, D sharp 4", "instrument": "trumpet", "family": "brass", "note": "D sharp 4"}
    predicted = ["trumpet, D sharp 4", "tuba, D sharp 4", "violin, D sharp 4", "trumpet, D 4", "trumpet",
                 "kazoo, D 4", "", "a, b, D sharp 4"]
    assert field_scores(predicted, [true] * 8, CAPTIONS.notes(train).read, NOTE_FIELDS) == {
        "caption": [1, 0, 0, 0, 0, 0, 0, 0],
        "instrument": [1, 0, 0, 1, 1, 0, 0, 0],
        "family": [1, 1, 0, 1, 1, 0, 0, 0],
        "note": [1, 1, 1, 0, 0, 0, 0, 1],
    }
    with pytest.raises(InputError, match="instrument 'tuba'"):
        CAPTIONS.notes([*train, {"instrument": "tuba", "family": "strings"}])


def test_nearest_neighbour_equals_brute_force(monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    rng = np.random.default_rng(0)
    train, queries = rng.normal(1000, 1, (50, 6)), rng.normal(1000, 1, (30, 6))  # far from 0
    control = NearestNeighbour(train, [f"label {i}" for i in range(50)])
    expected = ((queries[:, None] - train) ** 2).sum(-1).argmin(1)
    assert control.predict(queries) == [f"label {i}" for i in expected]
    assert control.predict(train) == control.labels
    assert NearestNeighbour([[1.0], [1.0], [0.0]], "abc").predict([[1.0]]) == ["a"]  # the first of equals


def test_nearest_neighbour_refuses():
    with pytest.raises(InputError, match="2 features and 1 labels"):
        NearestNeighbour(np.zeros((2, 3)), ["a"])
    with pytest.raises(InputError, match="width 4, expected 3"):
        NearestNeighbour(np.zeros((1, 3)), ["a"]).predict(np.zeros((1, 4)))
    for features in ([], [np.zeros(2), np.zeros(3)], [np.zeros((2, 2))]):
        with pytest.raises(InputError, match=r"expected one shape \(D,\)"):
            NearestNeighbour(features, ["a"] * len(features))


@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 32), (64, 64, 12), (50, 71, 12), (5, 7, 12)])
def test_pixel_features_average(height, width, size):
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    rows, columns = ([slice(i * n // size, -(-(i + 1) * n // size)) for i in range(size)] for n in (height, width))
    expected = [channel[row, column].mean() / 255 for channel in pixels for row in rows for column in columns]
    assert np.allclose(pixel_features(pixels, size), expected)
    assert np.allclose(pixel_features(torch.from_numpy(pixels), size), expected)


def test_centred_pixel_features_ignore_brightness_and_contrast():
    dark = np.random.default_rng(0).integers(0, 60, (3, 12, 12), dtype=np.uint8)
    first, second = (pixel_features(p, size=12, centred=True) for p in (dark, 3 * dark + 50))
    assert np.allclose(first, second) and np.linalg.norm(first) == pytest.approx(1)
    assert not pixel_features(np.full((3, 8, 8), 255, np.uint8), centred=True).any()  # a blank one


@pytest.mark.parametrize("image", [np.zeros((3, 8, 8)), np.zeros((8, 8), np.uint8)])
def test_pixel_features_refuse(image):
    with pytest.raises(InputError, match=r"expected uint8 \(C, H, W\)"):
        pixel_features(image)


def mel_by_hand(wave, rate=16_000, window=1024, hop=256, mels=80, power=2, floor=1e-5, mean=False):
    """Triangles equally spaced on the HTK mel scale over the spectrum of Hann windows that are centred on every hop."""
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, window // 2, mode="reflect"), window)[::hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    spectrum = np.abs(np.fft.rfft(frames * hann)) ** power
    centres = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), mels + 2) / 2595) - 1)
    width = np.diff(centres)
    slopes = centres - np.linspace(0, rate / 2, window // 2 + 1)[:, None]
    triangles = np.maximum(0, np.minimum(-slopes[:, :-2] / width[:-1], slopes[:, 2:] / width[1:]))
    mel = np.log(np.maximum(spectrum @ triangles, floor))
    return mel.mean(0) if mean else mel.ravel()


@pytest.mark.parametrize("preset", MELS)
def test_mel_features_by_hand(preset):
    wave = torch.randn(24_000, generator=torch.Generator().manual_seed(0))
    wave[6_000:12_000] *= 1e-4  # around the floor
    wave[12_000:18_000] = 0
    expected = mel_by_hand(wave.double().numpy(), **MELS[preset])
    assert np.allclose(mel_features(wave, **MELS[preset]), expected, atol=1e-3)


def test_mel_features_have_one_length():
    wave = np.sin(np.arange(30_000))
    assert np.array_equal(mel_features(wave), mel_features(wave[:24_000]))
    assert mel_features(wave[:100]).shape == mel_features(wave).shape
    assert np.allclose(mel_features(np.zeros(100)), np.log(1e-5))
    for bad in (np.zeros(0), np.zeros((2, 100)), np.array([np.nan])):
        with pytest.raises(InputError, match=r"expected finite samples \(S,\)"):
            mel_features(bad)


def test_table_is_aligned():
    rows = [("exact name", Score(0.5, 0.4, 0.6, 64), Score(0.25, 0.2, 0.3, 64), "shape"),
            ("WER", Score(1.5, 1, 2, 52), None, "")]
    assert table(rows).splitlines() == [
        "metric      model                 strongest control            n",
        "exact name  0.500 [0.400, 0.600]  0.250 [0.200, 0.300] shape  64",
        "WER         1.500 [1.000, 2.000]  -                           52",
    ]
    with pytest.raises(InputError, match="exact: found 2 items for the model and 3 for the control"):
        table([("exact", Score(0, 0, 0, 2), Score(0, 0, 0, 3), "plain")])


# Reports.


def test_the_strongest_control_is_shown_and_the_model_is_told_to_be_behind(tiny_model, tmp_path, monkeypatch):
    """Of bright and dark copies of shapes, "plain" takes the brightness for the shape; where less is better, less wins."""
    shapes = np.full((2, 16, 16, 3), 255, np.uint8)
    shapes[0, :12], shapes[1, :, :12] = 0, 0
    for n, name in enumerate(("top", "left")):
        for folder, ink in (("train", 0.05), ("test", 0.95)):
            (tmp_path / folder).mkdir(exist_ok=True)
            light = 255 - (255 - shapes[n].astype(float)) * (ink if n == 0 else 1 - ink)
            Image.fromarray(light.astype(np.uint8)).save(tmp_path / folder / f"{name}.png")
            (tmp_path / folder / f"{name}.txt").write_text(name)
    monkeypatch.setattr(tiny_model, "caption_documents", lambda documents: ["left", "nothing at all"])
    train, test = ([DataSource([str(tmp_path / folder)])] for folder in ("train", "test"))
    (text,) = report(tiny_model, test, train, show=0)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "0.500 [" in lines["exact caption"] and "1.000 [" in lines["exact caption"] and "shape" in lines["exact caption"]
    assert "0.000 [" in lines["word error rate"] and "shape" in lines["word error rate"]
    assert text.endswith("behind a control that learns nothing: exact caption, word error rate, character error rate")
    monkeypatch.setattr(tiny_model, "caption_documents", lambda documents: ["left", "top"])
    (text,) = report(tiny_model, test, train, show=0)
    assert "behind" not in text


def reported(model, pattern, train=(), reader=None):
    """The table of a report as names and values, and the line below it."""
    sources = [[DataSource([str(STARTER / name)], limit=4, reader=reader)] for name in (pattern, *train)]
    (section,) = report(model, sources[0], sources[1] if train else [], show=0)
    lines = section.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("metric")) + 1
    rows = [line for line in lines[start:] if not line.startswith(("left out", "behind"))]
    return {re.split(r"  +", row)[0] for row in rows}, [line for line in lines if line.startswith("left out")]


def test_what_only_training_samples_tell_is_left_out_without_them(tiny_model):
    names, told = reported(tiny_model, "images-test-unseen-style.tar.gz", reader=NAMES)
    assert names == {"exact caption", "word error rate"}
    assert told == ["left out: exact group, exact subgroup (only training samples tell them of a caption, see --train)"]
    names, told = reported(tiny_model, "sounds-test-unseen-notes.tar.gz", reader=NOTES)
    assert names == {"exact caption", "exact instrument", "exact note", "word error rate"}
    assert told == ["left out: exact family (only training samples tell it of a caption, see --train)"]
    # Training samples without these fields tell nothing either.
    names, told = reported(tiny_model, "images-test-unseen-style.tar.gz", ["speech-test.tar.gz"], NAMES)
    assert "exact group" not in names and told
    names, told = reported(tiny_model, "images-test-unseen-style.tar.gz", ["images-train-000.tar.gz"], NAMES)
    assert names == {"exact caption", "exact group", "exact subgroup", "word error rate"} and not told
    # Without a reader nothing is known of captions but their words.
    names, told = reported(tiny_model, "sounds-test-unseen-notes.tar.gz")
    assert names == {"exact caption", "word error rate", "character error rate"} and not told


def test_a_reader_of_ones_own(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "shouted.py").write_text('''
from mmtx.evaluation import FieldReader

def first(train):
    known = sorted({item["style"] for item in train})
    return FieldReader(("caption", "style"), lambda caption: {"caption": caption.upper(), "style": known[0]}, unknown=("age",))

def none(train):
    return 3
''')
    monkeypatch.chdir(tmp_path)  # from here the reader is found, and that of the starter data among what comes with mmtx
    rows = [{"image": str(tmp_path / "a.png"), "text": text, "style": style}
            for text, style in (("a dog", "ink"), ("A CAT", "ink"), ("A COW", "oil"), ("A HEN", "ink"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    source = DataSource(["rows.jsonl"])
    monkeypatch.setattr(tiny_model, "caption_documents", lambda documents: ["a dog", "a cat", "a cow", "a pig"])
    (section,) = report(tiny_model, [replace(source, reader="shouted.py:first")], [source], show=0)
    figures = {line.split("  ")[0]: line.split()[2] for line in section.splitlines() if line.startswith("exact")}
    assert figures == {"exact caption": "0.500", "exact style": "0.750"}
    assert "left out: exact age" in section
    (section,) = report(tiny_model, [replace(source, reader=NAMES)], [], show=0)
    assert "left out: exact group, exact subgroup" in section
    for reader, said in (("shouted.py:last", "reader shouted.py:last: found no function 'last'"),
                         ("shouted.py:none", "reader shouted.py:none: gave int, expected"),
                         ("shouted.txt:a", "reader shouted.txt:a: shouted.txt: no such"), ("rows.jsonl:a", "reader rows.jsonl:a: found no such Python"),
                         ("names", "reader names: found no such Python file")):
        with pytest.raises(InputError) as told:
            list(report(tiny_model, [replace(source, reader=reader)], [], show=0))
        assert str(told.value).startswith(said)


def test_answers_are_counted_per_class(tiny_model, tmp_path, monkeypatch):
    """By hand: a class that is never answered, one that is answered too often, and a mistake that is no class."""
    true = ["cat"] * 4 + ["dog"] * 3 + ["hen"]
    source = of_one_picture(tmp_path, *({"image": "a.png", "text": text} for text in true))
    said = ["cat", "dog", "dog", "a\tcow", "dog", "dog", "cat", ""]
    monkeypatch.setattr(tiny_model, "caption_documents", lambda documents: said)
    (whole,) = report(tiny_model, [source], [], show=0)
    (section,) = report(tiny_model, [source], [], show=0, per_class=True)
    assert section.startswith(whole)
    assert section.removeprefix(whole).splitlines() == [
        "", "",
        "caption      n  right  answered  most often in its place",
        "cat          4      1         2  dog (2)",
        "dog          3      2         4  cat (1)",
        "hen          1      0         0  (nothing) (1)",
        "right, mean over 3 values: 0.306",
    ]


def test_classes_are_those_of_each_field_of_the_reader(tiny_model, monkeypatch):
    source = DataSource([str(STARTER / "sounds-test-unseen-notes.tar.gz")], limit=4, reader=NOTES)
    answers = []
    monkeypatch.setattr(tiny_model, "caption_documents", lambda documents: answers)
    answers = [sample.caption for sample in read_source(source)]
    (section,) = report(tiny_model, [source], [], show=0, per_class=True)
    assert re.findall(r"^(\w+) +n  right", section, re.MULTILINE) == ["instrument", "note"]
    assert section.count(" values: 1.000") == 2
    answers[0] = answers[0].replace(", ", ", not ")
    (section,) = report(tiny_model, [source], [], show=0, per_class=True)
    assert section.count(" values: 1.000") == 1


def test_captions_without_words_have_no_rate_of_word_errors(tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": str(tmp_path / "a.png"), "text": "..."}) + "\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (section,) = report(tiny_model, [DataSource([str(tmp_path / "rows.jsonl")])], [], show=0)
    assert "exact caption" in section and "word error rate" not in section


def of_one_picture(folder, *rows):
    """A source of rows that name a.png."""
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource([str(folder / "rows.jsonl")])


def chat(*turns):
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]}


def test_the_last_answer_of_a_chat_is_its_caption():
    for turns, caption in (
        ((("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")), "d"),
        ((("user", "a?"), ("assistant", "b"), ("user", "c?")), "b"),
        ((("user", "a?"), ("assistant", "b")), "b"),
        ((("user", "draw"), ("assistant", None)), "draw"),
        (((None, "a text"),), "a text"),
        ((("user", "a?"),), "a?"),
    ):
        made = tuple(SampleTurn(role, () if text is None else (Text(text),)) for role, text in turns)
        assert Sample("a", made, {}, "a").caption == caption


def test_a_chat_is_scored_by_its_last_answer_and_what_no_text_answers_is_left_out(tiny_model, tmp_path, monkeypatch):
    picture = [{"type": "image", "image": str(tmp_path / "a.png")}]
    others = [chat("draw a cat", picture), {"text": "a document"}, chat("who is it?")]
    source = of_one_picture(tmp_path, chat(picture, "thing 0", "sure?", "yes"), *others)
    monkeypatch.setattr(tiny_model, "caption_documents", lambda documents: ["yes"] * len(documents))
    (text,) = report(tiny_model, [source], [])
    assert "rows.jsonl: 1 samples" in text and "exact caption         1.000" in text, text
    assert "left out: 3 of 4 samples, whose last turn is no answer in text" in text
    (tmp_path / "others").mkdir()
    left = of_one_picture(tmp_path / "others", *others)
    none, some = report(tiny_model, [left, source], [])
    assert none == "\nrows.jsonl: left out: 3 of 3 samples, whose last turn is no answer in text" and some == text
    with pytest.raises(InputError, match=r"^rows\.jsonl: the last turn of no sample is an answer in text"):
        list(report(tiny_model, [left], []))


def test_examples_are_shown_on_one_line_without_control_characters(tiny_model, tmp_path, monkeypatch):
    source = of_one_picture(tmp_path, {"image": "a.png", "text": "a\x1b[31m cat\nand more"})
    monkeypatch.setattr(tiny_model, "caption_documents", lambda documents: ["a\x1b]0;dog\a\n"])
    (text,) = report(tiny_model, [source], [])
    assert text.isprintable() is False and "\x1b" not in text and "\a" not in text
    assert text.splitlines()[3] == r"  x a\x1b]0;dog\x07\n  a\x1b[31m cat\nand more"


def test_what_a_reader_cannot_read_is_told_in_one_line(tiny_model, tmp_path, monkeypatch):
    """A field that a sample lacks with its row, before anything is captioned."""
    (tmp_path / "failing.py").write_text('''
from mmtx.evaluation import FieldReader

def of_names(train):
    return FieldReader(("caption", "name"), lambda caption: {"caption": caption})

def at_once(train):
    return train[7]

def later(train):
    return FieldReader(("caption",), lambda caption: {"caption": caption.split()[1]})

def nothing(train):
    return FieldReader(("caption",), lambda caption: None)
''')
    monkeypatch.chdir(tmp_path)
    source = of_one_picture(tmp_path, {"image": "a.png", "text": "cat", "name": "cat"}, {"image": "a.png", "text": "dog", "size": 3})
    captioned = []
    monkeypatch.setattr(tiny_model, "caption_documents", lambda documents: captioned.append(1) or ["cat"] * len(documents))
    for function, said, done in (
        ("of_names", r"rows\.jsonl.* 2: field 'name' is missing, with which reader failing\.py:of_names compares; found size$",
         False),
        ("at_once", r"^reader failing\.py:at_once: IndexError: list index out of range$", False),
        ("later", r"^reader failing\.py:later: caption 'cat': IndexError: list index out of range$", True),
        ("nothing", r"^reader failing\.py:nothing: caption 'cat': gave NoneType, expected a mapping", True)):
        captioned.clear()
        with pytest.raises(InputError, match=said):
            list(report(tiny_model, [source, replace(source, reader=f"failing.py:{function}")], []))
        assert bool(captioned) == done


# The published figures of the control, on the starter set.


def _shards(pattern):
    files = defaultdict(dict)
    for path in sorted(STARTER.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                key, end = member.name.rsplit(".", 1)
                files[path.name, key][end] = tar.extractfile(member).read()
    assert files, f"no {pattern} in {STARTER}"
    return [(json.loads(f["json"]), next(v for end, v in f.items() if end != "json")) for f in files.values()]


def _control(train, test, features):
    """What it predicts by each of the features that `features` makes of a medium, which is decoded once for all of them."""
    fitted, asked = ([features(medium) for _, medium in found] for found in (train, test))
    captions = [row["caption"] for row, _ in train]
    return {preset: NearestNeighbour([each[preset] for each in fitted], captions).predict([each[preset] for each in asked])
            for preset in fitted[0]}


def test_picture_control():
    train, test = _shards("images-train-*"), _shards("images-test-unseen-style*")

    def features(data):
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
        return {preset: pixel_features(pixels, **options) for preset, options in PIXELS.items()}

    rows = [row for row, _ in test]
    read = CAPTIONS.names([row for row, _ in train]).read
    assert len(rows) == 1466
    predicted = _control(train, test, features)
    for preset, right in {"plain": (525, 885, 660), "shape": (652, 1031, 787)}.items():
        scores = field_scores(predicted[preset], rows, read, NAME_FIELDS)
        expected = pytest.approx(dict(zip(NAME_FIELDS, right)), abs=2)  # near ties
        assert {field: sum(s) for field, s in scores.items()} == expected, preset


def test_sound_control():
    train, test = _shards("sounds-train-*"), _shards("sounds-test*")

    def features(data):
        samples = soundfile.read(io.BytesIO(data))[0]
        return {preset: mel_features(samples, **options) for preset, options in MELS.items()}

    rows = [row for row, _ in test]
    read = CAPTIONS.notes([row for row, _ in train]).read
    assert len(rows) == 345
    predicted = _control(train, test, features)
    for preset, right in {"plain": {"instrument": 95, "note": 215}, "timbre": {"instrument": 304, "note": 8},
                          "pitch": {"instrument": 31, "note": 272}}.items():
        scores = field_scores(predicted[preset], rows, read, NOTE_FIELDS)
        assert {field: sum(scores[field]) for field in right} == pytest.approx(right, abs=2), preset
        assert sum(scores["caption"]) == 0  # no training item has both instrument and pitch of a test item
