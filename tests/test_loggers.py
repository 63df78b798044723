"""Where the numbers of a run go: metrics.csv always, TensorBoard by default, and whatever else `--trainer.logger` names."""

import csv
import json
import logging
import re
import struct
import subprocess
from pathlib import Path

import pytest
import runs
import soundfile
import torch
import yaml
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from test_output import room

import mmtx
from mmtx.errors import InputError
from mmtx.run_page import run_page
from mmtx.training.callbacks import contact_sheet
from mmtx.training.decoder import DecoderModule
from mmtx.training.loggers import EventFile, Metrics, TensorBoard
from mmtx.training.run import command_line, main

START = 1  # of SessionLog


def events(folder: Path) -> list[Event]:
    """What a folder's event files say, oldest first, each record's checksums compared."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,), (check,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
            body, (tail,) = data[12:12 + size], struct.unpack("<I", data[12 + size:16 + size])
            assert (check, tail) == (masked_crc32c(data[:8]), masked_crc32c(body))
            found.append(Event.FromString(body))
            data = data[16 + size:]
    return found


def shown(folder: Path) -> dict[tuple[str, int], float | str]:
    """What a viewer shows: a new start drops what was said of its step and later ones."""
    found = {}
    for event in events(folder):
        if event.session_log.status == START:
            found = {(name, step): value for (name, step), value in found.items() if step < event.step}
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            found[value.tag, event.step] = value.simple_value if kind == "simple_value" else kind
    return found


def table(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def numbers(run: Path) -> dict[tuple[str, int], float]:
    """metrics.csv by name and step."""
    return {(name, int(row["step"])): float(value) for row in table(run) for name, value in row.items()
            if value and name != "step"}


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    return {key: value for key, value in shown(folder).items() if isinstance(value, float)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("loggers")


@pytest.fixture(scope="module")
def fit(root):
    """Run a tiny decoder for four steps -> its folder."""
    config = runs.prepare(root, steps=4)
    config["data"]["init_args"]["num_workers"] = 0
    (root / "config.yaml").write_text(yaml.safe_dump({"output": "overridden", **config}))

    def fit(name: str, *more: str) -> Path:
        main("fit", ["--config", str(root / "config.yaml"), "--output", str(root / name), *more])
        return root / name

    return fit


@pytest.fixture(scope="module")
def whole(fit):
    return fit("whole")


def test_tensorboard_shows_what_the_metrics_say(whole):
    expected = numbers(whole)
    assert {"train/loss", "val/loss", "lr-Muon/pg1"} <= {name for name, _ in expected} and len(expected) > 30
    assert scalars(whole / "tensorboard") == pytest.approx(expected, rel=1e-6)


def test_a_step_with_a_checkpoint_is_logged_once(whole):
    assert (whole / "checkpoints" / "step-000000002.ckpt").is_file()
    said = [(value.tag, event.step) for event in events(whole / "tensorboard") for value in event.summary.value
            if value.tag != "epoch"]  # which validations tell as well
    assert len(said) == len({*said})
    trained = [row["step"] for row in table(whole) if row["train/loss"]]
    assert trained == ["0", "1", "2", "3"]


def test_tensorboard_has_the_samples(whole):
    found = events(whole / "tensorboard")
    (text,) = (value.tensor.string_val[0].decode() for event in found for value in event.summary.value if value.HasField("tensor"))
    lines = (whole / "samples" / "step-000003.txt").read_text().splitlines()
    assert [line.removeprefix("    ") for line in text.split("\n")] == lines and len(lines) > 1
    (picture,) = (value.image for event in found for value in event.summary.value if value.HasField("image"))
    import io

    import numpy as np
    from PIL import Image

    sheet = Image.open(whole / "samples" / "step-000003.png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))), np.asarray(sheet))


def test_a_log_gets_a_line_for_each_step_and_sounds_can_be_heard(fit, monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    folder = fit("log", "--trainer.enable_progress_bar", "true", "--samples", "10")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "\r" not in out + err and "\x1b" not in out and "%|" not in err
    told = [re.fullmatch(r"step (\d) of 4: (?:(train)/loss ([\d.]+), [\d.e+]+ steps/s|(val)/loss_\w+ .*)", line) for line in lines]
    assert [(one[1], one[2] or one[4]) for one in told] == [
        ("1", "train"), ("2", "train"), ("3", "train"), ("3", "val"), ("4", "train")]
    losses = [float(row["train/loss"]) for row in table(folder) if row["train/loss"]]
    assert [float(one[3]) for one in told if one[3]] == pytest.approx(losses, rel=1e-3)

    rows = (folder / "samples" / "step-000003.txt").read_text().splitlines()[1:]
    notes = [number for number, row in enumerate(rows) if re.search(r"[A-G]( sharp)? -?\d'$", row)]
    assert len(rows) == 10 and len(notes) == 4
    assert sorted(path.name for path in folder.glob("samples/*.ogg")) == [f"step-000003-{number:02d}.ogg" for number in notes]
    sound, rate = soundfile.read(folder / "samples" / f"step-000003-{notes[0]:02d}.ogg")
    assert rate == 16_000 and 1 < len(sound) / rate < 3 and sound.std() > 0

    page = run_page(folder)
    assert page.count("<audio") == page.count('alt="spectrogram"') == 4 and page.count('alt="samples"') == 1
    assert all(f"<h3>{section}</h3>" in page for section in ("Loss", "Loss by modality", "Gradients and stability", "Schedule and batches"))

    monkeypatch.setenv("TQDM_DISABLE", "1")
    fit("silent", "--trainer.enable_progress_bar", "true", "--trainer.max_steps", "1")
    assert capsys.readouterr().out == ""


def test_a_run_without_standard_output(fit, monkeypatch):
    """Of which Python makes none if the shell closed it, as in `mmtx fit ... >&-`."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr("sys.stdout", None)
    assert (fit("closed", "--trainer.enable_progress_bar", "true", "--trainer.max_steps", "1") / "model").is_dir()


def test_callbacks_and_profilers_that_are_asked_to_speak_do(fit):
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss", "verbose": True}}
    try:
        fit("loud", "--trainer.callbacks", json.dumps([stopping]), "--trainer.profiler", "simple")
    finally:
        logger.removeHandler(handler)
    told = "\n".join(told)
    assert "Metric val/loss improved" in told and "FIT Profiler Report" in told
    assert "GPU available" not in told and "weights_only" not in told


def test_a_run_tells_what_it_was_made_with(whole):
    facts = json.loads((whole / "metrics" / "environment.json").read_text())
    made = subprocess.run(["git", "-C", Path(mmtx.__file__).parents[1], "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (facts["commit"] or "").split(" ")[0] == made.stdout.strip()
    assert (facts["mmtx"], facts["torch"], facts["device"], facts["processes"]) == (mmtx.__version__, torch.__version__, "cpu", 1)


@pytest.fixture(scope="module")
def resumed(fit, whole):
    """A run that breaks in its fourth step, after the validation, and goes on."""
    step, calls = DecoderModule.training_step, []

    def crash(self, batch, index):
        calls.append(index)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return step(self, batch, index)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DecoderModule, "training_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit("broken")
    return fit("broken", "--ckpt_path", "last")


def test_a_resumed_run_shows_what_the_uninterrupted_one_shows(resumed, whole):
    assert runs.results(resumed) == runs.results(whole)
    assert len(list((resumed / "tensorboard").iterdir())) == 2
    assert shown(resumed / "tensorboard") == shown(whole / "tensorboard")


def test_a_run_that_starts_anew_hides_the_one_before_it(resumed, whole, fit):
    fit("broken", "--trainer.max_steps", "2")
    expected = numbers(resumed)
    assert {step for _, step in expected} == {0, 1}
    assert scalars(resumed / "tensorboard") == pytest.approx(expected, rel=1e-6)


def test_without_a_logger_the_metrics_stay(fit, whole):
    run = fit("without", "--trainer.logger", "false")
    assert runs.results(run) == runs.results(whole)
    assert not (run / "tensorboard").exists()


def test_loggers_of_the_user_stand_beside_the_metrics(fit, whole, root):
    run = fit("beside", "--trainer.logger", yaml.safe_dump([
        {"class_path": "lightning.pytorch.loggers.TensorBoardLogger",
         "init_args": {"save_dir": str(root / "theirs"), "name": "board", "version": 0}},
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(root / "theirs"), "name": "csv"}},
    ], default_flow_style=True))
    assert runs.results(run) == runs.results(whole) and not (run / "tensorboard").exists()
    expected = numbers(whole)
    assert scalars(root / "theirs" / "board" / "version_0") == pytest.approx(expected, rel=1e-6)
    with open(root / "theirs" / "csv" / "version_0" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {name for row in rows for name in row} == {name for name, _ in expected} | {"step"}
    assert (run / "metrics" / "config.yaml").is_file()


def test_one_logger_of_the_user_is_the_modules_own(root):
    given = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(root / "one")]
    cli = command_line(["--config", str(root / "config.yaml"), "--output", str(root / "run"), *given], run=False)
    assert [type(logger).__name__ for logger in cli.trainer.loggers] == ["CSVLogger", "Metrics"]
    assert cli.trainer.logger.save_dir == str(root / "one")


def test_weights_and_biases_offline(fit, whole, root, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = fit("wandb", "--trainer.logger", "WandbLogger", "--trainer.logger.save_dir", str(root / "w"),
              "--trainer.logger.offline", "true")
    assert runs.results(run) == runs.results(whole)
    assert list((root / "w").rglob("*.wandb"))


@pytest.mark.parametrize("given, expected", [
    ([], ["TensorBoard", "Metrics"]), (["--trainer.logger", "true"], ["TensorBoard", "Metrics"]),
    (["--trainer.logger", "null"], ["TensorBoard", "Metrics"]), (["--trainer.logger", "false"], ["Metrics"]),
])
def test_what_a_run_logs_to(root, fit, given, expected):
    cli = command_line(["--config", str(root / "config.yaml"), "--output", str(root / "run"), *given], run=False)
    assert [type(logger).__name__ for logger in cli.trainer.loggers] == expected


# -- No room -------------------------------------------------------------------------------------------------


def test_events_without_room_are_told_and_leave_whole_records(tmp_path):
    file = EventFile(str(tmp_path))
    for step in range(3):
        file.add_event(Event(), step)
    before = file.path.read_bytes()
    with room(len(before) + 9), pytest.raises(InputError, match="events.out.tfevents.* cannot be written .File too large"):
        file.add_event(Event(file_version="longer than what there is room for"), 3)
    assert file.path.read_bytes() == before and len(events(tmp_path)) == 5
    file.add_event(Event(), 3)
    assert [event.step for event in events(tmp_path)] == [0, 0, 0, 1, 2, 3]


def test_two_starts_within_a_second_have_files_of_their_own(tmp_path):
    for step in range(5):
        board = TensorBoard(tmp_path)
        board.start_at(step)
        board.log_metrics({"loss": float(step)}, step)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 5
    assert shown(tmp_path / "tensorboard") == {("loss", step): float(step) for step in range(5)}


def test_a_board_has_no_file_before_it_knows_where_to_go_on(tmp_path):
    board = TensorBoard(tmp_path)
    board.experiment.flush()  # as the trainer and users do
    board.save()
    assert not (tmp_path / "tensorboard").exists()
    board.start_at(7)
    board.log_metrics({"loss": 1.0}, 7)
    board.finalize("success")
    board.log_metrics({"loss": 2.0}, 8)
    assert [event.step for event in events(tmp_path / "tensorboard")] == [7, 7, 7, 8]


def test_what_stands_in_the_way_of_tensorboard_is_named(fit, root):
    (root / "blocked").mkdir()
    (root / "blocked" / "tensorboard").write_text("mine")
    with pytest.raises(InputError, match="blocked/tensorboard: cannot be written .File exists"):
        fit("blocked")
    assert (root / "blocked" / "tensorboard").read_text() == "mine"


def test_metrics_without_a_step_are_rows_all_the_same(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.log_metrics({"a": 1.0})
    metrics.log_metrics({"b": 2.0})
    assert [row["step"] for row in table(tmp_path)] == ["0", "1"] and metrics.rows == 2


def test_no_tiles_are_no_sheet(tmp_path):
    assert contact_sheet([], tmp_path / "sheet.png") is None and not list(tmp_path.iterdir())
