"""Ending a run from outside: on SIGTERM or Ctrl-C all ranks finish the current step, and no rank outlives the others."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments import LightningEnvironment

from mmtx.data.workers import uninterrupted
from mmtx.training.private import launch_within, on_sigterm

LAUNCHER = "MMTX_LAUNCHER"  # id of the process that started this rank
SAME = 0.5                  # seconds within which a second SIGINT is the same Ctrl-C, passed on by a launcher


def status(number: int) -> int:
    """The status that a shell reports for a process ended by a signal."""
    return 128 + number


class Termination:
    """SIGTERM or SIGINT (Ctrl-C) to any rank is noted, and ends all ranks together between two steps.

    A second Ctrl-C ends the run at once.
    """

    def __init__(self):
        self.asked: int | None = None  # the signal that came
        self.when = 0.0

    def listen(self, trainer: Trainer) -> None:
        """Handle SIGTERM; call this before the trainer registers its handlers, which is after all `setup` hooks."""
        on_sigterm(trainer, self._note)

    def listen_to_interrupts(self) -> None:
        """From now on Ctrl-C waits for the end of the step. Earlier there is nothing to save."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note)
            if hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `launch_uninterrupted`

    def _note(self, number: int, *_: Any) -> None:
        if number == signal.SIGINT and self.asked == signal.SIGINT and time.monotonic() - self.when > SAME:
            leave_at_once()
        if self.asked is None:
            self.asked, self.when = number, time.monotonic()

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
        sys.exit(0 if started else status(self.asked or signal.SIGTERM))


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


def launch_uninterrupted(launcher: Any) -> None:
    """Let the ranks that a launcher starts receive Ctrl-C only from the first step on.

    Before that they end with the rank that started them, which would be killed if they ended first.
    """
    launch_within(launcher, uninterrupted)


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)
