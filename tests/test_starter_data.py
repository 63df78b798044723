"""The starter data as they are shipped: what the manifest says of every file, and that nothing of what is held out is trained on."""

import hashlib
import io
import json
import re
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parents[1]
STARTER = ROOT / "demos" / "data" / "starter"
MANIFEST = json.loads((STARTER / "manifest.json").read_text(encoding="utf-8"))
FILES = {name: facts for part in MANIFEST.values() for name, facts in part["files"].items()}


def rows(pattern: str) -> list[dict]:
    """The JSON of all samples of shards, with "key"; the rows of files of text."""
    found: list[dict] = []
    for path in sorted(STARTER.glob(pattern)):
        if path.suffix == ".jsonl":
            found += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            continue
        with tarfile.open(path) as tar:
            found += [{"key": member.name[:-5], **json.load(tar.extractfile(member))} for member in tar if member.name.endswith(".json")]
    assert found, pattern
    return found


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


@pytest.fixture(scope="module")
def builders():
    """The modules of demos/data by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "demos" / "data"))
        yield lambda name: __import__(name)
    for name in [name for name in sys.modules if name.startswith("build_")]:
        del sys.modules[name]


def test_every_file_is_what_the_manifest_says():
    assert {path.name for path in STARTER.iterdir() if path.suffix in (".gz", ".jsonl")} == set(FILES)
    for name, facts in FILES.items():
        data = (STARTER / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["bytes"], facts["sha256"]), name
        assert len(rows(name)) == facts["samples"], name
    readme = (STARTER / "README.md").read_text(encoding="utf-8")
    for name, facts in FILES.items():
        assert f"| `{name}` | {facts['samples']:,} | {facts['bytes'] / 1e6:.2f} |" in readme


def test_all_of_it_is_small():
    assert sum(path.stat().st_size for path in STARTER.rglob("*") if path.is_file()) <= 60e6


def test_synthetic_speech_keeps_sentences_and_voices_apart(builders):
    module = builders("build_synthetic_speech")
    train, sentences, voices = (rows(f"speech-synthetic-{part}.tar.gz") for part in ("train-*", "test-sentences", "test-voices"))
    spoken = {" ".join(words(row["caption"])) for row in train}
    for test in (sentences, voices):
        assert not spoken & {" ".join(words(row["caption"])) for row in test}
        assert {word for row in train for word in words(row["caption"])} >= {word for row in test for word in words(row["caption"])}
        assert all(module.is_test(row["caption"]) for row in test)  # so that hours of it would not have them either
    assert not any(module.is_test(row["caption"]) for row in train)
    known, unseen = ({row["speaker"] for row in found} for found in (train, voices))
    assert known == {str(voice) for voice in module.RECORDED + module.FORMANTS} and len(known) == 30
    assert {row["speaker"] for row in sentences} <= known
    assert unseen == {"flite awb", "espeak-ng en-gb-scotland+Annie"} and not unseen & known
    # The same sentences, so that a figure that differs is about voices; one clip of 150 would be too short or too long.
    assert len({row["caption"] for row in sentences} & {row["caption"] for row in voices}) >= 145
    assert all(row["synthetic"] is True and 0.5 <= row["seconds"] <= 6 for row in train + sentences + voices)
    assert sum(row["seconds"] for row in train) == pytest.approx(1800, abs=6)


def test_a_clip_is_the_same_for_every_length(builders):
    module = builders("build_synthetic_speech")
    train = rows("speech-synthetic-train-*.tar.gz")
    said = {int(row["key"].rpartition("-")[2]): row for row in train}
    sentences = [f"sentence {number}" for number in range(3)]
    for number, row in list(said.items())[::100]:
        assert str(module.training_clip(number, sentences)[1]) == row["speaker"]
    assert list(said) == sorted(said)  # in order, so that more of it begins with the same
    assert {module.training_clip(number, sentences)[0] for number in range(3)} == set(sentences)


def test_sounds_of_speech_are_as_long_as_they_say():
    with tarfile.open(STARTER / "speech-synthetic-test-voices.tar.gz") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar][:40]
    for (_, data), (_, text) in zip(members[::2], members[1::2]):
        wave, rate = soundfile.read(io.BytesIO(data))
        assert rate == 16000 and len(wave) / rate == pytest.approx(json.loads(text)["seconds"], abs=0.002)
        assert 0.4 < np.abs(wave).max() <= 1


def test_sentences_that_engines_could_read_otherwise_are_left_out(builders):
    for row in rows("speech-synthetic-*.tar.gz"):
        assert re.fullmatch(r"[A-Za-z' ,-]+", row["caption"]), row["caption"]


def test_extra_notes_keep_out_what_the_tests_hold_out(builders):
    module = builders("build_sounds_extra")
    tested = {(row["midi_program"], row["midi_note"]) for row in rows("sounds-test-unseen-notes.tar.gz")}
    assert len(tested) == 345
    for source in module.TAKES:
        played = {(program, key) for program in range(115) for key in module.keys_of(source, program)}
        assert not played & tested, source
    whole = {(program, key) for program in range(115) for key in module.keys_of("generaluser", program)}
    every = {(program, key) for program, (_, low, high) in enumerate(module.INSTRUMENTS) for key in range(int(low), int(high) + 1)}
    assert {program for program, _ in every - tested - whole} == {31, 34, 53, 79, 98, 101, 108, 111}  # left out as instruments
    # sf_GMbank is a test, and nothing here reads it; nor the font that others test with.
    used = " ".join([*module.DEB, *module.NPM.values(), *module.SOUNDFONTS.values()]).lower()
    assert "csound" not in used and "gmbank" not in used and "timgm" not in used
    assert set(module.TAKES) == {*module.SOUNDFONTS, "freepats", "salamander"}


def gravis_patch(wave: np.ndarray, rate: int, root: float, mode: int, loop: tuple[int, int]) -> bytes:
    """A Gravis Ultrasound patch of one recording, int16; the envelope is at once loud and holds, then dies away in 0.1 s."""
    header = bytearray(239)
    header[:12], header[198] = b"GF1PATCH110\0", 1
    sample = b"recordin" + struct.pack("<3IH3IHB", 2 * len(wave), 2 * loop[0], 2 * loop[1], rate, 20_000, 5_000_000, round(1000 * root), 0, 7)
    sample += bytes([63, 63, 63, 0x40 | 7, 63, 63]) + bytes([255, 255, 255, 0, 0, 0]) + bytes(6) + bytes([mode]) + bytes(40)
    return bytes(header) + sample[:96] + wave.astype("<i2").tobytes()


def test_patches_play_the_note_that_is_asked_for(builders, tmp_path):
    module = builders("build_sounds_extra")
    (tmp_path / "Tone_000").mkdir()
    rate, cycles = 22050, 20
    root = rate * cycles / 2205                                     # so that 2205 samples are whole cycles: 200 Hz
    wave = 20000 * np.sin(2 * np.pi * cycles * np.arange(4410) / 2205)
    wave[:2205] /= 4                                                # before the loop, so heard once
    (tmp_path / "Tone_000" / "040_Violin.pat").write_bytes(gravis_patch(wave, rate, root, 0x1 | 0x4 | 0x20 | 0x40, (2205, 4410)))
    player = module.PatchPlayer(tmp_path)
    assert player.has(40) and not player.has(41)
    for key in (57, 69, 74):                                        # 220, 440 and 587.3 Hz
        played = player.raw(40, key, 127, 1.2, 0.9)                 # far behind the 0.2 s that the patch holds: looped
        assert len(played) == round(1.2 * module.FINE)
        part = played[round(0.5 * module.FINE):round(0.9 * module.FINE)]
        spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), 16 * len(part)))
        assert np.argmax(spectrum) * module.FINE / (16 * len(part)) == pytest.approx(440 * 2 ** ((key - 69) / 12), rel=2e-3)
        assert np.abs(part).max() == pytest.approx(20000 / 32768, rel=0.01)
        assert np.sqrt(np.mean(part ** 2)) == pytest.approx(20000 / 32768 / np.sqrt(2), rel=0.01)
        assert np.abs(played[round(1.1 * module.FINE):]).max() < 0.01  # let go at 0.9 s
    quiet = player.raw(40, 69, 64, 1.2, 0.9)
    assert np.abs(quiet).max() == pytest.approx((64 / 127) ** 2 * 20000 / 32768, rel=0.01)


def test_bytes_of_a_patch_may_be_unsigned(builders, tmp_path):
    module = builders("build_sounds_extra")
    path = tmp_path / "a.pat"
    wave = np.array([0, 16384, -16384, 32767, -32768], np.int16)
    path.write_bytes(gravis_patch(wave ^ np.int16(-32768), 22050, 440, 0x1 | 0x2, (0, 0)))
    [(head, read)] = module.read_patch(path)
    assert read.tolist() == pytest.approx([0, 0.5, -0.5, 32767 / 32768, -1]) and (head["rate"], head["root"]) == (22050, 440)


def test_effects_are_as_strong_as_they_say(builders):
    module = builders("build_sounds_extra")
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(24000) / module.RATE)
    for seed in range(20):
        hiss = module.noise(wave, np.random.default_rng(seed)) - wave
        below = 10 * np.log10(np.mean(wave ** 2) / np.mean(hiss ** 2))
        assert 17.9 < below < 45.1
        changed = module.equalizer(wave, np.random.default_rng(seed))
        assert len(changed) == len(wave) and np.abs(10 * np.log10(np.mean(changed ** 2) / np.mean(wave ** 2))) < 4 * 8 + 0.1


def test_parts_that_are_not_shipped_are_built_on_demand_alone(builders):
    module = builders("build_starter")
    assert set(module.SHIPPED) == set(MANIFEST) and not module.ON_DEMAND & set(module.SHIPPED)


def test_extra_pictures_show_nothing_that_is_held_out(builders, tmp_path):
    module = builders("build_images_extra")
    known = module.known_pictures(tmp_path)                         # nothing is built there, so what is shipped
    assert len(known) == sum(MANIFEST["images"]["per_style"].values()) + sum(MANIFEST["more_images"]["per_style"].values()) + 1364
    assert not {style for style, _ in known} & {"twemoji", "lucide"}
    unseen = {row["codepoint"] for row in rows("images-test-unseen-emoji.tar.gz")}
    assert len(unseen) == 150 and not unseen & {code for _, code in known}
    assert not unseen & module.codes_of_fonts(known) and {"1f34e", "1f680"} <= module.codes_of_fonts(known)
    assert "twemoji" not in module.FONTS and not [spec for spec in module.DEB if "twemoji" in spec or "openmoji" in spec]


def test_varied_pictures_show_the_whole_thing_on_another_background(builders):
    from PIL import Image
    module = builders("build_images_extra")
    drawing, picture = Image.new("RGBA", (128, 128)), Image.new("RGBA", (128, 128))
    drawing.paste((0, 0, 0, 255), (24, 24, 104, 104))
    picture.paste((0, 0, 250, 255), (24, 24, 104, 104))
    areas, behind = [], []
    for seed in range(60):
        image = module.varied(drawing, True, np.random.default_rng(seed))
        assert (image.size, image.mode) == ((64, 64), "RGB")
        assert image.tobytes() == module.varied(drawing, True, np.random.default_rng(seed)).tobytes()
        light = np.asarray(image.convert("L"), float)
        corner = np.median(light[[0, 0, -1, -1], [0, -1, 0, -1]])
        assert np.percentile(np.abs(light - corner), 97) > 40, seed  # the ink can be told from what is behind it
        pixels = np.asarray(module.varied(picture, False, np.random.default_rng(seed)), float)
        blue = (pixels[..., 2] > 190) & (pixels[..., :2].max(-1) < 60)
        behind.append(pixels[0, 0])
        if not blue[[0, 0, -1, -1], [0, -1, 0, -1]].any():          # else what is behind it may be blue
            areas.append(blue.mean())
    assert len(areas) > 40 and 0.05 < min(areas) < 0.12 and 0.3 < max(areas) < 0.5      # from 0.45 to the whole of (80 / 128) ** 2
    assert 3 <= sum(colour.min() > 245 for colour in behind) <= 20 and np.ptp(behind, axis=0).min() > 150


def test_percussion_is_held_out_by_takes_and_by_soundfont():
    train, takes, font = (rows(f"sounds-percussion-{part}.tar.gz") for part in ("train-*", "test-takes", "test-soundfont"))
    names = {row["caption"] for row in train}
    assert {"a snare drum", "a bass drum", "a cowbell", "a telephone ring"} <= names and len(names) == 65
    assert not {row["key"] for row in train} & {row["key"] for row in takes}
    assert {row["caption"] for row in takes + font} <= names
    assert {row.get("soundfont") for row in train + takes} == {"fluid", "musescore", "opl3", None}
    assert {row["soundfont"] for row in font} == {"csound"}
    assert all(("recording" in row) != ("soundfont" in row) for row in train + takes)


def test_takes_that_sound_alike_stay_on_one_side(builders):
    module = builders("build_percussion")
    random = np.random.default_rng(0)
    first, second = random.standard_normal((2, 8000)).astype(np.float32)
    takes = [("a", str(i), {}, wave) for i, wave in enumerate((first, second, 0.5 * first, -first[:7000], second + 0.1 * first))]
    assert [[take[1] for take in group] for group in module.groups_of(takes)] == [["0", "2", "3"], ["1", "4"]]


def test_drawings_show_nothing_that_is_held_out(builders):
    train, test = (rows(f"images-drawings-{part}.tar.gz") for part in ("train-*", "test"))
    unseen = set(MANIFEST["images"]["unseen_emoji"])
    known = {row["caption"] for row in rows("images-train-*.tar.gz")}
    assert not unseen & {row["caption"] for row in train + test}
    assert not unseen & {name for row in train + test for name in row.get("also", [])}
    assert {row["style"] for row in test} == {"lucide"} and "lucide" not in {row["style"] for row in train}
    assert len({row["caption"] for row in test} & known) >= 150  # names that can be known
    left_out = builders("build_drawings").LEFT_OUT
    assert not [row["key"] for row in train + test if row["caption"] in left_out[row["style"]]]


def test_descriptions(builders):
    describe, with_article = builders("build_descriptions").describe, builders("build_descriptions").with_article
    apple = {"style": "tabler", "caption": "red apple", "group": "food-drink"}
    assert describe(apple) == "outline drawing of a red apple"
    assert describe({**apple, "style": "fluent-emoji-3d", "caption": "alien", "group": "smileys-emotion"}) == "3D picture of an alien"
    assert with_article("glasses", "objects") == "glasses" and with_article("unicorn", "animals-nature") == "a unicorn"
    assert with_article("up arrow", "symbols") == "up arrow" and with_article("bus", "travel-places") == "a bus"
    assert with_article("teacher", "people-body") == "a teacher" and with_article("men holding hands", "people-body") == "men holding hands"
    cello = {"caption": "cello, C 2", "instrument": "cello", "midi_program": 42}  # from 36 to 76
    assert [describe({**cello, "midi_note": note}) for note in (36, 49, 50, 76)] == [
        "a low cello note", "a low cello note", "a medium cello note", "a high cello note"]
    for row in rows("images-drawings-*.tar.gz"):
        assert row["description"] == describe(row)


def test_text_is_held_out_by_chapters_and_by_a_whole_novel():
    train, chapters, novel, definitions = (rows(f"text-{part}.jsonl") for part in (
        "train", "test-chapters", "test-novel", "test-definitions"))
    assert {row.get("source") for row in train} == {"Pride and Prejudice", "Northanger Abbey", "Emma", None}
    assert {row["source"] for row in chapters} == {"Pride and Prejudice", "Northanger Abbey", "Emma"}
    assert {row["source"] for row in novel} == {"Persuasion"} and not any("source" in row for row in definitions)
    lines = {line for row in train for line in row["text"].splitlines() if len(line) > 60}
    for test in (chapters, novel, definitions):
        assert not lines & {line for row in test for line in row["text"].splitlines()}
    assert max(len(row["text"]) for row in train + chapters + novel + definitions) <= 1000
    assert train[0]["text"].startswith("It is a truth universally acknowledged, that a single man in possession of a good fortune")
    # What is heard as a test is not read in training: examples of use are left out of definitions.
    heard = {row["caption"] for row in rows("speech-synthetic-test-*.tar.gz") if len(words(row["caption"])) >= 5}
    text = "\n".join(row["text"] for row in train)
    assert not [sentence for sentence in heard if sentence in text]


def test_strings_of_r_are_read(builders):
    read = builders("build_text").read_strings
    head = b"X\n" + b"\0\0\0\3" + b"\0\4\2\1" + b"\0\3\5\0" + b"\0\0\0\5UTF-8"
    strings = b"".join(b"\0\4\0\x09" + len(s).to_bytes(4, "big") + s for s in (b"Emma", b"", "café".encode()))
    assert read(head + b"\0\0\0\x10" + b"\0\0\0\3" + strings) == ["Emma", "", "café"]
    with pytest.raises(AssertionError, match="not a character vector"):
        read(head + b"\0\0\0\x0d" + b"\0\0\0\0")


def test_prose_is_cut_behind_sentences(builders):
    module = builders("build_text")
    assert module.chapters(["EMMA", "", "VOLUME I", "", "CHAPTER I", "", "One _is_", "here.", "", "Two.", "", "CHAPTER II", "", "Three."]) == [
        ["One is here.", "Two."], ["Three."]]
    long = "A sentence of forty letters or nearly so. " * 40
    cut = module.rows_of(["Short.", long.strip(), "End."], "x")
    assert all(len(row["text"]) <= module.MOST and row["text"][-1] == "." for row in cut)
    assert " ".join(row["text"].replace("\n", " ") for row in cut) == f"Short. {long.strip()} End."
