"""Ending a run from outside: on a signal all ranks finish the current step, and no rank outlives the others."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments import LightningEnvironment

from mmtx.training.private import on_signals

LAUNCHER = "MMTX_LAUNCHER"  # id of the process that started this rank
SAME = 0.5                  # seconds within which a second SIGINT is the same Ctrl-C, passed on by a launcher


def status(number: int) -> int:
    """The status that a shell reports for a process ended by a signal."""
    return 128 + number


class Termination:
    """SIGTERM or SIGINT (Ctrl-C) to any rank is noted, and ends all ranks together between two steps.

    A second Ctrl-C ends the run at once. On a SLURM cluster SIGUSR1, which announces the end of the job, also requeues it.
    """

    def __init__(self):
        self.asked: int | None = None  # the signal that came
        self.when = 0.0
        self.requeues = False          # whether the job is to start again

    def listen(self, trainer: Trainer) -> None:
        """Handle SIGTERM and SLURM's signal; call this before the trainer registers its handlers, after all `setup` hooks."""
        on_signals(trainer, self._note, self._note_requeue)

    def listen_to_interrupts(self) -> None:
        """From now on Ctrl-C waits for the end of the step. Earlier there is nothing to save."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note)
            if hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which `FitCLI.fit` has blocked

    def _note(self, number: int, *_: Any) -> None:
        if number == signal.SIGINT and self.asked == signal.SIGINT and time.monotonic() - self.when > SAME:
            leave_at_once()
        if self.asked is None:
            self.asked, self.when = number, time.monotonic()

    def _note_requeue(self, number: int, *_: Any) -> None:
        self.requeues = True
        self._note(number)

    def requested(self, trainer: Trainer) -> bool:
        """Whether any rank was asked to end; all ranks must call this together."""
        return trainer.strategy.reduce_boolean_decision(self.asked is not None, all=False)

    def leave(self, trainer: Trainer) -> None:
        """End this process; all ranks must call this together."""
        # A rank that Lightning started must exit with 0: otherwise rank 0 would be killed before it has cleaned up.
        started = trainer.local_rank > 0 and isinstance(
            getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
        if self.asked == signal.SIGINT and trainer.is_global_zero:
            print("mmtx: interrupted; the same command with --ckpt_path last goes on", file=sys.stderr, flush=True)
        if self.requeues and trainer.is_global_zero:
            requeue()
        sys.exit(0 if started else status(self.asked or signal.SIGTERM))


def requeue() -> None:
    """Let SLURM start this job again, and say whether it will."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        failed = f"status {code}" if (code := subprocess.run(["scontrol", "requeue", job]).returncode) else None
    except OSError as error:
        failed = error.strerror
    print(f"mmtx: job {job} cannot be requeued (scontrol: {failed})" if failed else
          f"mmtx: job {job} is requeued; it goes on if its command has --ckpt_path last", file=sys.stderr, flush=True)


def leave_at_once() -> None:
    """End this process and its children, whatever they are doing; to be called in a signal handler."""
    for child in multiprocessing.active_children():
        child.kill()
    os.write(2, b"mmtx: interrupted\n")
    os._exit(status(signal.SIGINT))


def follow_launcher() -> None:
    """End this process once the rank that started it has died: otherwise it could wait long in a collective operation."""
    launcher = int(os.environ.get(LAUNCHER, 0)) if "LOCAL_RANK" in os.environ else 0
    os.environ[LAUNCHER] = str(os.getpid())
    if launcher not in (0, os.getpid()):
        threading.Thread(target=_follow, args=(launcher,), daemon=True, name="follow-launcher").start()


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)
