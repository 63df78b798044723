"""Tiny training runs in processes of their own, to kill, resume and compare; for tests and benchmarks/."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from fresh import context

from mmtx.cli import main
from mmtx.modality.audio import AudioConfig, AudioTokenizer
from mmtx.modality.autoencoder import NetworkConfig
from mmtx.modality.image import ImageConfig, ImageTokenizer
from mmtx.modality.text import TextTokenizer

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"
FEW = [{"paths": [str(STARTER / "images-train-004.tar.gz")], "limit": 6},
       {"paths": [str(STARTER / "sounds-train-001.tar.gz")], "limit": 4}]
NETWORK = NetworkConfig(width=16, heads=1, encoder_depth=1, decoder_depth=1, levels=(4, 3, 3))


def prepare(root: Path, steps: int = 8, **trainer) -> dict:
    """A configuration of a tiny decoder on real samples with augmentation, validation, averaged weights, 2 workers."""
    torch.manual_seed(0)
    for tokenizer in (
        TextTokenizer.train(["a red circle", "a blue square", "trumpet, C 4", "violin, D sharp 5"], 300),
        ImageTokenizer(ImageConfig(patch=16, side=32, network=NETWORK)),
        AudioTokenizer(AudioConfig(mels=16, patch_mels=16, patch_frames=4, window=512, chunk=16, network=NETWORK)),
    ):
        tokenizer.save(root / tokenizer.kind)
    return {
        "seed_everything": 0, "save_every": 2, "samples": 2, "ema": 0.9,
        "model": {"class_path": "mmtx.training.decoder.DecoderModule", "init_args": {
            "decoder": {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_dim": 32}}},
        "data": {"class_path": "mmtx.training.decoder_data.DecoderData", "init_args": {
            "tokenizers": {kind: str(root / kind) for kind in ("text", "image", "audio")},
            "train": FEW, "validation": FEW, "tokens_per_batch": 256, "max_seq_len": 255, "num_workers": 2,
            "image_augmentation": {}, "audio_augmentation": {}}},
        "trainer": {"accelerator": "cpu", "max_steps": steps, "val_check_interval": 3, "check_val_every_n_epoch": None,
                    "log_every_n_steps": 1, "enable_progress_bar": False, "gradient_clip_val": 1.0, **trainer},
    }


def two_ranks(config: dict) -> dict:
    """The same configuration for two gloo processes that accumulate two batches each."""
    trainer = {**config["trainer"], "devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2,
               "val_check_interval": 6}
    return {**config, "trainer": trainer}


def start(config: dict, output: Path, *more: str, ranks: int = 1, log: Path | None = None) -> list[multiprocessing.Process]:
    """Run `mmtx fit` in one process a rank; what they print goes to OUTPUT.log or `log`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    log = log or output.with_suffix(".log")
    path = log.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"output": str(output), **config}))
    environment = {}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in range(ranks):
        local = {"LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(Program(["fit", "--config", str(path), *more], log, {**environment, **local}))
    return processes


class Program(context.Process):
    """`mmtx ARGUMENTS` in a process that is the first of a group, as subprocess.Popen runs one; what it prints goes to a file."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str] | None = None):
        super().__init__(target=_program, args=(arguments, environment or {}, log))
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired("mmtx", timeout)
        return self.exitcode


def _program(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    torch.set_num_threads(1)
    main(arguments)


def fit(config: dict, output: Path, *more: str, ranks: int = 1) -> list[int]:
    """Run to the end -> exit status of each rank."""
    processes = start(config, output, *more, ranks=ranks)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def kill(processes: list[multiprocessing.Process], number: int = signal.SIGKILL) -> bool:
    """Send a signal to all -> whether any was still at work."""
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        os.kill(process.pid, number)
    for process in processes:
        process.join()
    return bool(alive)


def results(output: Path) -> tuple[str, bytes]:
    """What must be equal: every row of the metrics, and the weights."""
    return (output / "metrics" / "metrics.csv").read_text(), (output / "model" / "model.safetensors").read_bytes()


def latest(output: Path) -> int:
    """The last step that there is a checkpoint of, 0 if there is none."""
    return max((int(path.stem.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*.ckpt")), default=0)


def wait_for(condition, processes: list[multiprocessing.Process], poll: float = 0.005) -> None:
    """Wait until something is true or the processes have ended."""
    while not condition() and any(process.is_alive() for process in processes):
        time.sleep(poll)


AFTER = 0.1  # seconds at most between a checkpoint and a kill that follows it: about a step of these runs


class Kill(NamedTuple):
    """The newest checkpoint, 0 for none, when a process was started and when it was killed, and after how many seconds."""

    began: int
    step: int
    seconds: float


def killed_and_resumed(config: dict, folder: Path, seconds: float, kills: int, random, ranks: int = 1,
                       tell=lambda line: None) -> tuple[list[Path], list[Kill]]:
    """Runs that were killed `kills` times in all and resumed until they ended -> their folders, and the kills.

    Kills come in turn at a moment after the start, uniform over the `seconds` that an undisturbed run takes, and soon
    after a checkpoint with which the process got further: most of the former come before that.
    """
    steps, outputs, found = config["trainer"]["max_steps"], [], []
    while len(found) < kills:
        outputs.append(folder / f"run-{len(outputs)}")
        while True:
            begin, began = time.monotonic(), latest(outputs[-1])
            processes = start(config, outputs[-1], "--ckpt_path", "last", ranks=ranks)
            if len(found) < kills:
                if len(found) % 2:
                    aim = random.randint(began + 1, max(began + 1, steps - 1))
                    wait_for(lambda: latest(outputs[-1]) >= aim, processes)
                    time.sleep(random.uniform(0, AFTER))
                else:
                    time.sleep(random.uniform(0, seconds))
                if kill(processes):
                    found.append(Kill(began, latest(outputs[-1]), round(time.monotonic() - begin, 2)))
                    tell(f"kill {len(found)}: {outputs[-1].name}, {found[-1]}")
                    continue
            for process in processes:
                process.join()
            assert all(process.exitcode == 0 for process in processes), outputs[-1].with_suffix(".log").read_text()
            break
    return outputs, found
