"""How a run ends from outside: SIGTERM and Ctrl-C let all ranks finish the step they are in, and no rank outlives the others."""

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

LAUNCHER = "MMTX_LAUNCHER"  # the process that started this rank
SAME = 0.5                  # seconds within which a second SIGINT is the same Ctrl-C, which a launcher has passed on


def status(number: int) -> int:
    """What a shell reports for a process that a signal ended."""
    return 128 + number


class Termination:
    """SIGTERM and SIGINT (Ctrl-C) are noted when they come, to whichever rank, and obeyed by all ranks together between
    two steps. A second Ctrl-C ends at once.
    """

    def __init__(self):
        self.asked: int | None = None  # the signal that came
        self.when = 0.0

    def listen(self, trainer: Trainer) -> None:
        """To be called before the trainer registers its handlers, which is after all `setup` hooks."""
        on_sigterm(trainer, self._note)

    def listen_to_interrupts(self) -> None:
        """From now on Ctrl-C waits for the step to end. Before, there is nothing that could be saved."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note)
            if hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `launch_uninterrupted`

    def _note(self, number: int, *_: Any) -> None:
        if number == signal.SIGINT and self.asked == signal.SIGINT and time.monotonic() - self.when > SAME:
            leave_at_once()
        if self.asked is None:
            self.asked, self.when = number, time.monotonic()

    def agreed(self, trainer: Trainer) -> bool:
        """Whether any rank was asked to end; to be called by all ranks at once."""
        return trainer.strategy.reduce_boolean_decision(self.asked is not None, all=False)

    def leave(self, trainer: Trainer) -> None:
        """End this process; to be called by all ranks at once."""
        # A rank that Lightning started must not fail: rank 0 would be killed for it before it has cleaned up.
        started = trainer.local_rank > 0 and isinstance(
            getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
        if self.asked == signal.SIGINT and trainer.is_global_zero:
            print("mmtx: interrupted; the same command with --ckpt_path last goes on", file=sys.stderr, flush=True)
        sys.exit(0 if started else status(self.asked or signal.SIGTERM))


def leave_at_once() -> None:
    """End this process and those that it started, whatever they are doing: to be called in a signal handler."""
    for child in multiprocessing.active_children():
        child.kill()
    os.write(2, b"mmtx: interrupted\n")
    os._exit(status(signal.SIGINT))


def follow_launcher() -> None:
    """End this process when the rank that started it has died: in a collective operation it would wait for long."""
    launcher = int(os.environ.get(LAUNCHER, 0)) if "LOCAL_RANK" in os.environ else 0
    os.environ[LAUNCHER] = str(os.getpid())
    if launcher not in (0, os.getpid()):
        threading.Thread(target=_follow, args=(launcher,), daemon=True, name="follow-launcher").start()


def launch_uninterrupted(launcher: Any) -> None:
    """Let the ranks that a launcher starts see Ctrl-C from the first step on: before, they end with the one that started them,
    which would be killed if they ended first."""
    launch_within(launcher, uninterrupted)


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)
