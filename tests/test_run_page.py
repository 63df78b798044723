"""`mmtx report`: the page of a run says what its files say, whatever stands in them, and needs nothing beside it."""

import base64
import html
import io
import re
from html import unescape

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

import mmtx
from mmtx.cli import main
from mmtx.run_page import POINTS, downsampled, read_curves, run_page


@pytest.fixture
def run(tiny_model, tmp_path):
    """The folder of a run, as mmtx fit leaves it."""
    folder = tmp_path / "a <b>run</b>"
    (folder / "metrics").mkdir(parents=True)
    (folder / "samples").mkdir()
    rows = ["epoch,step,train/loss,val/loss,val/acc", "0,0,5.5,,", "0,1,4.25,,", "0,1,,4.0,0.125", "0,2,nan,,", "0,3,3.5,,", "0,3,,3.75,0.5"]
    (folder / "metrics" / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "metrics" / "config.yaml").write_text("seed_everything: 7\n")
    for step in (1, 3):
        (folder / "samples" / f"step-{step:06d}.txt").write_text(f"'<script>alert({step})</script>' 'cat \u202e'\n")
        Image.new("RGB", (9, 9), (step, 0, 0)).save(folder / "samples" / f"step-{step:06d}.png")
    tiny_model.save(folder / "model")
    return folder


def test_curves_are_the_columns_without_blanks(run):
    assert read_curves(run / "metrics" / "metrics.csv") == {
        "train/loss": [(0, 5.5), (1, 4.25), (3, 3.5)], "val/loss": [(1, 4.0), (3, 3.75)], "val/acc": [(1, 0.125), (3, 0.5)]}


def test_the_page_shows_the_run(run, capsys):
    main(["report", str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    assert "<b>run</b>" not in page and "<script>" not in page and "\u202e" not in page
    assert not re.search(r"(?:src|href|url)[=(]\W?https?:", page)
    text = unescape(re.sub("<[^>]+>", " ", page))
    assert "'<script>alert(3)</script>'" in text and "alert(1)" not in text and "seed_everything: 7" in text
    assert re.search(r"val/loss\s+3\.75\s+3\.75\s+4\s+3\s", text) and re.search(r"val/acc\s+0\.5\s+0\.125\s+0\.5\s+3\s", text)
    assert page.count("<figure>") == 2 and page.count("<polyline") == 3 and page.count("<img") == 1
    # The curve of train/loss: steps 0, 1, 3 from the left to the right, 5.5 at the top, 3.5 at the bottom.
    points = re.search(r'points="([^"]+)"><title>train/loss', page)[1].split()
    assert points == ["8.0,16.0", "142.7,88.5", "412.0,132.0"]
    assert "<h3>Loss</h3>" in page and "<h3>Other figures</h3>" in page and "Codebook" not in page


def test_the_page_plays_sounds_and_says_where_the_run_came_from(run):
    rate, time = 16_000, np.arange(16_000) / 16_000
    for row, tone in ((0, 1000), (1, 4000)):
        soundfile.write(run / "samples" / f"step-000003-{row:02d}.ogg", 0.5 * np.sin(2 * np.pi * tone * time), rate)
    soundfile.write(run / "samples" / "step-000001-00.ogg", np.zeros(100), rate)  # of an earlier validation
    rows = ["predicted true", """'tone' "it's a tone\\x1b" """, "'<b>'          '<b>'"]
    (run / "samples" / "step-000003.txt").write_text("\n".join(rows) + "\n")
    (run / "metrics" / "environment.json").write_text('{"commit": "<abc>", "device": "cpu", "torch": null}')
    page = run_page(run)
    assert "Made with commit &lt;abc&gt;, device cpu." in page
    sounds = re.findall(r'alt="spectrogram" src="data:image/png;base64,([^"]+)"><audio [^>]*src="data:audio/ogg;base64,([^"]+)"></audio>'
                        r"<figcaption>(.*?)</figcaption>", page)
    assert [told for _, _, told in sounds] == [
        '<b class="wrong">tone</b><br>it&#x27;s a tone\\x1b', '<b class="right">&lt;b&gt;</b><br>&lt;b&gt;']
    for (shown, data, _), tone in zip(sounds, (1000, 4000)):
        assert base64.b64decode(data) == (run / "samples" / f"step-000003-{int(tone == 4000):02d}.ogg").read_bytes()
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown)))).astype(float)
        loudest = pixels[:, 100:300].mean(1).argmax()
        assert abs(loudest - (1 - tone / 8000) * len(pixels)) <= 2   # low tones below
    (run / "samples" / "step-000003-00.ogg").write_bytes(b"noise")
    with pytest.raises(mmtx.InputError, match=r"step-000003-00\.ogg: not a sound that can be read"):
        run_page(run)


def test_the_last_samples_are_those_of_the_highest_number(run):
    for step in (999_999, 1_000_000):
        (run / "samples" / f"step-{step:06d}.txt").write_text(f"said at {step}\n")
        soundfile.write(run / "samples" / f"step-{step:06d}-00.ogg", np.zeros(100), 16_000)
    page = run_page(run)
    assert "Sounds at step 1000000" in page and "said at 1000000" in page and "999999" not in page


def test_figures_beside_controls_are_part_of_the_page(run, tiny_model, tmp_path, capsys):
    """`--evaluate` says what `mmtx evaluate` says of the run's own configuration, and later reports say it again."""
    random = np.random.default_rng(0)
    for split in ("train", "held-out"):
        (tmp_path / split).mkdir()
        for number in range(4):
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / split / f"{number}.png")
            (tmp_path / split / f"{number}.txt").write_text(f"caption {number}")
    data = {name: [{"paths": [str(tmp_path / split)]}] for name, split in (("train", "train"), ("validation", "held-out"))}
    (run / "metrics" / "config.yaml").write_text(yaml.safe_dump(
        {"model": {"init_args": {}}, "data": {"init_args": {"tokenizers": {}, **data}}}))
    main(["report", str(run), "--evaluate", "--device", "cpu"])
    out = capsys.readouterr().out.splitlines()
    assert out == [str(run / "evaluation.txt"), str(run / "report.html")]
    main(["evaluate", "--config", str(run / "metrics" / "config.yaml"), "--model", str(run / "model"), "--show", "16", "--device", "cpu"])
    told = capsys.readouterr().out
    assert (run / "evaluation.txt").read_text() == told.strip("\n") + "\n" and "strongest control" in told
    assert re.search(r"exact caption +\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\] +\d\.\d{3} \[", told)
    first = (run / "report.html").read_text()
    assert html.escape(told.strip()) in first and "Held-out figures beside controls" in first
    main(["report", str(run)])
    assert (run / "report.html").read_text() == first


def test_the_control_does_without_training_samples_that_are_prepared(run, tmp_path, capsys):
    for split, number in (("train", 0), ("held-out", 1)):
        (tmp_path / split).mkdir()
        Image.new("RGB", (16, 16), (9 * number, 0, 0)).save(tmp_path / split / "a.png")
        (tmp_path / split / "a.txt").write_text("a caption")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "plan.json").write_text("{}")
    sources = {"train": ["shards", "train"], "validation": ["held-out"]}
    data = {name: [{"paths": [str(tmp_path / path)]} for path in paths] for name, paths in sources.items()}
    (run / "metrics" / "config.yaml").write_text(yaml.safe_dump(
        {"model": {"init_args": {}}, "data": {"init_args": {"tokenizers": {}, **data}}}))
    main(["report", str(run), "--evaluate", "--device", "cpu"])
    told = (run / "evaluation.txt").read_text()
    assert told.startswith(f"left out of the control: {tmp_path / 'shards'} (shards of mmtx prepare")
    assert re.search(r"exact caption +\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\] +1\.000 \[", told)


def test_a_long_curve_is_thinned_to_means():
    curve = [(float(step), float(step % 2)) for step in range(8 * POINTS + 3)]
    found = downsampled(curve)
    assert len(found) <= POINTS and found[0] == (4.0, 4 / 9) and found[-1] == curve[-1]
    assert downsampled(curve[:5]) == curve[:5]


def test_a_run_that_has_not_ended_and_files_that_are_none(run, tmp_path, capsys):
    (run / "model").rename(tmp_path / "elsewhere")
    assert "the run has not ended" in run_page(run)
    (run / "metrics" / "metrics.csv").write_text("epoch,step,val/loss\n0,1,many\n")
    with pytest.raises(mmtx.InputError, match=r"row 2, val/loss: found 'many' at step '1', expected numbers"):
        run_page(run)
    for options, told in (([str(tmp_path)], "expected the output folder of mmtx fit"),
                          ([str(run), "--file", str(tmp_path / "no" / "a.html")], "")):
        with pytest.raises(SystemExit) as stop:
            main(["report", *options])
        assert stop.value.code == 2 and told in capsys.readouterr().err
