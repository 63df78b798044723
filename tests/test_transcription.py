"""Transcripts: the strings of CTC are its most likely ones, both scores are those of each string alone, and the sum decides."""

import base64
import io
import itertools
import math
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image
from starlette.testclient import TestClient

import mmtx
from mmtx import cli
from mmtx.ctc import ctc_scores, time_steps
from mmtx.data.collection import DataSource, read_source
from mmtx.data.media import load_audio, load_windows
from mmtx.data.pauses import cut_at_pauses
from mmtx.data.sample import Media
from mmtx.data.sound_files import read_sound
from mmtx.data.tokens import to_documents
from mmtx.document import Document, TextPart, Turn
from mmtx.errors import InputError
from mmtx.evaluation import character_errors
from mmtx.inference.engine import pad
from mmtx.inference.transcription import hear, prefix_beam_search, rescore
from mmtx.model import Decoder, rotary_embedding
from mmtx.pipeline import Model
from mmtx.report import report
from mmtx.sequence import prompt, render
from mmtx.serving.app import make_app
from mmtx.serving.limits import Limits
from mmtx.serving.page import add_page
from mmtx.training.ctc import CTCConfig
from mmtx.training.decoder import DecoderModule
from mmtx.training.decoder_data import TokenizerFolders

RATE = 16_000


def said_by(path: tuple[int, ...]) -> tuple[int, ...]:
    """What a way to write says: one of each run, without blanks (0)."""
    return tuple(number - 1 for number, _ in itertools.groupby(path) if number)


@pytest.mark.parametrize("seed", range(8))
def test_the_strings_of_ctc_are_the_most_likely_ones(seed):
    """Where the beam holds all, they come in the order of the sum over all ways to write them."""
    scores = np.random.default_rng(seed).normal(size=(5, 4))
    scores -= np.log(np.exp(scores).sum(1, keepdims=True))
    totals: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(4), repeat=5):
        totals[said_by(path)] = totals.get(said_by(path), 0) + math.exp(sum(scores[step, number] for step, number in enumerate(path)))
    expected = sorted(totals, key=totals.__getitem__, reverse=True)
    assert prefix_beam_search(scores, beam=10 * len(totals)) == expected
    sure = scores * 10 - np.log(np.exp(scores * 10).sum(1, keepdims=True))
    assert prefix_beam_search(sure, beam=3)[0] == said_by(tuple(sure.argmax(1))) and len(prefix_beam_search(scores, beam=3)) == 3


@pytest.fixture(scope="module")
def model(tokenizers, vocabulary, tiny_model):
    """Another random decoder, which reads features and was, its configuration says, trained with CTC behind the first of two blocks."""
    widths = {kind: tokenizers[kind].feature_width for kind in ("image", "audio")}
    config = replace(tiny_model.decoder.config, depth=2, features=widths, ctc_blocks=1)
    torch.manual_seed(3)
    decoder = Decoder(config).eval()
    for weight in decoder.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)  # so that what each place sees counts
    return Model(decoder, vocabulary, tokenizers).prepare_for_inference()


def sound(seconds: float, seed: int = 0) -> mmtx.Audio:
    return mmtx.Audio(np.random.default_rng(seed).normal(size=round(seconds * RATE)).astype(np.float32) * 0.1, RATE)


def asked(model: Model, seconds: float, seed: int = 0) -> Document:
    return Document((Turn("user", tuple(model.encode_parts([sound(seconds, seed)]))),))


def states(decoder: Decoder, stream, blocks: int) -> torch.Tensor:
    """Normalised states (T, D) behind some blocks, by the blocks themselves."""
    ids, _, features = pad([stream], torch.device("cpu"))
    positions = torch.arange(ids.shape[1])[None]
    x = decoder.embed(ids, features)
    for block in decoder.blocks[:blocks]:
        x = block(x, rotary_embedding(positions, decoder.config.head_dim, decoder.config.rope_theta))
    return decoder.norm(x)[0]


@torch.no_grad()
@pytest.mark.parametrize("seconds", [0.1, 0.9, 1.7])
def test_what_is_heard_is_what_ctc_was_trained_on(model, seconds):
    stream = prompt(asked(model, seconds), model.vocabulary)
    heard = hear(model.decoder, stream, model.vocabulary)
    written = states(model.decoder, stream, 1)
    codes = [place for place, ident in enumerate(stream.ids) if ident in model.vocabulary.range("audio")]
    bands = model.vocabulary.bands("audio")
    expected = ctc_scores(model.decoder.embedding, written[codes[bands - 1::bands]], model.vocabulary)
    assert heard.scores.shape == (len(codes) // bands, 1 + len(model.vocabulary.range("text")))
    torch.testing.assert_close(heard.scores, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(heard.last[0], states(model.decoder, stream, 2)[-1], rtol=1e-4, atol=1e-4)
    assert len(time_steps(pad([stream], torch.device("cpu"))[2]["audio"])) == 1


@torch.no_grad()
def test_both_scores_are_those_of_each_string_alone(model):
    document, v = asked(model, 1.2), model.vocabulary
    stream = prompt(document, v)
    heard = hear(model.decoder, stream, v)
    candidates = [(5, 6, 7), (), (9,), (5, 6), (4, 4, 4, 4), tuple(range(3, 60))]
    by_decoder, by_ctc = rescore(model.decoder, heard, candidates, v)
    for pieces, one, other in zip(candidates, by_decoder, by_ctc, strict=True):
        whole = render(Document((*document.turns, Turn("assistant", (TextPart(np.array(pieces, int)),)))), v)
        ids, first = torch.from_numpy(whole.ids).long(), len(stream.ids)
        scores = states(model.decoder, stream._replace(ids=whole.ids), 2) @ model.decoder.output_matrix(plain=True).T
        told = scores.log_softmax(-1)[first - 1:-1].gather(1, ids[first:, None])[:len(pieces) + 1].sum()
        assert float(one) == pytest.approx(float(told), rel=1e-4)
        target = torch.tensor([[piece + 1 for piece in pieces]], dtype=torch.long)
        way = -F.ctc_loss(heard.scores[:, None], target, torch.tensor([len(heard.scores)]), torch.tensor([len(pieces)]), reduction="none")
        assert float(other) == pytest.approx(float(way), rel=1e-4) and (len(pieces) < 50 or other == -math.inf)


@torch.no_grad()
def test_nothing_said_is_a_string_too(model):
    heard = hear(model.decoder, prompt(asked(model, 0.2), model.vocabulary), model.vocabulary)
    alone, among = (rescore(model.decoder, heard, candidates, model.vocabulary)[:, 0] for candidates in ([()], [(), (5,)]))
    torch.testing.assert_close(alone, among, rtol=1e-4, atol=1e-4)


def test_the_string_of_the_best_sum_is_the_transcript(model):
    """Against all candidates one by one, the decoder's own answer among them; neither score alone would choose them all."""
    documents = [asked(model, 0.2 + 0.1 * number, number) for number in range(8)]
    text, alone = model.tokenizers["text"], [0, 0]
    said = model.caption_documents(documents)
    for document, answer, transcript in zip(documents, said, model.transcribe_documents(documents), strict=True):
        with torch.no_grad():
            heard = hear(model.decoder, prompt(document, model.vocabulary), model.vocabulary)
            strings = sorted({text.decode(pieces) for pieces in prefix_beam_search(heard.scores.numpy())} | {answer})
            scores = [rescore(model.decoder, heard, [tuple(text.encode(string))], model.vocabulary)[:, 0] for string in strings]
        assert float(scores[strings.index(transcript)].sum()) == pytest.approx(max(float(score.sum()) for score in scores), rel=1e-4)
        for way in (0, 1):
            alone[way] += strings[max(range(len(strings)), key=lambda i: float(scores[i][way]))] == transcript
    assert max(alone) < len(documents)


def test_one_sound_is_a_string_and_several_are_a_list(model):
    sounds = [sound(0.5, 0), sound(1.1, 1)]
    assert model.transcribe(sounds) == [model.transcribe(each) for each in sounds] == [text.strip() for text in model.transcribe_documents(
        [asked(model, 0.5, 0), asked(model, 1.1, 1)])]
    assert model.transcribe([]) == []


def test_a_long_sound_is_cut_where_it_is_quietest():
    rng = np.random.default_rng(0)
    parts = [(1.0, 1), (0.25, 0.01), (0.5, 1), (0.25, 0.02), (1.0, 1), (0.25, 0.02), (0.33, 1)]  # seconds and loudness
    whole = torch.from_numpy(np.concatenate([loud * rng.normal(size=round(s * RATE)) for s, loud in parts]).astype(np.float32))
    pieces = cut_at_pauses(whole, RATE, 2.0)
    whole = whole - whole.mean()
    within_pauses = [(1.0, 1.25), (1.75, 2.0), (3.0, 3.25)]
    assert len(pieces) == 3 and pieces[0].first == 0
    assert all(torch.equal(whole[first:first + len(samples)], samples) for first, samples in pieces)
    for before, after in itertools.pairwise(pieces):
        begin, end = after.first / RATE, (before.first + len(before.samples)) / RATE
        assert any(first <= end <= begin <= last for first, last in within_pauses)
    for seconds in (0.1, 0.35, 2.0, 9.0):
        assert all(0 < len(samples) <= seconds * RATE for _, samples in cut_at_pauses(whole, RATE, seconds))


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_what_is_quiet_around_speech_is_left_out(noise):
    rng = np.random.default_rng(1)
    loud, silence = rng.normal(size=RATE).astype(np.float32), np.zeros(2 * RATE, np.float32)
    whole = np.concatenate([silence, loud, silence, silence, loud, silence]) + noise * rng.normal(size=10 * RATE).astype(np.float32)
    pieces = cut_at_pauses(torch.from_numpy(whole.astype(np.float32)), RATE, 3.5)
    assert len(pieces) == 2
    for (first, samples), begin in zip(pieces, (2, 7), strict=True):  # with a margin of 0.1 s, and a moment of 0.025 s
        assert RATE <= len(samples) <= 1.26 * RATE and (begin - 0.13) * RATE <= first <= begin * RATE
    assert cut_at_pauses(torch.zeros(3 * RATE), RATE, 1.0) == [] == cut_at_pauses(torch.zeros(0), RATE, 1.0)


@pytest.mark.parametrize("offset", [-0.02, 0.1])
def test_an_offset_of_the_recorder_is_not_heard(offset):
    rng = np.random.default_rng(1)
    silence = np.zeros(RATE)
    whole = torch.from_numpy(np.concatenate([silence, 0.1 * rng.normal(size=RATE), silence]).astype(np.float32))
    (piece,), (same,) = cut_at_pauses(whole, RATE, 3.5), cut_at_pauses(whole + offset, RATE, 3.5)
    assert len(piece.samples) < 1.26 * RATE and torch.allclose(piece.samples, same.samples, atol=1e-6) and piece.first == same.first
    assert cut_at_pauses(torch.full((RATE,), offset), RATE, 3.5) == [] == cut_at_pauses(torch.full((1,), offset), RATE, 3.5)
    model, spoken = mmtx.load("demos/speech", device="cpu"), load_audio("demos/examples/speech.ogg", RATE).numpy()
    assert model.transcribe(mmtx.Audio(spoken + np.float32(offset), RATE)) == model.transcribe(mmtx.Audio(spoken, RATE))


def test_nobody_speaks_in_silence():
    model = mmtx.load("demos/speech", device="cpu")
    said = "demos/examples/speech.ogg"
    spoken, silence = load_audio(said, RATE).numpy(), np.zeros(2 * RATE, np.float32)
    around = np.concatenate([silence, spoken, silence])
    nothing, words = model.transcribe([mmtx.Audio(np.zeros(3 * RATE, np.float32), RATE), mmtx.Audio(around, RATE)])
    assert nothing == "" and words.replace(",", "") == model.transcribe(said).replace(",", "") != ""


def test_what_is_said_in_a_long_sound_is_what_is_said_in_its_pieces(model, monkeypatch):
    monkeypatch.setattr("mmtx.batching.BATCH_VALUES", RATE)  # so that not all are held together
    sounds = [sound(seconds, seed) for seed, seconds in enumerate((2.5, 0.4, 1.3))]
    expected = []
    for each in sounds:
        pieces = cut_at_pauses(model.read_medium(each).data, RATE, 1.0)
        expected.append(" ".join(filter(None, (model.transcribe(mmtx.Audio(samples.numpy(), RATE)).strip() for _, samples in pieces))))
    assert model.transcribe(sounds, chunk_length_s=1.0) == expected
    for value, told in ((0, "0"), (-1, "-1"), (float("nan"), "nan"), (float("inf"), "inf"), ("3", "'3'"), (None, "None"), ([3], "list"), (1e9, "1000000000.0"),
                        (1j, "complex"), (np.array([3.0]), "ndarray")):
        for given in (sounds, []):
            with pytest.raises(InputError, match=f"chunk_length_s: found {told}, expected 0.1 or more, and 600 at most"):
                model.transcribe(given, chunk_length_s=value)
    with pytest.raises(InputError, match="chunk_length_s: found '3'"):
        list(mmtx.transcribe_files(model, [], chunk_length_s="3"))


def test_timestamps_are_those_of_the_pieces(model, monkeypatch):
    """In the form of transformers: https://huggingface.co/docs/transformers/main_classes/pipelines"""
    monkeypatch.setattr("mmtx.batching.BATCH_VALUES", RATE)  # so that not all are held together
    sounds, passed = [sound(2.5, 0), sound(0.4, 1)], []
    texts = model.transcribe(sounds, chunk_length_s=1.0)
    timed = model.transcribe(sounds, chunk_length_s=1.0, return_timestamps=True, progress=passed.append)
    assert [each["text"] for each in timed] == texts and model.transcribe(sounds[1], return_timestamps=True) == timed[1]
    for each, found in zip(sounds, timed, strict=True):
        pieces = cut_at_pauses(model.read_medium(each).data, RATE, 1.0)
        said = [model.transcribe(mmtx.Audio(samples.numpy(), RATE)) for _, samples in pieces]
        times = [(round(first / RATE, 3), round((first + len(samples)) / RATE, 3)) for first, samples in pieces]
        assert found["chunks"] == [{"timestamp": time, "text": text} for time, text in zip(times, said, strict=True) if text]
    assert sum(passed) == pytest.approx(2.9, abs=0.01) and len(passed) > 2


def recording(seconds: float, rate: int = RATE) -> np.ndarray:
    """Noise (S, 2) with a pause of 0.3 s at the end of every two seconds, and in the second channel half as loud."""
    loud = np.random.default_rng(0).normal(size=round(seconds * rate)).astype(np.float32).clip(-3, 3) / 4
    loud[np.arange(len(loud)) / rate % 2 > 1.7] *= 0.01
    return np.stack([loud, loud / 2], 1)


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mp3", "bytes", "array", "row"])
def test_a_recording_of_any_length_is_transcribed(model, tmp_path, monkeypatch, form):
    """In windows, of which each ends in a pause: what is said is as if each were a sound of its own."""
    whole = recording(13.0)
    format = form if form in ("flac", "ogg", "mp3") else "wav"
    path = tmp_path / f"long.{format}"
    soundfile.write(path, whole, RATE)
    decoded, _ = read_sound(path.read_bytes(), "whole")
    for name in ("mmtx.data.sound_files", "mmtx.data.media"):
        monkeypatch.setattr(f"{name}.MAX_SECONDS", 5)
    monkeypatch.setattr("mmtx.data.media.WINDOW_END", 3)
    monkeypatch.setattr("mmtx.data.media.BLOCK", 5_000)
    monkeypatch.setattr("mmtx.data.sound_files.BLOCK", 5_000)
    (tmp_path / "rows.csv").write_text(f"audio\n{path}\n")
    rows = list(mmtx.find_media(tmp_path / "rows.csv", "audio"))
    given = {"bytes": mmtx.Audio(path.read_bytes()), "array": mmtx.Audio(decoded, RATE), "row": rows[0]}.get(form, path)
    windows = [*load_windows(path if form == "row" else getattr(given, "data", given), RATE)]
    begins = [begin for begin, _ in windows]
    assert len(windows) >= 3 and begins[0] == 0 and all(1.7 <= begin % 2 < 2 and begin == round(begin * RATE) / RATE for begin in begins[1:])
    places = [round(begin * RATE) for begin in begins] + [len(decoded)]
    for (_, samples), first, last in zip(windows, places[:-1], places[1:], strict=True):
        assert torch.equal(samples, load_audio(decoded[first:last], RATE))
    said = [model.transcribe(mmtx.Audio(samples.numpy(), RATE), chunk_length_s=1.0, return_timestamps=True) for _, samples in windows]
    found = model.transcribe(given, chunk_length_s=1.0, return_timestamps=True)
    assert [chunk["text"] for chunk in found["chunks"]] == [chunk["text"] for each in said for chunk in each["chunks"]]
    times = [begin + time for begin, each in zip(begins, said, strict=True) for chunk in each["chunks"] for time in chunk["timestamp"]]
    assert times and [time for chunk in found["chunks"] for time in chunk["timestamp"]] == pytest.approx(times, abs=2e-3)
    if form != "row":
        with pytest.raises(InputError, match="expected at most 5 seconds"):
            model.caption(given)


def film(path: Path, sound: np.ndarray | None) -> None:
    """A video of grey pictures, five a second, with a sound (S, 2) if there is one."""
    av = pytest.importorskip("av")
    codecs, rate, size = (("libvpx", "libopus"), 48_000, 960) if path.suffix == ".webm" else (("mpeg4", "aac"), RATE, 1024)
    with av.open(str(path), "w") as output:
        pictures = output.add_stream(codecs[0], rate=5)
        pictures.width = pictures.height = 32
        pictures.pix_fmt = "yuv420p"
        track = None if sound is None else output.add_stream(codecs[1], rate=rate, layout="stereo")
        for number in range(5 if sound is None else len(sound) * 5 // RATE):
            output.mux(pictures.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), number % 256, np.uint8), format="rgb24")))
        output.mux(pictures.encode())
        if track is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.T), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = RATE, 0
            for some in av.AudioResampler("fltp", "stereo", rate, frame_size=size).resample(frame):
                output.mux(track.encode(some))
            output.mux(track.encode())


@pytest.mark.parametrize("form", ["mp4", "mov", "mkv", "webm"])
def test_what_is_said_in_a_video_is_transcribed(model, tmp_path, monkeypatch, form):
    """As in a sound of the same samples. A caption of a video is refused, since it would be of its sound alone."""
    whole, path = recording(3.0), tmp_path / f"film.{form}"
    film(path, whole)
    ((begin, samples),) = load_windows(path, RATE)
    expected = load_audio(whole, RATE)
    assert begin == 0 and abs(len(samples) - len(expected)) < 0.2 * RATE
    found, spoken = (F.avg_pool1d(each[None, None, :round(2.8 * RATE)].abs(), 1600)[0, 0] for each in (samples, expected))
    assert torch.corrcoef(torch.stack([found, spoken]))[0, 1] > 0.95
    said = model.transcribe(path, chunk_length_s=1.0, return_timestamps=True)
    assert said == model.transcribe(mmtx.Audio(path.read_bytes()), chunk_length_s=1.0, return_timestamps=True)
    assert [*mmtx.transcribe_files(model, mmtx.find_media([path], "audio"), chunk_length_s=1.0)][0].caption == said["text"] != ""
    for given, told in ((path, "a video, expected a picture or a sound"), (tmp_path / f"silent.{form}", "0 sounds in one")):
        film(tmp_path / f"silent.{form}", None)
        with pytest.raises(InputError, match=told):
            (model.caption if given == path else model.transcribe)(given)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="cut short|damaged|no whole"):
        model.transcribe(path)


def test_a_short_recording_is_one_window(tmp_path):
    soundfile.write(tmp_path / "a.wav", recording(3.0, 44_100), 44_100)
    ((begin, samples),) = load_windows(tmp_path / "a.wav", RATE)
    assert begin == 0 and torch.equal(samples, load_audio(tmp_path / "a.wav", RATE))


@pytest.mark.parametrize("broken, told", [("cut", "cut short"), ("empty", "no samples in it"), ("rate", "500 Hz, expected 1000 to"),
                                          ("nan", "NaN or infinite samples"), ("none", "no such file"), ("text", "no sound that can be decoded")])
def test_what_is_wrong_with_a_recording_is_told(model, tmp_path, broken, told):
    path, whole = tmp_path / "a.wav", recording(1.0)
    if broken == "nan":
        whole[5] = np.nan
    if broken != "none":
        soundfile.write(path, whole[:0] if broken == "empty" else whole, 500 if broken == "rate" else RATE, subtype="FLOAT")
    if broken == "cut":
        path.write_bytes(path.read_bytes()[:-999])
    if broken == "text":
        path.write_text("a text")
    for given in (path, mmtx.Audio(path.read_bytes())) if broken not in ("none", "empty") else (path,):
        with pytest.raises(InputError, match=told):
            model.transcribe(given)


def test_what_cannot_be_transcribed_is_one_clear_error(model, tiny_model):
    with pytest.raises(InputError, match="item 2 of 2: found image, expected audio"):
        model.transcribe([sound(0.2), np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(InputError, match="this model does not transcribe: found ctc_blocks null in its config.json"):
        tiny_model.transcribe(sound(0.2))
    (part,) = asked(model, 0.2).turns[0].parts
    for given in (*model.encode_parts(["a red"]), replace(part, features=None)):
        with pytest.raises(InputError, match="found no sound with its features in the last user turn"):
            model.transcribe_documents([Document((Turn("user", (given,)),))])
    for given, told in (("ab", "documents: found str, expected a list of documents"), (5, "documents: found int"), (["a"], "found str, expected a Document")):
        with pytest.raises(InputError, match=told):
            model.transcribe_documents(given)
    with pytest.raises(InputError, match="this model does not transcribe"):
        list(mmtx.transcribe_files(tiny_model, ["a.wav"]))


def test_a_model_folder_says_behind_which_block(model, tmp_path):
    model.save(tmp_path / "model")
    assert mmtx.load(tmp_path / "model", device="cpu").transcribe(sound(0.5)) == model.transcribe(sound(0.5))


def wav(seconds: float, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(seconds, seed).data, RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def test_the_command_writes_down_files_with_the_model_for_speech(tmp_path, capsys):
    for number, seconds in enumerate((0.4, 0.9)):
        (tmp_path / f"{number}.wav").write_bytes(wav(seconds, number))
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as stop:
        cli.main(["transcribe", str(tmp_path), "--device", "cpu"])
    told = capsys.readouterr()
    expected = mmtx.load("demos/speech", device="cpu").transcribe([str(tmp_path / "0.wav"), str(tmp_path / "1.wav")])
    assert told.out.splitlines() == [f"{tmp_path / '0.wav'}\t{mmtx.escape(expected[0])}", f"{tmp_path / '1.wav'}\t{mmtx.escape(expected[1])}"]
    assert stop.value.code == 1 and "bad.wav: no sound that can be decoded" in told.err and "a.png" not in told.err


def test_transcripts_are_evaluated_with_the_model_for_speech(tmp_path, capsys):
    """As `mmtx transcribe` takes it; that of captions, which cannot transcribe, was taken."""
    (tmp_path / "a.wav").write_bytes(wav(0.4))
    (tmp_path / "a.txt").write_text("not said")
    cli.main(["evaluate", str(tmp_path), "--transcribe", "--device", "cpu"])
    assert "character error rate" in capsys.readouterr().out


def test_the_command_with_a_model_of_captions_is_one_line(tmp_path, capsys):
    (tmp_path / "a.wav").write_bytes(wav(0.4))
    with pytest.raises(SystemExit) as stop:
        cli.main(["transcribe", str(tmp_path / "a.wav"), "--model", "demos/starter"])
    assert stop.value.code == 2 and "this model does not transcribe" in capsys.readouterr().err


def test_the_server_transcribes_and_captions_where_a_request_says_how_to_choose(model):
    medium = mmtx.Audio(wav(0.9, 5))
    with TestClient(make_app({"tiny": model}, Limits(tokens=400)), base_url="http://127.0.0.1") as client:
        ask = lambda **more: client.post("/v1/audio/transcriptions", files={"file": ("a.wav", medium.data)}, data={"model": "tiny", **more})
        assert ask().json() == {"text": model.transcribe(medium)}
        assert ask(response_format="text").text == model.transcribe(medium)
        assert ask(temperature="0", top_p="1").json() == ask().json()  # the defaults
        assert ask(top_p="2").json()["error"]["message"] == "top_p: found 2.0, expected a number in (0, 1]"
        assert ask(max_tokens="256").json() == {"text": model.caption(medium)} != ask().json()
        drawn = {"text": model.caption(medium, temperature=1.0, seed=3, max_new_tokens=256)}
        assert ask(temperature="1", seed="3").json() == drawn != ask().json()


def test_a_transcript_needs_no_room_for_the_whole_sound(model):
    """Which is cut into pieces; a caption reads all of it at once."""
    medium = mmtx.Audio(wav(9.0, 5))
    with TestClient(make_app({"tiny": model}, Limits(tokens=400, seconds=10)), base_url="http://127.0.0.1") as client:
        ask = lambda data, **more: client.post("/v1/audio/transcriptions", files={"file": ("a.wav", data)}, data={"model": "tiny", **more})
        assert ask(medium.data).json() == {"text": model.transcribe(medium)}
        captioned = ask(medium.data, max_tokens="1")
        assert (captioned.status_code, captioned.json()["error"]["code"]) == (400, "context_length_exceeded")
        refused = ask(wav(10.5))
        assert refused.status_code == 400 and "expected up to 10 s" in refused.json()["error"]["message"]


@pytest.mark.parametrize("route", ["/v1/audio/transcriptions", "/demo/transcribe"])
def test_a_transcript_that_takes_too_long_is_refused_in_time(model, route, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(type(model), "transcribe", lambda *given, **options: over.wait(60) and "late")
    app = make_app({"tiny": model}, Limits(timeout=2))
    add_page(app)
    if route.startswith("/v1"):
        given: dict = {"files": {"file": ("a.wav", wav(0.9))}, "data": {"model": "tiny"}}
    else:
        sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav(0.9)).decode(), "format": "wav"}}
        given = {"json": {"model": "tiny", "sound": sound}}
    with TestClient(app, base_url="http://127.0.0.1") as client:
        answer = client.post(route, **given)
        over.set()
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


def test_a_report_of_transcripts_and_captions(model, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.wav").write_bytes(wav(0.9, number))
        (tmp_path / f"{number}.txt").write_text("a sound")
    source = DataSource([str(tmp_path)])
    names = [str(tmp_path / f"{number}.wav") for number in range(3)]
    for transcribe, answer in ((True, model.transcribe), (False, model.caption)):
        (section,) = report(model, [source], [], show=0, transcribe=transcribe)
        errors, characters = character_errors(answer(names), ["a sound"] * 3)
        rate = next(line for line in section.splitlines() if "character error rate" in line)
        assert f" {sum(errors) / sum(characters):.3f} " in rate


def test_a_model_begins_from_one_with_ctc_and_without(model, tmp_path):
    """Nothing is built for it, so it may come and go; a run that goes on must be as it was."""
    model.save(tmp_path / "model")
    folders = TokenizerFolders(*(str(tmp_path / "model" / kind) for kind in ("text", "image", "audio")))
    for ctc, found in ((None, None), (CTCConfig(2), 2), (CTCConfig(1), 1)):
        module = DecoderModule(replace(model.decoder.config, vocabulary_size=0, composed=(), features={}, ctc_blocks=None), ctc=ctc,
                               continuous_inputs=True, init_from=str(tmp_path / "model"), tokenizers=folders)
        module._trainer = SimpleNamespace(datamodule=None)
        module.configure_model()
        assert module.decoder.config.ctc_blocks == module.config.ctc_blocks == found


@pytest.mark.slow
def test_transcripts_of_the_model_for_speech_are_better_than_its_captions():
    model = mmtx.load("demos/speech", device="cpu")
    samples = read_source(DataSource([str(runs.STARTER / "speech-synthetic-test-sentences.tar.gz")], limit=50))
    documents = to_documents(samples, model.tokenizers, patches=model.decoder.config.encoders)
    true = [sample.caption for sample in samples]
    rates = [sum(errors) / sum(counts) for errors, counts in (character_errors(said, true) for said in (
        model.caption_documents(documents), model.transcribe_documents(documents)))]
    assert rates[1] < min(0.11, 0.9 * rates[0])


@pytest.mark.slow
def test_a_talk_is_transcribed_sentence_by_sentence():
    model = mmtx.load("demos/speech", device="cpu")
    samples = read_source(DataSource([str(runs.STARTER / "speech-synthetic-test-sentences.tar.gz")], limit=24))
    sounds = [part for sample in samples for turn in sample.turns for part in turn.parts if isinstance(part, Media)]
    pause = np.zeros(round(0.4 * RATE), np.float32)
    talk = np.concatenate([part for medium in sounds for part in (load_audio(medium.source.read(), RATE).numpy(), pause)])
    true = " ".join(sample.caption for sample in samples)
    rates = [sum(errors) / sum(counts) for errors, counts in (character_errors([said], [true]) for said in (
        model.transcribe(mmtx.Audio(talk, RATE)), model.transcribe(mmtx.Audio(talk, RATE), chunk_length_s=600)))]
    assert rates[0] < 0.2 and rates[1] > 3 * rates[0]
