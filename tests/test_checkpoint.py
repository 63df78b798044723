"""Checkpoint files: kills, full disks and damage leave a sound one, and nothing that is not finite gets into one."""

import os
import random
import resource
import signal
import time
from pathlib import Path

import lightning
import pytest
import torch
from fresh import context

from mmtx.errors import InputError
from mmtx.files import write_file
from mmtx.training.checkpoint import AtomicCheckpointIO, by_age, damage, newest

NUMBERS = 50_000


def checkpoint(step: int) -> dict:
    weights = {"weight": torch.full((NUMBERS,), float(step))}
    return {"epoch": 0, "global_step": step, "pytorch-lightning_version": lightning.__version__, "state_dict": weights,
            "optimizer_states": [{}], "lr_schedulers": [], "loops": {}, "callbacks": {}}


def write(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:09d}.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(step), path)
    return path


def check(path: Path) -> int:
    """The step of a checkpoint all of whose numbers are right."""
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["state_dict"]["weight"].eq(loaded["global_step"]).all()
    return loaded["global_step"]


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path, 3)
    assert check(path) == 3
    assert torch.load(path, weights_only=True)["global_step"] == 3  # any reader of torch's files can
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def other(folder: Path, _: int) -> Path:
    write_file(folder / "shard", b"some bytes")
    return folder / "shard"


@pytest.mark.parametrize("how", [write, other])
def test_bytes_are_on_the_disk_before_their_name_is(tmp_path, monkeypatch, how):
    sync, replace, done = os.fsync, os.replace, []
    monkeypatch.setattr(os, "fsync", lambda file: (sync(file), done.append(os.fstat(file))))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append((str(old), str(new))), replace(old, new)))
    path = how(tmp_path, 3)
    file, (old, new), folder = done
    assert (file.st_ino, file.st_size) == (path.stat().st_ino, path.stat().st_size)
    assert os.path.dirname(old) == str(tmp_path) and old != new == str(path)  # on the same filesystem, whatever TMPDIR is
    assert folder.st_ino == tmp_path.stat().st_ino


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_noticed_and_the_one_before_it_taken(tmp_path, capsys, share):
    before, path = write(tmp_path, 1), write(tmp_path, 2)
    os.truncate(path, int(share * path.stat().st_size))
    assert newest(tmp_path) == before and check(before) == 1
    told = capsys.readouterr().err
    assert path.name in told and "truncated" in told and told.count("\n") == 1
    with pytest.raises(InputError, match=path.name):
        AtomicCheckpointIO().load_checkpoint(path)


def test_the_newest_is_the_one_written_last(tmp_path):
    # A run that starts anew in the folder of an older one.
    write(tmp_path, 900)
    path = write(tmp_path, 5)
    assert newest(tmp_path) == path


def test_a_copy_that_somebody_keeps_is_no_checkpoint_of_the_run(tmp_path):
    path = write(tmp_path, 5)
    for name in ("step-000000005-good.ckpt", "step-000000005 copy.ckpt", "step-5.ckpt"):
        (tmp_path / name).write_bytes(path.read_bytes())
    assert newest(tmp_path) == path and by_age(tmp_path) == [path]


def test_a_flipped_byte_is_noticed_wherever_it_is(tmp_path, capsys):
    before, path = write(tmp_path, 1), write(tmp_path, 2)
    content = path.read_bytes()
    for place in [0, len(content) - 1, *random.Random(0).sample(range(len(content)), 20)]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        assert newest(tmp_path) == before, place
        assert path.name in capsys.readouterr().err
    path.write_bytes(content)
    assert newest(tmp_path) == path


def test_a_folder_of_damaged_checkpoints_is_an_error_and_an_empty_one_is_not(tmp_path):
    assert newest(tmp_path) is None
    write(tmp_path, 1).write_bytes(b"")
    with pytest.raises(InputError, match="1 damaged"):
        newest(tmp_path)


def test_a_checkpoint_with_a_pickled_object_is_not_unpickled(tmp_path):
    path = tmp_path / "step-000000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "evil": Path}, path)
    assert damage(path) is None
    with pytest.raises(InputError, match="not a checkpoint of mmtx .UnpicklingError"):
        AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("where", ["state_dict", "current_model_state", "optimizer_states"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path, where, value):
    before = write(tmp_path, 1)
    values = checkpoint(2) | {where: [{"deep": torch.tensor([0.0, value])}]}
    with pytest.raises(InputError, match=f"{where}.0.deep"):
        AtomicCheckpointIO().save_checkpoint(values, tmp_path / "step-000000002.ckpt")
    assert list(tmp_path.iterdir()) == [before]


def write_for_ever(folder: Path, first: int) -> None:
    for step in range(first, 10**6):
        write(folder, step)
        for path in sorted(folder.glob("step-*.ckpt"))[:-2]:
            path.unlink()


def kill_while_writing(folder: Path, wanted: int, most: int, moments: random.Random) -> tuple[int, int]:
    """Kill a process that writes checkpoints, until it was `wanted` times in the middle of a file -> kills, and these.

    When a kill comes is up to the machine, so it may take some more, but not more than `most`.
    """
    kills, within, latest = 0, 0, write(folder, 0)
    while within < wanted and kills < most:
        kills += 1
        first = check(latest) + 1
        process = context.Process(target=write_for_ever, args=(folder, first))
        begin = time.monotonic()
        process.start()
        try:
            # Only names are looked at: the process removes files meanwhile.
            while not any(int(path.stem[5:]) >= first for path in folder.glob("step-*.ckpt")) and process.is_alive():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, time.monotonic() - begin))  # about as long as the next write takes
        finally:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        within += (folder / ".part").exists()
        latest = newest(folder)
        assert check(latest) >= first
    return kills, within


def test_a_kill_within_a_write_leaves_a_sound_newest_checkpoint(tmp_path, capsys):
    _, within = kill_while_writing(tmp_path, 5, 60, random.Random(0))
    assert capsys.readouterr().err == ""  # not one damaged file
    assert len(list(tmp_path.iterdir())) <= 4
    assert within == 5


def write_with_little_room(folder: Path, room: int, told) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        write(folder, 2)
    except InputError as error:
        told.send(str(error))
    else:
        told.send("")


def test_no_room_leaves_the_one_before_and_names_path_and_bytes(tmp_path):
    before = write(tmp_path, 1)
    size = before.stat().st_size
    # The system refuses to let the file grow beyond each of ten sizes, which is an error in the middle of the write.
    for room in [0, 1, size - 1, *(size * tenth // 10 for tenth in range(2, 9))]:
        here, there = context.Pipe()
        process = context.Process(target=write_with_little_room, args=(tmp_path, room, there))
        process.start()
        told = here.recv()
        process.join()
        assert "step-000000002.ckpt" in told and str(size) in told and "bytes cannot be written" in told, (room, told)
        assert list(tmp_path.iterdir()) == [before] and check(before) == 1
