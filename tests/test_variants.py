"""Several samples in place of one: notes in other pitches and with other names, and functions of the user's that are wrong."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmtx.data.collection import DataSource, read_source
from mmtx.data.corpus import read_corpus
from mmtx.data.media import load_audio
from mmtx.data.prepare import prepare
from mmtx.data.sample import Media
from mmtx.data.tokens import load_media
from mmtx.errors import InputError
from mmtx.plugins import import_function

ROOT = Path(__file__).parents[1]
STARTER = ROOT / "demos" / "data" / "starter"
RATE = 16_000
KINDS = "demos/data/starter_captions.py:with_kinds"
TRANSPOSED = "demos/data/starter_captions.py:transposed"
NEIGHBOURS = "demos/data/starter_captions.py:neighbours"
FIFTH = """
from dataclasses import replace
from mmtx.data.sample import Media

def fifth(sample):
    turns = [replace(turn, parts=tuple(part.perturb_speed(1.5) if isinstance(part, Media) else part for part in turn.parts))
             for turn in sample.turns]
    return [replace(sample, key=sample.key + " a fifth up", turns=tuple(turns))]

def third(sample):
    turns = [replace(turn, parts=tuple(part.shift_pitch(4) if isinstance(part, Media) else part for part in turn.parts))
             for turn in sample.turns]
    return [replace(sample, turns=tuple(turns))]

def none(sample): return []
def some(sample): return [sample, sample] if sample.metadata["note"] == "A 4" else []
def nothing(sample): return None
def alone(sample): return sample
def turnless(sample): return [replace(sample, turns=())]
def keyless(sample): return [replace(sample, key=3)]
def factless(sample): return [replace(sample, metadata=None)]
def path(sample):
    return [replace(sample, turns=(replace(sample.turns[0], parts=(Media("audio", "a", "a.wav"),)), *sample.turns[1:]))]
def text(sample): return ["a note"]
def wrong(sample): return sample.metadata["colour"]
number = 3
"""


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


def pitch(waveform) -> float:
    """The frequency in Hz of the loudest partial, to the hundredth of a semitone."""
    samples = np.asarray(waveform)
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 2**20))
    return float(spectrum.argmax() * RATE / 2**20)


def sound(sample) -> Media:
    return next(part for turn in sample.turns for part in turn.parts if isinstance(part, Media))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A manifest of three notes, and functions of a user, which are imported once."""
    folder = tmp_path_factory.mktemp("notes")
    (folder / "strangers_variants.py").write_text(FIFTH)
    rows = []
    for midi, name in ((69, "A 4"), (60, "C 4"), (71, "B 4")):
        soundfile.write(folder / f"{midi}.wav", tone(440 * 2 ** ((midi - 69) / 12)), RATE)
        rows.append({"audio": f"{midi}.wav", "text": f"whistle, {name}", "instrument": "whistle", "midi_note": midi, "note": name})
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(made, monkeypatch):
    """The folder that is the current one."""
    monkeypatch.chdir(made)
    return made


# -- Sounds played faster ------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [0.25, 2 ** (-1 / 12), 1.0, 2 ** (3 / 12), 1.7, 4.0])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_sound_played_faster_is_as_much_higher_and_shorter(speed, rate):
    data = io.BytesIO()
    samples = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(data, samples, rate, format="WAV")
    played = load_audio(data.getvalue(), RATE, speed=speed)
    assert 1200 * abs(np.log2(pitch(played) / (440 * speed))) < 4  # hundredths of a semitone
    assert len(played) == pytest.approx(RATE / speed, rel=2e-3)


def test_what_is_cut_out_is_played_faster():
    both = np.concatenate([tone(300), tone(500)])
    played = load_audio(both, RATE, start=1.0, seconds=0.5, speed=1.5)
    assert pitch(played) == pytest.approx(750, rel=2e-3) and len(played) == pytest.approx(RATE / 3, rel=2e-3)


@pytest.mark.parametrize("speed", [0, -1.0, 0.2, 4.1, float("nan"), float("inf"), "fast"])
def test_a_speed_that_is_none_is_refused(speed):
    with pytest.raises(InputError, match="^sound: speed"):
        load_audio(tone(440), RATE, speed=speed)


def test_a_medium_played_faster_tells_so_by_its_name(folder):
    medium = sound(read_source(DataSource(["notes.jsonl"]))[0])
    twice = medium.perturb_speed(2).perturb_speed(0.75)
    assert (twice.speed, twice.options) == (1.5, {"speed": 1.5}) and medium.options == {}
    assert medium.name in twice.name and "1.5" in twice.name


# -- Sounds made higher --------------------------------------------------------------------------------------


@pytest.mark.parametrize("semitones", [-24, -3, -0.5, 0, 1, 7, 24])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_sound_made_higher_is_as_long_as_before(semitones, rate):
    data = io.BytesIO()
    soundfile.write(data, 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate), rate, format="WAV")
    higher = load_audio(data.getvalue(), RATE, semitones=semitones)
    assert 1200 * abs(np.log2(pitch(higher) / (440 * 2 ** (semitones / 12)))) < 4 and len(higher) == RATE


@pytest.mark.parametrize("semitones", [-3, 3])
def test_a_sound_made_higher_rises_and_falls_as_before(semitones):
    decaying = np.exp(-np.arange(2 * RATE) / (RATE / 3)).astype(np.float32) * tone(440, 2.0)

    def loudness(samples) -> np.ndarray:
        """Of tenths of a second in dB, beside that of one of them: the loudest moment is always as loud."""
        levels = 20 * np.log10(np.asarray(samples).reshape(20, -1).std(1)[:12])
        return levels - levels[6]

    before = loudness(load_audio(decaying, RATE))
    assert np.abs(loudness(load_audio(decaying, RATE, semitones=semitones)) - before).max() < 1
    faster = load_audio(decaying, RATE, speed=2 ** (semitones / 12))
    assert np.abs(loudness(np.resize(faster, 2 * RATE)) - before).max() > 2  # played slower or faster, it does not


@pytest.mark.parametrize("samples", [1, 7, 255, 1023, 4097])
def test_a_short_sound_can_be_made_higher(samples):
    higher = load_audio(tone(440)[:samples], RATE, semitones=5)
    assert len(higher) == samples and bool(higher.isfinite().all())


def test_silence_made_higher_is_silence():
    assert not load_audio(np.zeros(RATE, np.float32), RATE, semitones=3).any()


def test_what_is_cut_out_and_played_faster_is_made_higher():
    both = np.concatenate([tone(300), tone(500)])
    higher = load_audio(both, RATE, start=1.0, seconds=0.5, speed=1.5, semitones=12)
    assert pitch(higher) == pytest.approx(1500, rel=2e-3) and len(higher) == pytest.approx(RATE / 3, rel=2e-3)


@pytest.mark.parametrize("semitones", [-24.1, 25, float("nan"), float("inf"), "high"])
def test_semitones_that_are_none_are_refused(semitones):
    with pytest.raises(InputError, match="^sound: .*semitones.*, expected"):
        load_audio(tone(440), RATE, semitones=semitones)


def test_a_medium_made_higher_tells_so_by_its_name(folder):
    medium = sound(read_source(DataSource(["notes.jsonl"]))[0])
    twice = medium.shift_pitch(2).shift_pitch(-5)
    assert (twice.semitones, twice.options) == (-3, {"semitones": -3}) and "-3 semitones" in twice.name
    assert twice.perturb_speed(2).options == {"speed": 2, "semitones": -3}
    assert medium.shift_pitch(2).shift_pitch(-2).options == {}


# -- Notes transposed ----------------------------------------------------------------------------------------


def test_a_transposed_note_has_the_pitch_that_its_caption_tells(folder, tokenizers):
    samples = read_source(DataSource(["notes.jsonl"], variants=TRANSPOSED))
    names = ["F sharp 4", "G 4", "G sharp 4", "A 4", "A sharp 4", "B 4", "C 5", "A 3", "A sharp 3", "B 3", "C 4", "C sharp 4", "D 4",
             "D sharp 4", "G sharp 4", "A 4", "A sharp 4", "B 4", "C 5", "C sharp 5", "D 5"]
    assert [sample.caption for sample in samples] == [f"whistle, {name}" for name in names]
    assert len({sample.key for sample in samples}) == 21
    for sample in samples:
        heard = pitch(load_media(sound(sample), tokenizers))
        assert 1200 * abs(np.log2(heard / (440 * 2 ** ((sample.metadata["midi_note"] - 69) / 12)))) < 4, sample.caption
        assert sample.metadata["note"] == sample.caption.removeprefix("whistle, ")


def test_what_tells_no_note_keeps_its_caption():
    sources = [DataSource([str(STARTER / "sounds-percussion-train-*.tar.gz")], limit=14, variants=each) for each in (TRANSPOSED, None)]
    transposed, plain = map(read_source, sources)
    assert len(transposed) == len(plain) == 14
    whole = read_source(replace(sources[0], limit=None))
    assert len(whole) == 7 * len(read_source(replace(sources[1], limit=None)))
    assert {len({sample.caption for sample in whole[i:i + 7]}) for i in range(0, len(whole), 7)} == {1}
    assert [round(12 * np.log2(sound(sample).speed)) for sample in whole[:7]] == [-3, -2, -1, 0, 1, 2, 3]


def test_the_notes_that_are_shipped_are_called_as_they_are_transposed():
    """Every name that a variant gets is how the data set calls that note."""
    names: dict[int, str] = {}
    for sample in read_source(DataSource([str(STARTER / "sounds-train-*.tar.gz")], variants=TRANSPOSED)):
        by_midi = names.setdefault(sample.metadata["midi_note"], sample.metadata["note"])
        assert by_midi == sample.metadata["note"] and sample.caption == f"{sample.metadata['instrument']}, {by_midi}"


def test_neighbours_of_notes_are_those_that_no_other_note_is_nearer_to(tokenizers):
    source = DataSource([str(STARTER / "sounds-train-*.tar.gz")], variants=NEIGHBOURS)
    plain, samples = read_source(replace(source, variants=None)), read_source(source)
    known: dict[str, set[int]] = {}
    for sample in plain:
        known.setdefault(sample.metadata["instrument"], set()).add(sample.metadata["midi_note"])
    wanted = {(name, note + by) for name, notes in known.items() for note in notes for by in range(-3, 4)}
    assert {(sample.metadata["instrument"], sample.metadata["midi_note"]) for sample in samples} == wanted
    assert len(samples) == len(wanted) == len({sample.key for sample in samples})
    assert [sample for sample in samples if not sound(sample).semitones] == plain
    for sample in samples:
        note, by = sample.metadata["midi_note"], round(sound(sample).semitones)
        notes = known[sample.metadata["instrument"]]
        assert note - by in notes and abs(by) == min(abs(note - other) for other in notes)
        assert sample.caption == f"{sample.metadata['instrument']}, {sample.metadata['note']}"
    lengths = {len(load_media(sound(sample), tokenizers)) for sample in samples[::500]}
    assert len(lengths) == 1


# -- Pictures whose kind is asked for ------------------------------------------------------------------------


def test_kinds_are_asked_for_before_names():
    source = DataSource([str(STARTER / "images-train-004.tar.gz")], variants=KINDS)
    plain, asked = read_source(source)[:2]
    assert plain == read_source(replace(source, variants=None))[0]
    assert plain.turns[0].parts == asked.turns[0].parts[:1] and plain.caption == asked.caption
    assert [turn.role for turn in asked.turns] == ["user", "assistant"] * 2
    said = [turn.parts[-1].text for turn in asked.turns]
    group, subgroup = (plain.metadata[field].replace("-", " ") for field in ("group", "subgroup"))
    assert said == ["What kind of thing is it?", f"{group}, {subgroup}", "And what is it?", plain.caption]
    assert asked.key != plain.key and plain.caption not in said[1]


def test_kinds_alone_are_read_as_training_has_them():
    samples = read_source(DataSource([str(STARTER / "images-train-004.tar.gz")], limit=20, variants=KINDS.replace("with_kinds", "kinds")))
    assert all(len(sample.turns) == 2 and sample.turns[0].parts[1].text == "What kind of thing is it?" for sample in samples)
    reader = import_function(KINDS.replace("with_kinds", "kind_reader"), "reader")([sample.metadata for sample in samples])
    for sample in samples:
        assert reader.read(sample.caption) == {field: sample.metadata[field] for field in reader.fields}
    group = samples[0].metadata["group"]
    assert reader.read(f"{group.replace('-', ' ')}, of no known kind") == {"group": group} and reader.read("no group") == {}


@pytest.mark.parametrize("tar", ["sounds-train-001", "speech-train-000"])
def test_what_is_no_picture_with_a_kind_stays_as_it_is(tar):
    source = DataSource([str(STARTER / f"{tar}.tar.gz")], limit=2, variants=KINDS)
    assert read_source(source) == read_source(replace(source, variants=None))


# -- Sources -------------------------------------------------------------------------------------------------


def test_a_source_selects_before_and_counts_after(folder):
    source = DataSource(["notes.jsonl"], select={"note": ["A 4"]}, variants=TRANSPOSED)
    assert len(read_source(source)) == 7  # the A that B becomes was not selected
    assert [sample.caption for sample in read_source(replace(source, limit=2))] == ["whistle, F sharp 4", "whistle, A 4"]
    turned = read_source(replace(source, task="generate"))
    assert turned[0].turns[0].parts[0].text == "whistle, F sharp 4" and sound(turned[0]).speed == 2 ** (-3 / 12)


def test_rows_that_variants_leave_out_count_as_rows(folder, tokenizers, tmp_path, capsys):
    """As those that `select` leaves out: else a few bad rows among many would be too many once most are left out."""
    (folder / "dirty.jsonl").write_text((folder / "notes.jsonl").read_text() + '{"audio": "gone.wav", "text": "x"}\n')
    source = DataSource(["dirty.jsonl"], variants="strangers_variants.py:some")
    assert len(read_source(source, max_bad=0.25)) == 2
    assert "skipped: 1 of 5 rows cannot be used" in capsys.readouterr().err
    facts = prepare(source, tokenizers, tmp_path / "shards", max_bad=0.25)
    assert (facts["rows"], facts["documents"], facts["skipped"]) == (5, 2, 1)


def test_variants_are_documents_of_their_own(folder, tokenizers, vocabulary):
    plain, faster, higher, changed = (
        read_corpus([DataSource(["notes.jsonl"], variants=variants)], tokenizers, vocabulary, max_seq_len=600)
        for variants in (None, "strangers_variants.py:fifth", "strangers_variants.py:third", TRANSPOSED))
    assert (len(plain), len(faster), len(higher), len(changed)) == (3, 3, 3, 21)
    # A resumed run knows them by their digests, also where texts are the same.
    assert len({digest for corpus in (plain, faster, higher) for digest in corpus.contents()[0].digests.tolist()}) == 9
    # The lengths that batches are packed by are those of the sounds as they are played.
    documents = changed.render([(number, 0) for number in range(21)])
    assert [len(document.ids) for document in documents] == changed.lengths.tolist() and len(set(changed.lengths)) > 3


@pytest.mark.parametrize("variants, limit", [(TRANSPOSED, None), (TRANSPOSED, 5), ("strangers_variants.py:third", 3)])
def test_prepared_shards_hold_variants_as_raw_media_do(folder, tokenizers, vocabulary, tmp_path, variants, limit):
    source = DataSource(["notes.jsonl"], variants=variants, limit=limit)
    shards = str(tmp_path / "shards")
    prepare(source, tokenizers, shards, rows=4)
    raw = read_corpus([source], tokenizers, vocabulary, max_seq_len=600)
    prepared = read_corpus([DataSource([shards], limit=limit)], tokenizers, vocabulary, max_seq_len=600)
    chosen = [(number, 0) for number in range(limit or 21)]
    assert [document.ids.tolist() for document in prepared.render(chosen)] == [document.ids.tolist() for document in raw.render(chosen)]
    with pytest.raises(InputError, match="variants: .* is prepared"):
        read_corpus([DataSource([shards], variants=variants)], tokenizers, vocabulary, max_seq_len=600)
    with pytest.raises(InputError, match="begun with variants"):
        prepare(replace(source, variants="strangers_variants.py:fifth"), tokenizers, shards, rows=4)


def test_a_function_of_ones_own(folder, tokenizers):
    (sample, *more) = read_source(DataSource(["notes.jsonl"], variants="strangers_variants.py:fifth"))
    assert len(more) == 2 and sample.key.endswith(" a fifth up")
    assert pitch(load_media(sound(sample), tokenizers)) == pytest.approx(660, rel=2e-3)


@pytest.mark.parametrize("function, told", [
    ("strangers_variants.py:last", "found no function 'last', expected FILE.py:FUNCTION"),
    ("strangers_variants.py:number", "found no function 'number'"),
    ("strangers_variants.py", "found no such Python file"),
    ("nothing.py:fifth", "nothing.py: no such"),
    ("strangers_variants.py:wrong", "notes.jsonl row 1: KeyError: 'colour'"),
    ("strangers_variants.py:text", "notes.jsonl row 1: gave str, expected an mmtx.data.sample.Sample"),
    ("strangers_variants.py:none", "no sample is left"),
    ("strangers_variants.py:nothing", "notes.jsonl row 1: gave NoneType, expected a list of mmtx.data.sample.Sample"),
    ("strangers_variants.py:alone", "notes.jsonl row 1: gave Sample, expected a list of mmtx.data.sample.Sample"),
    ("strangers_variants.py:turnless", "notes.jsonl row 1: gave a sample without turns, expected at least one"),
    ("strangers_variants.py:keyless", "notes.jsonl row 1: gave the key 3, expected str"),
    ("strangers_variants.py:factless", "notes.jsonl row 1: gave the metadata None, expected dict"),
    ("strangers_variants.py:path", "notes.jsonl row 1: gave a medium with the source 'a.wav', expected mmtx.data.storage.FileSource(PATH)"),
])
def test_what_is_no_such_function_is_one_line_that_names_the_row(folder, function, told):
    with pytest.raises(InputError) as error:
        read_source(DataSource(["notes.jsonl"], variants=function))
    assert str(error.value).startswith(f"variants {function}: ") and told in str(error.value), error.value


def test_a_picture_is_not_played(folder):
    source = DataSource([str(STARTER / "images-test-unseen-emoji.tar.gz")], limit=1, variants="strangers_variants.py:fifth")
    with pytest.raises(InputError, match="gave image with .*speed.*, which only sounds can have"):
        read_source(source)
