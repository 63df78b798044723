"""Transcripts with times: subtitles as their specifications have them, and the files and responses that hold them."""

import json

import numpy as np
import pytest
import soundfile
from starlette.testclient import TestClient

import mmtx
from mmtx import cli
from mmtx.serving.app import make_app
from mmtx.subtitles import FORMATS, srt, vtt

RATE = 16_000
CHUNKS = [{"timestamp": (0.5, 59.9996), "text": "It's <late> & cold."}, {"timestamp": (3725.04, 36000.0), "text": "Grüße"}]


def test_srt():
    assert srt(CHUNKS) == ("1\n00:00:00,500 --> 00:01:00,000\nIt's <late> & cold.\n\n"
                           "2\n01:02:05,040 --> 10:00:00,000\nGrüße\n")
    assert srt([]) == ""


def test_vtt():
    """In WebVTT, & and < must be escaped, and an arrow must not be in a text: https://www.w3.org/TR/webvtt1/"""
    assert vtt(CHUNKS) == ("WEBVTT\n\n00:00:00.500 --> 00:01:00.000\nIt's &lt;late&gt; &amp; cold.\n\n"
                           "01:02:05.040 --> 10:00:00.000\nGrüße\n")
    assert vtt([]) == "WEBVTT\n"


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Two sentences, six seconds apart."""
    folder = tmp_path_factory.mktemp("talk")
    (spoken, rate), (pause, _) = soundfile.read("demos/examples/speech.ogg", dtype="float32"), (np.zeros(6 * RATE, np.float32), RATE)
    assert rate == RATE
    soundfile.write(folder / "talk.wav", np.concatenate([spoken, pause, spoken]), RATE)
    return folder / "talk.wav"


@pytest.fixture(scope="module")
def transcript(talk):
    return mmtx.load("demos/speech", device="cpu").transcribe(talk, return_timestamps=True)


def test_each_sentence_has_its_time(transcript):
    first, second = transcript["chunks"][0]["timestamp"][0], transcript["chunks"][-1]["timestamp"][1]
    gaps = [after["timestamp"][0] - before["timestamp"][1] for before, after in zip(transcript["chunks"], transcript["chunks"][1:])]
    assert first < 1 and second > 6 and 5.5 < max(gaps) < 7


@pytest.mark.parametrize("form", FORMATS)
def test_the_command_writes_a_file_for_each_sound(talk, transcript, tmp_path, capsys, form):
    cli.main(["transcribe", str(talk), "--output_dir", str(tmp_path / "new" / "texts"), "--output_format", form, "--device", "cpu"])
    assert capsys.readouterr().out == mmtx.escape(transcript["text"]) + "\n"
    (path,) = (tmp_path / "new" / "texts").iterdir()
    assert path.name == f"talk.{form}" and path.read_text("utf-8") == FORMATS[form](transcript)
    if form == "json":
        assert json.loads(path.read_text("utf-8"))["chunks"][0]["text"] == transcript["chunks"][0]["text"]


def test_what_has_no_place_of_its_own_is_one_line(talk, tmp_path, capsys):
    (tmp_path / "talk.ogg").write_bytes(b"")
    (tmp_path / "rows.csv").write_text(f"audio\n{talk}\n")
    (tmp_path / "file").write_text("")
    for given, folder, told in (([talk, tmp_path / "talk.ogg"], "a", "whose transcripts would both be"),
                                ([tmp_path / "rows.csv"], "b", "a sound of a row, expected files"), ([talk], "file", "cannot be made")):
        with pytest.raises(SystemExit) as stop:
            cli.main(["transcribe", *map(str, given), "--output_dir", str(tmp_path / folder), "--device", "cpu"])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith("mmtx: error: ") and told in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "rows.csv", "talk.ogg"]
    with pytest.raises(SystemExit):
        cli.main(["transcribe", str(talk), "--output_format", "vtt", "--device", "cpu"])
    assert "--output_format: found vtt without --output_dir, expected both" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["txt", "json"])
def test_the_caption_beside_a_sound_is_not_replaced(talk, tmp_path, capsys, form):
    (tmp_path / "a.wav").write_bytes(talk.read_bytes())
    (tmp_path / f"a.{form}").write_text('{"text": "a caption"}')
    with pytest.raises(SystemExit) as stop:
        cli.main(["transcribe", str(tmp_path), "--output_dir", str(tmp_path), "--output_format", form, "--device", "cpu"])
    assert stop.value.code == 2 and "which may be its caption; expected another folder" in capsys.readouterr().err
    assert (tmp_path / f"a.{form}").read_text() == '{"text": "a caption"}'


def test_the_server_answers_with_times(talk, transcript):
    model = mmtx.load("demos/speech", device="cpu")
    with TestClient(make_app({"speech": model}), base_url="http://127.0.0.1") as client:
        ask = lambda **more: client.post("/v1/audio/transcriptions", files={"file": ("a.wav", talk.read_bytes())},
                                         data={"model": "speech", **more})
        assert ask(response_format="srt").text == srt(transcript["chunks"])
        assert ask(response_format="vtt").text == vtt(transcript["chunks"])
        told = ask(response_format="verbose_json", **{"timestamp_granularities[]": "segment"}).json()
        assert told["text"] == transcript["text"] and told["duration"] == pytest.approx(soundfile.info(talk).duration, abs=2e-3)
        assert [((part["start"], part["end"]), part["text"]) for part in told["segments"]] == [
            (tuple(chunk["timestamp"]), chunk["text"]) for chunk in transcript["chunks"]]
        assert ask(response_format="verbose_json", **{"timestamp_granularities[]": "word"}).status_code == 400
        captioned = ask(response_format="srt", max_tokens="8").text
        assert captioned.startswith("1\n00:00:00,000 --> 00:00:") and captioned.count("-->") == 1
