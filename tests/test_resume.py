"""Runs that are killed, ended or resumed otherwise than they began: the same numbers, or a word about why not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch
import yaml
from safetensors.torch import load_file

from mmtx.training.checkpoint import newest
from mmtx.training.loader import ResumableLoader
from mmtx.training.run import command_line


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(root):
    return runs.prepare(root)


@pytest.fixture(scope="module")
def whole(root, config):
    """A run that nothing disturbs, and how long it took."""
    begin = time.monotonic()
    assert runs.fit(config, root / "whole") == [0], (root / "whole.log").read_text()
    return root / "whole", time.monotonic() - begin


def test_a_killed_run_goes_on_bit_by_bit(root, config, whole):
    outputs, kills = runs.killed_and_resumed(config, root / "killed", whole[1], 2, random.Random(0))
    assert kills[1].step > kills[1].began  # what was written was lost or went on
    for output in outputs:
        assert runs.results(output) == runs.results(whole[0])


def test_a_run_ended_by_sigterm_before_a_validation_goes_on_with_it(root, config, whole):
    output = root / "ended"
    processes = runs.start(config, output)
    runs.wait_for(lambda: runs.latest(output) >= 3, processes)
    # To the whole group, as shells and schedulers do it. The validation of step 3 runs now, or will be repeated.
    os.killpg(processes[0].pid, signal.SIGTERM)
    processes[0].join(30)
    assert processes[0].exitcode == 143, output.with_suffix(".log").read_text()
    assert not (output / "model").exists()
    assert runs.fit(config, output, "--ckpt_path", "last") == [0]
    assert runs.results(output) == runs.results(whole[0])


class Numbers(torch.utils.data.Dataset):
    """Ten batches that tell which they are."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, k: int) -> int:
        return k


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_behind_what_it_has_handed_out(workers):
    loader, other = (ResumableLoader(Numbers(), workers) for _ in range(2))
    batches = iter(loader)
    found = [next(batches) for _ in range(4)]
    other.load_state_dict(loader.state_dict())  # as of now, while the fourth is trained on
    assert found + list(other) == list(range(10))
    del batches
    assert found + list(loader) == list(range(10))


def test_the_two_newest_checkpoints_are_kept(whole):
    # Written every 2 steps and before the validations of steps 3 and 6, but not when the run is over.
    found = sorted(path.name for path in (whole[0] / "checkpoints").iterdir())
    assert found == ["step-000000004.ckpt", "step-000000006.ckpt"]


def test_the_model_holds_the_averaged_weights(whole):
    path = newest(whole[0] / "checkpoints")
    saved = torch.load(path, weights_only=True)
    model = load_file(whole[0] / "model" / "model.safetensors")
    steps = 8 - saved["global_step"]
    name = "blocks.0.attention.qkv.weight"
    # A step of the average of decay 0.9 moves it by less than a fifth of the way to the weights, which move on meanwhile; so after two
    # it is closer to the average of the checkpoint than the weights of the checkpoint were.
    average, weights = (saved[key][f"decoder.{name}"] for key in ("state_dict", "current_model_state"))
    assert not torch.equal(average, weights) and steps <= 2
    assert (model[name] - average).norm() < (average - weights).norm()


def record(root: Path, config: dict) -> dict:
    """What a configuration promises to a checkpoint."""
    path = root / "record.yaml"
    path.write_text(yaml.safe_dump({"output": str(root / "record"), **config}))
    cli = command_line(["--config", str(path)], run=False)
    return cli.record()


def changed(config: dict, path: str, value) -> dict:
    head, _, tail = path.partition(".")
    return {**config, head: changed(config[head], tail, value) if tail else value}


CHANGES = {
    "seed_everything": 1, "ema": 0.8, "data.init_args.tokens_per_batch": 512, "data.init_args.seed": 3,
    "data.init_args.train": runs.FEW[:1], "data.init_args.image_augmentation": None,
    "model.init_args.z_loss": 0.0, "model.init_args.loss_weights": {"text": 2.0},
    "model.init_args.decoder.width": 48, "trainer.max_steps": 9, "trainer.accumulate_grad_batches": 3,
    "trainer.gradient_clip_val": 2.0, "trainer.precision": "bf16-mixed",
}


def test_every_change_of_batches_or_model_changes_the_record(root, config):
    expected = record(root, config)
    for path, value in CHANGES.items():
        found = record(root, changed(config, path, value))
        names = {name for name in {*found, *expected} if found.get(name) != expected.get(name)}
        assert names and all(name.startswith(path) for name in names), (path, names)
    ranks = record(root, changed(changed(config, "trainer.devices", 2), "trainer.strategy", "ddp"))
    assert (expected["processes"], ranks["processes"]) == (1, 2)
    assert record(root, changed(config, "data.init_args.num_workers", 0)) == expected


@pytest.mark.parametrize("path, value, told", [
    ("trainer.max_steps", 9, ["trainer.max_steps", "found 8", "expected 9"]),
    ("model.init_args.decoder.width", 48, ["model.init_args.decoder.width", "found 32", "expected 48"]),
    ("data.init_args.tokenizers.text", "OTHER", ["data.init_args.tokenizers.text", "other"]),
])
def test_a_resumed_run_that_is_another_ends_in_one_line(root, config, whole, path, value, told):
    if value == "OTHER":
        value = str(root / "other")
        runs.TextTokenizer.train(["a green triangle", "flute, A 4"], 300).save(root / "other")
    output = root / f"changed-{told[0]}"
    status = runs.fit(changed(config, path, value), output, "--ckpt_path", str(newest(whole[0] / "checkpoints")))
    lines = [line for line in output.with_suffix(".log").read_text().splitlines() if line.startswith("mmtx: error")]
    assert status == [2] and len(lines) == 1 and all(word in lines[0] for word in told), lines
    assert not (output / "model").exists()


def test_a_damaged_newest_checkpoint_is_named_and_left_out(root, config, whole):
    output = root / "damaged"
    processes = runs.start(config, output)
    runs.wait_for(lambda: runs.latest(output) >= 4, processes)
    assert runs.kill(processes)
    path = newest(output / "checkpoints")
    os.truncate(path, path.stat().st_size // 2)
    assert runs.fit(config, output, "--ckpt_path", "last") == [0]
    assert f"{path.name}: no checksum at its end" in output.with_suffix(".log").read_text()
    assert runs.results(output) == runs.results(whole[0])


# -- Two ranks -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rank_that_was_left_alone_says_so_in_one_line(root, config):
    endless = changed(runs.two_ranks(config), "trainer.max_steps", 10**6)
    output = root / "left-alone"
    processes = runs.start(endless, output, ranks=2)
    try:
        runs.wait_for(lambda: runs.latest(output) >= 2, processes)
        os.kill(processes[1].pid, signal.SIGKILL)
        processes[0].join(100)
        assert processes[0].exitcode == 2
        told = output.with_suffix(".log").read_text()
        assert "mmtx: error: trainer.devices: another process of the run is gone (Connection " in told and "Traceback" not in told
    finally:
        runs.kill(processes)


@pytest.mark.slow
def test_two_ranks_go_on_after_a_kill_and_after_sigterm_to_either_one(root, config, whole):
    config, alone = runs.two_ranks(config), newest(whole[0] / "checkpoints")
    assert runs.fit(config, root / "more", "--ckpt_path", str(alone), ranks=2) == [2, 2]
    assert "processes: found 1, expected 2 as in this run" in (root / "more.log").read_text()
    config = changed(config, "trainer.max_steps", 12)
    assert runs.fit(config, root / "pair", ranks=2) == [0, 0], (root / "pair.log").read_text()
    output, resume = root / "ended", ("--ckpt_path", "last")

    def stopped(stop, *more: str) -> list[int]:
        """Exit status of each rank of a run that is stopped when it has got further than it began."""
        began, processes = runs.latest(output), runs.start(config, output, *more, ranks=2)
        runs.wait_for(lambda: runs.latest(output) > began, processes)
        stop(processes)
        for process in processes:
            process.join(30)
        return [process.exitcode for process in processes]

    assert all(stopped(runs.kill)), output.with_suffix(".log").read_text()
    for rank in (0, 1):
        status = stopped(lambda processes: os.kill(processes[rank].pid, signal.SIGTERM), *resume)
        assert status == [143, 0], output.with_suffix(".log").read_text()
    assert runs.fit(config, output, *resume, ranks=2) == [0, 0], output.with_suffix(".log").read_text()
    assert runs.results(output) == runs.results(root / "pair")


def session(number: int) -> list[int]:
    """Processes of a session, but for those that have ended and wait to be counted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == number and state != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others(root, config, rank):
    output, path = root / f"orphans-{rank}", root / f"orphans-{rank}.yaml"
    endless = changed(runs.two_ranks(config), "trainer.max_steps", 10**6)
    path.write_text(yaml.safe_dump({"output": str(output), **endless}))
    with open(output.with_suffix(".log"), "w") as log:
        main = subprocess.Popen([sys.executable, "-m", "mmtx", "fit", "--config", str(path)], stdout=log, stderr=log,
                                start_new_session=True)
    try:
        while not list((output / "checkpoints").glob("step-*4.ckpt")):
            assert main.poll() is None, output.with_suffix(".log").read_text()
            time.sleep(0.1)
        (child,) = [pid for pid in session(main.pid) if b"LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
                    and b"fit" in Path(f"/proc/{pid}/cmdline").read_bytes()
                    and int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == main.pid]
        os.kill(child if rank else main.pid, signal.SIGKILL)
        assert main.wait(30) != 0
        limit = time.monotonic() + 30
        while session(main.pid) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not session(main.pid)
    finally:
        for pid in session(main.pid):
            os.kill(pid, signal.SIGKILL)
