"""The folder of a run: one process at a time, names that are none, and no room for what is to be written."""

import contextlib
import os
import resource
import signal
import types
from pathlib import Path

import pytest
import runs
import torch
import yaml
from fresh import context

from mmtx.cli import main
from mmtx.data.output import LOCK, check_output, lock_folder
from mmtx.errors import InputError
from mmtx.training.callbacks import SaveModel, contact_sheet
from mmtx.training.loggers import Metrics


@contextlib.contextmanager
def room(size: int):
    """Within, no file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -- Names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", " ", "\t\n", "a\0b"])
def test_what_is_no_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="output: found .*expected the name of a folder"):
        check_output(name)
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert check_output("~/run") == tmp_path / "home" / "run" and (tmp_path / "home" / "run").is_dir()
    with pytest.raises(InputError, match="~nobody-of-this-name/x: found ~nobody-of-this-name, the home of no user here"):
        check_output("~nobody-of-this-name/x")
    assert [each.name for each in tmp_path.iterdir()] == ["home"]


def test_where_no_folder_can_be_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    for name, told in (("file", "File exists"), ("file/below", "Not a directory"), ("n" * 300, "File name too long")):
        with pytest.raises(InputError, match=f"cannot be written .{told}") as caught:
            check_output(str(tmp_path / name))
        assert len(str(caught.value)) < 400
    assert (tmp_path / "file").read_text() == "mine"


# -- One at a time -------------------------------------------------------------------------------------------


def hold(folder: Path, ready, end) -> None:
    with lock_folder(folder, "output"):
        if os.fork() == 0:  # as workers of a loader are, which may outlive it
            ready.send(os.getppid())  # only now, or the other might be killed before this one has let go of its files
            ready.close()
            signal.alarm(60)  # which ends it: nobody else does
            signal.pause()
        end.recv()


def test_a_folder_is_one_process_s_until_it_ends_however_it_does(tmp_path):
    here, ready = context.Pipe()
    end, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, ready, end))
    process.start()
    pid = here.recv()
    with pytest.raises(InputError, match=f"output: {tmp_path} is being written by process {pid}, expected another"):
        with lock_folder(tmp_path, "output"):
            pass
    os.kill(pid, signal.SIGKILL)
    process.join(30)
    assert (tmp_path / LOCK).exists()  # stale, with a child that lives on
    with lock_folder(tmp_path, "output"):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
        with pytest.raises(InputError, match=f"by process {os.getpid()}"), lock_folder(tmp_path, "output"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_lock_goes_with_an_error(tmp_path):
    with pytest.raises(KeyError), lock_folder(tmp_path, "output"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_without_locks_is_anyone_s(tmp_path, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock_folder(tmp_path, "output"), lock_folder(tmp_path, "output"):
        pass


def test_a_second_fit_with_one_output_is_told_of_the_first(tmp_path):
    config = runs.prepare(tmp_path, steps=10**6, val_check_interval=10**5)
    output, other = tmp_path / "run", tmp_path / "second" / "run.log"
    processes = runs.start(config, output)
    try:
        runs.wait_for(lambda: runs.latest(output) >= 2, processes)
        before = (output / "metrics" / "config.yaml").read_bytes()
        other.parent.mkdir()
        (second,) = runs.start(config, output, log=other)
        second.join(100)
        assert second.exitcode == 2
        assert f"output: {output} is being written by process {processes[0].pid}" in other.read_text()
        assert processes[0].is_alive() and (output / "metrics" / "config.yaml").read_bytes() == before
    finally:
        assert runs.kill(processes)
    config["trainer"]["max_steps"] = 4
    assert runs.fit(config, output) == [0], output.with_suffix(".log").read_text()
    assert not (output / LOCK).exists() and (output / "model").is_dir()


def test_a_second_prepare_with_one_output_is_told_of_the_first(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 20)
    command = ["prepare", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    with lock_folder(check_output(str(tmp_path / "out")), "output"), pytest.raises(SystemExit) as stop:  # as the first one holds it
        main(command)
    told = f"mmtx: error: output: {tmp_path}/out is being written by process {os.getpid()}, expected another folder, or that process"
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(told) and error.count("\n") == 1
    assert os.listdir(tmp_path / "out") == []
    main(command)
    assert (tmp_path / "out" / "shard-00000.safetensors").exists()


# -- No room -------------------------------------------------------------------------------------------------


def test_metrics_without_room_leave_whole_rows(tmp_path):
    metrics, path = Metrics(tmp_path), tmp_path / "metrics" / "metrics.csv"
    for step in range(3):
        metrics.log_metrics({"loss": 1.0}, step)
    rows = path.read_text()
    with room(len(rows) + 3):
        with pytest.raises(InputError, match="metrics.csv: cannot be written .File too large"):
            metrics.log_metrics({"loss": 1.0}, 3)
        metrics.finalize("failed")  # as when the run ends: nothing is left to write
        assert path.read_text() == rows
        with pytest.raises(InputError, match="metrics.csv: .*cannot be written .File too large"):
            metrics.log_metrics({"loss": 1.0, "other": 2.0}, 3)
    assert path.read_text() == rows and list(path.parent.iterdir()) == [path]


def test_samples_without_room_are_no_picture_at_all(tmp_path):
    tiles = [(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), "a text")]
    path = tmp_path / "step-000001.png"
    contact_sheet(tiles, path)
    before = path.read_bytes()
    with room(100), pytest.raises(InputError, match="step-000001.png: .* cannot be written .File too large"):
        contact_sheet(tiles * 9, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_model_without_room_leaves_the_one_that_is_there(tiny_model, tmp_path):
    trainer = types.SimpleNamespace(interrupted=False, is_global_zero=True)
    module = types.SimpleNamespace(state_dict=dict, save=tiny_model.save)
    SaveModel(tmp_path).on_train_end(trainer, module)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) > 5
    for size in (0, 100, 10_000):
        with room(size), pytest.raises(InputError, match=f"{tmp_path}/model.* cannot be written|{tmp_path}/model"):
            SaveModel(tmp_path).on_train_end(trainer, module)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("blocked", ["metrics", "metrics/metrics.csv", "metrics/config.yaml", "samples", "checkpoints"])
def test_what_stands_in_the_way_is_named(tmp_path, blocked, capsys):
    config = runs.prepare(tmp_path, steps=4)
    config["data"]["init_args"]["num_workers"] = 0
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "run"), **config}))
    path = tmp_path / "run" / blocked
    path.parent.mkdir(parents=True)
    path.mkdir() if "/" in blocked else path.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(tmp_path / "run.yaml")])
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("mmtx: error")]
    assert stop.value.code == 2
    assert "Traceback" not in "".join(lines) and f"run/{blocked}" in line and "cannot be written" in line
