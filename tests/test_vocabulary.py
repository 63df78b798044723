"""Vocabulary: ranges that never overlap or move, and a loud refusal of other tokenizers."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtx.errors import InputError
from mmtx.vocabulary import SLOTS, Vocabulary


@dataclass
class FakeTokenizer:
    kind: str
    size: int
    levels: tuple[int, ...] | None = None
    bands: int | None = None
    fingerprint: str = 4 * "0123456789abcdef"
    chat_format: None = None


TEXT = FakeTokenizer("text", 300)
IMAGE = FakeTokenizer("image", 64, (4, 4, 4), fingerprint=4 * "f00d456789abcdef")
AUDIO = FakeTokenizer("audio", 35, (5, 7), bands=3)
ALL = {"text": TEXT, "image": IMAGE, "audio": AUDIO}


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary.build(ALL)


def test_layout_by_hand(vocabulary):
    assert vocabulary.range("text") == range(300)
    assert vocabulary.range("special") == range(300, 556)
    assert vocabulary.range("image") == range(556, 620)
    assert vocabulary.range("audio") == range(620, 655)
    assert vocabulary.size == 655
    assert vocabulary.kinds == ("text", "image", "audio")
    v = vocabulary
    specials = [v.pad, v.bos, v.eos, v.user, v.assistant, v.end, v.image, v.image_end, v.audio, v.audio_end]
    assert specials == list(range(300, 310))
    assert (v.height(1), v.height(64), v.width(1), v.width(64)) == (310, 373, 374, 437)
    assert (v.bands("audio"), v.levels("text"), v.levels("image"), v.levels("audio")) == (3, None, (4, 4, 4), (5, 7))


@given(st.integers(1, 999), st.permutations(["image", "audio"]), st.integers(1, 999), st.integers(1, 999))
def test_ranges_are_disjoint_and_complete(text, order, first, second):
    sizes = dict(zip(order, (first, second), strict=True))
    tokenizers = {kind: FakeTokenizer(kind, size, bands=1) for kind, size in {"text": text, **sizes}.items()}
    v = Vocabulary.build(tokenizers)
    ids = [i for kind in ("special", *v.kinds) for i in v.range(kind)]
    assert sorted(ids) == list(range(v.size))
    for kind in v.kinds:
        codes = np.arange(tokenizers[kind].size)
        assert np.array_equal(v.to_global(kind, codes), np.array(v.range(kind)))
        assert np.array_equal(v.to_local(kind, v.to_global(kind, codes)), codes)


def test_adding_never_moves_an_old_id():
    old = Vocabulary.build({"text": TEXT})
    new = old.add("audio", AUDIO).add("image", IMAGE)
    assert old.size == 556 and old.kinds == ("text",) and old.media == ()
    assert [new.name(i) for i in range(old.size)] == [old.name(i) for i in range(old.size)]
    assert new.range("audio") == range(556, 591)
    assert new.range("image") == range(591, 655)
    assert new == Vocabulary.build({"audio": AUDIO, "text": TEXT, "image": IMAGE})
    with pytest.raises(InputError, match="found audio, which it already has"):
        new.add("audio", AUDIO)


def test_build_refuses_wrong_tokenizers():
    with pytest.raises(InputError, match="expected one for text"):
        Vocabulary.build({"image": IMAGE})
    with pytest.raises(InputError, match="kind 'image' under 'audio'"):
        Vocabulary.build({"text": TEXT, "audio": IMAGE})
    with pytest.raises(InputError, match="video"):
        Vocabulary.build({"text": TEXT, "video": FakeTokenizer("video", 3)})


def test_shapes_and_bounds(vocabulary):
    codes = np.arange(6).reshape(2, 3)
    ids = vocabulary.to_global("image", codes)
    assert ids.shape == (2, 3) and ids.dtype == np.int64 and ids[0, 0] == 556
    assert vocabulary.to_global("text", []).shape == (0,)
    for kind, codes in (("text", [300]), ("image", [0, 64]), ("audio", [-1])):
        with pytest.raises(InputError, match=f"{kind} codes: found .*, expected 0"):
            vocabulary.to_global(kind, codes)
    for kind, ids in (("text", [300]), ("image", [555]), ("audio", [619, 620]), ("audio", [655])):
        with pytest.raises(InputError, match=f"{kind} ids: found .*, expected"):
            vocabulary.to_local(kind, ids)
    with pytest.raises(InputError, match="found no audio ids"):
        Vocabulary.build({"text": TEXT}).to_global("audio", [0])


@pytest.mark.parametrize("side", [0, 65, -1])
def test_sides_outside(vocabulary, side):
    with pytest.raises(InputError, match="expected 1 to 64"):
        vocabulary.height(side)
    with pytest.raises(InputError, match="expected 1 to 64"):
        vocabulary.width(side)


def test_names_and_kinds(vocabulary):
    v = vocabulary
    ids = [17, v.bos, v.height(8), v.width(64), 438, 555, 556 + 12, 620]
    names = ["text:17", "<bos>", "<h:8>", "<w:64>", "<reserved:138>", "<reserved:255>", "image:12", "audio:0"]
    assert [v.name(i) for i in ids] == names
    assert [v.kind(i) for i in ids] == ["text", *["special"] * 5, "image", "audio"]
    assert v.modality_of(ids).tolist() == [1, 0, 0, 0, 0, 0, 2, 3]
    assert v.modality_of(np.array([[0, 619]])).tolist() == [[1, 2]]
    assert len({v.name(i) for i in range(v.size)}) == v.size
    for i in (-1, v.size):
        with pytest.raises(InputError):
            v.name(i)


def test_save_and_load(vocabulary, tmp_path):
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)
    loaded = Vocabulary.load(path)
    assert loaded == vocabulary and loaded.to_json() == vocabulary.to_json()
    loaded.check(ALL)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda value: value.update(format=2), "format 1"),
        (lambda value: value.update(slots=SLOTS + 1), "256 special slots"),
        (lambda value: value.update(format=True), "'format' is True, expected a whole number"),
        (lambda value: value.pop("modalities"), "found no field 'modalities'"),
        (lambda value: value.update(colour=1), "unknown field 'colour'"),
        (lambda value: value.update(modalities={}), "'modalities' is dict, expected a list"),
        (lambda value: value["modalities"].clear(), "expected text"),
        (lambda value: value["modalities"][1].pop("size"), r"found no field 'modalities\[1\].size'"),
        (lambda value: value["modalities"][1].update(colour=1), r"unknown field 'modalities\[1\].colour'"),
        (lambda value: value["modalities"][1].update(size="64"), r"'modalities\[1\].size' is '64', expected a whole number"),
        (lambda value: value["modalities"][1].update(size=64.0), r"'modalities\[1\].size' is 64.0, expected a whole"),
        (lambda value: value["modalities"][2].update(size=-35), "audio: size: found -35"),
        (lambda value: value["modalities"][2].update(size=2**40), "audio: size: found 1099511627776"),
        (lambda value: value["modalities"][2].update(size=2**70), "is 1180591620717411303424, expected a whole number"),
        (lambda value: value["modalities"][2].update(levels=[5, 8]), "'levels' is .*product is size=35"),
        (lambda value: value["modalities"][2].update(levels=[-5, -7]), "'levels' is .*product is size=35"),
        (lambda value: value["modalities"][2].update(levels=[35.0]), r"levels\[0\]' is 35.0, expected a whole number"),
        (lambda value: value["modalities"][0].update(levels=[300]), "text: field 'levels' is .*expected null"),
        (lambda value: value["modalities"][2].update(bands=0), "audio: field 'bands' is 0, expected 1 or more"),
        (lambda value: value["modalities"][2].update(bands=None), "audio: field 'bands' is None"),
        (lambda value: value["modalities"][1].update(bands=2), "image: field 'bands' is 2, expected null"),
        (lambda value: value["modalities"][1].update(fingerprint="x" * 64), "'fingerprint' is 'xxx.*64 hexadecimal digits"),
        (lambda value: value["modalities"][1].update(kind=["image"]), r"kind' is list, expected text"),
        (lambda value: value["modalities"].pop(0), "expected text"),
        (lambda value: value["modalities"][2].update(kind="image"), "once each"),
        (lambda value: value["modalities"].pop(1), "without gaps"),
        (lambda value: value["modalities"][1].update(start=300), "without gaps"),
    ],
)
def test_damaged_files(vocabulary, tmp_path, edit, message):
    value = json.loads(vocabulary.to_json())
    edit(value)
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=f"vocabulary.json: .*{message}") as error:
        Vocabulary.load(path)
    assert len(str(error.value).replace(str(path), "")) < 300 and "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_check_names_the_tokenizer_that_differs(vocabulary):
    other = FakeTokenizer("image", 64, fingerprint=4 * "0ddba11789abcdef")
    with pytest.raises(InputError, match="image tokenizer: found .* 0ddba11789ab .* expects f00d456789ab "):
        vocabulary.check({**ALL, "image": other})
    with pytest.raises(InputError, match="audio tokenizer: .* 36 codes, .* 35 codes"):
        vocabulary.check({**ALL, "audio": FakeTokenizer("audio", 36, bands=3)})
    with pytest.raises(InputError, match="audio tokenizer: found \\['image', 'text'\\]"):
        vocabulary.check({"text": TEXT, "image": IMAGE})
    with pytest.raises(InputError, match="image tokenizer"):
        Vocabulary.build({"text": TEXT}).check({"text": TEXT, "image": IMAGE})
