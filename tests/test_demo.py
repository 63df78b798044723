"""The demo: captions on the terminal, and a page that shows them, whatever is wrong with a file or ends the run."""

import itertools
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import fresh
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import mmtx
from mmtx.data.media import load_audio
from mmtx.document import Document, Turn
from mmtx.inference.transcription import hear
from mmtx.sequence import prompt

DEMO = Path(__file__).parents[1] / "demos" / "caption.py"


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    tiny_model.save(folder / "model")
    (folder / "media").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "<b>&.png"):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "media" / name)
    soundfile.write(folder / "media" / "c.wav", 0.5 * rng.standard_normal(4000).clip(-1, 1), 16_000)
    (folder / "media" / "broken.png").write_bytes((folder / "media" / "a.png").read_bytes()[:60])
    return folder


def run(folder: Path, *arguments: str, demo: str = "caption.py") -> tuple[int, str, str]:
    """Exit status and what is printed."""
    done = fresh.script(DEMO.with_name(demo), *arguments, "--model", "model", cwd=folder, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_the_page_shows_all_files_and_names_the_bad_one(folder):
    status, out, err = run(folder, "media")
    names = ["media/<b>&.png", "media/a.png", "media/c.wav"]
    model = mmtx.load(folder / "model", device="cpu")
    assert out == "".join(f"{name}\t{mmtx.escape(model.caption(folder / name))}\n" for name in names)
    assert status == 1
    assert err.splitlines()[0].startswith("error: media/broken.png: not a whole picture") and err.count("\n") == 2
    page = (folder / "captions.html").read_text()
    assert re.findall(r"<small[^>]*>([^<]*)</small>", page) == ["&lt;b&gt;&amp;.png", "a.png", "c.wav"]
    assert page.count('src="data:image/png') == 3 and page.count('src="data:audio/wav') == 1  # a spectrogram among them
    assert "2 pictures and 1 sound, captioned by" in page
    assert "<li>media/broken.png: not a whole picture" in page


def test_what_is_captioned_is_on_the_page_when_ctrl_c_ends_the_run(folder):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(100)
        silent = f"http://127.0.0.1:{server.getsockname()[1]}/picture.png"
        # The folder that is empty ends a group, so that what is before it is captioned first.
        (folder / "empty").mkdir()
        command = [sys.executable, DEMO, "media/a.png", "empty", silent, "--page", "interrupted.html", "--model", "model"]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            asking, _ = server.accept()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
            asking.close()
        finally:
            process.kill()
    assert out.startswith("media/a.png\t") and process.returncode == 1
    assert "Traceback" not in err
    page = (folder / "interrupted.html").read_text()
    assert page.count("<figure>") == 1 and "interrupted: the files that follow have no captions" in page


def test_a_page_that_cannot_be_written_is_told_before_any_work(folder):
    status, out, err = run(folder, "media/a.png", "--page", "nowhere/page.html")
    assert (status, out) == (2, "") and "cannot be written" in err


@pytest.mark.parametrize(("script", "mine", "other", "told"), [
    ("image_captioning.py", ["media/<b>&.png", "media/a.png"], "media/c.wav", "media/c.wav: found audio, expected image"),
    ("audio_captioning.py", ["media/c.wav"], "media/a.png", "media/a.png: found image, expected audio")])
def test_a_script_for_one_kind_captions_that_and_names_the_rest(folder, script, mine, other, told):
    status, out, err = run(folder, "media", other, "nothing.png", demo=script)
    model = mmtx.load(folder / "model", device="cpu")
    assert out == "".join(f"{name}\t{mmtx.escape(model.caption(folder / name))}\n" for name in mine)
    assert status == 1 and f"error: {told}\nerror: nothing.png: no such file or folder\n" in err
    assert ("media/broken.png: not a whole picture" in err) == (script == "image_captioning.py") and "Traceback" not in err


def test_what_words_read_of_a_picture_is_drawn(folder):
    pytest.importorskip("matplotlib")
    status, _, err = run(folder, "media/a.png", "--attention", "read.png", demo="image_captioning.py")
    assert (status, err) == (0, "")
    assert np.asarray(Image.open(folder / "read.png").convert("L")).std() > 5


def test_a_verb_is_drawn_in_both_sentences(folder):
    pytest.importorskip("matplotlib")
    status, out, err = run(folder, "--pairs", "1", "--plot", "dog.png", "cat.png", demo="attention.py")
    assert (status, err) == (0, "")
    layer, head = map(int, re.match(r"layer (\d+) of 0 to 1, head (\d+) of", out).groups())
    model = mmtx.load(folder / "model", device="cpu")
    for sentence, name in (("The dog that chased the cat was tired.", "dog.png"), ("The dog chased the cat that was tired.", "cat.png")):
        found = model.attention("", sentence)
        found.plot(folder / "expected.png", layer, head, places=[place for word in found.words for place in word.places])
        assert np.array_equal(*(np.asarray(Image.open(folder / each)) for each in ("expected.png", name)))


def test_a_sound_is_captioned_piece_by_piece(folder):
    status, out, err = run(folder, "media/c.wav", "--every", "0.1", demo="audio_captioning.py")
    samples, rate = soundfile.read(folder / "media" / "c.wav", dtype="float32")
    model = mmtx.load(folder / "model", device="cpu")
    whole = load_audio(samples, model.tokenizers["audio"].rate, source_rate=rate)
    pieces = whole.split(model.tokenizers["audio"].rate // 10)
    captions = model.caption([mmtx.Audio(piece) for piece in pieces])
    assert (out, err) == ("".join(f"media/c.wav {n / 10:g}s\t{mmtx.escape(caption)}\n" for n, caption in enumerate(captions)), "")
    assert len(pieces) == 3 and status == 0


def test_the_head_of_a_verb_is_chosen_and_judged_by_different_animals(folder):
    status, out, err = run(folder, "--pairs", "3", demo="attention.py")
    assert (status, err) == (0, "")
    head, *lines = out.splitlines()
    layer, number = map(int, re.match(r"layer (\d+) of 0 to 1, head (\d+) of 0 to 3; 3 sentences", head).groups())
    model = mmtx.load(folder / "model", device="cpu")

    def read(animals: list[tuple[str, str]], sentence: str) -> np.ndarray:
        """What "was" reads of the last pieces of the nouns, by sentence, layer and head."""
        told = []
        for first, second in animals:
            found = model.attention("", sentence.format(first, second))
            places = {word.text.strip(" ."): word.places[-1] for word in found.words}
            told.append(found.weights[:, :, places["was"]][:, :, [places[first], places[second]]].numpy())
        return np.stack(told)

    pairs = [random.Random(0).sample(list(itertools.permutations(animals, 2)), 3) for animals in (
        ("dog", "cat", "fox", "horse", "goat", "bear", "wolf", "cow"), ("lion", "rabbit", "mouse", "pig", "duck", "sheep", "tiger", "bird"))]
    margins = np.subtract(*np.moveaxis(read(pairs[0], "The {} that chased the {} was tired.").mean(0), -1, 0))
    assert margins[layer, number] == pytest.approx(margins.max())
    judged = read(pairs[1], "The {} chased the {} that was tired.")[:, layer, number]
    found = re.search(r"this head +A ([\d.e-]+), B ([\d.e-]+); A more than B: ([\d.]+)", lines[5])
    assert [float(word) for word in found.groups()] == pytest.approx([*judged.mean(0), (judged[:, 0] > judged[:, 1]).mean()], rel=0.06)


def test_the_mean_of_models_has_the_mean_of_their_weights(folder, tiny_model):
    other = mmtx.load(folder / "model", device="cpu")
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in other.decoder.parameters():
            weight.add_(torch.randn_like(weight))
    other.save(folder / "other")
    average = DEMO.with_name("average.py"), "model", "other"
    done = fresh.script(*average, "model", "--output", "mean", cwd=folder, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    mean, weights = mmtx.load(folder / "mean", device="cpu"), other.decoder.state_dict()
    for name, weight in tiny_model.decoder.state_dict().items():
        assert torch.allclose(mean.decoder.state_dict()[name], (2 * weight + weights[name]) / 3, atol=1e-6), name
    again = fresh.script(*average, "model", "--output", "mean", cwd=folder, timeout=120)
    assert (again.returncode, again.stderr) == (1, "average.py: error: mean: exists, expected a new folder\n")
    refused = fresh.script(average[0], "model", DEMO.with_name("generate"), "model", "--output", "none", cwd=folder, timeout=120)
    assert refused.returncode == 1 and "found another decoder or other tokenizers than in model" in refused.stderr
    assert refused.stderr.count("\n") == 1 and not (folder / "none").exists()


def test_a_deeper_model_answers_as_the_one_it_is_made_of(tmp_path):
    deepen = DEMO.with_name("deepen.py")
    done = fresh.script(deepen, DEMO.with_name("starter"), "--depth", "7", "--output", "deeper", cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    old, deeper = mmtx.load(DEMO.with_name("starter"), device="cpu"), mmtx.load(tmp_path / "deeper", device="cpu")
    ids = torch.randint(1000, (2, 30), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(30).expand(2, -1)
    with torch.no_grad():
        assert torch.equal(deeper.decoder(ids, positions), old.decoder(ids, positions))
    assert deeper.decoder.config.depth == len(deeper.decoder.blocks) == 7
    fresh.script(deepen, DEMO.with_name("speech"), "--depth", "12", "--output", "hears", cwd=tmp_path, timeout=120).check_returncode()
    heard = []
    for folder in (DEMO.with_name("speech"), tmp_path / "hears"):
        model = mmtx.load(folder, device="cpu")
        (part,) = model.encode_parts([mmtx.Audio(DEMO.with_name("examples") / "speech.ogg")])
        asked = prompt(Document((Turn("user", (part,)),)), model.vocabulary)
        heard.append(hear(model.decoder, asked, model.vocabulary).scores)
    assert torch.equal(*heard)  # what CTC hears is the same, too
    new = [block for block in deeper.decoder.blocks if not block.feed_forward.down.weight.any()]
    assert len(new) == 3 and all(block.attention.qkv.weight.any() for block in new)
    refused = fresh.script(deepen, DEMO.with_name("starter"), "--depth", "4", "--output", "none", cwd=tmp_path, timeout=120)
    assert refused.returncode == 1 and refused.stderr.startswith("deepen.py: error: --depth: found 4, expected more than the 4 blocks")
    assert refused.stderr.count("\n") == 1 and not (tmp_path / "none").exists()
