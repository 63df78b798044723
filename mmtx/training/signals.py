"""How a run ends from outside: SIGTERM lets all ranks finish the step they are in, and no rank outlives the others."""

import os
import signal
import sys
import threading
import time
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments import LightningEnvironment

STATUS = 128 + signal.SIGTERM  # what a shell reports for a process that SIGTERM ended
LAUNCHER = "MMTX_LAUNCHER"     # the process that started this rank


class Termination:
    """SIGTERM is noted when it comes, to whichever rank, and obeyed by all ranks together between two steps.

    The trainer's own handler starts a collective operation within the signal handler, where other ranks may be in
    another one: then all wait for each other forever. And it ends with status 0.
    """

    def __init__(self):
        self.asked = False

    def listen(self, trainer: Trainer) -> None:
        """To be called before the trainer registers its handlers, which is after all `setup` hooks."""
        trainer._signal_connector._sigterm_notifier_fn = self._note

    def _note(self, *_: Any) -> None:
        self.asked = True

    def agreed(self, trainer: Trainer) -> bool:
        """Whether any rank was asked to end; to be called by all ranks at once."""
        return trainer.strategy.reduce_boolean_decision(self.asked, all=False)

    def leave(self, trainer: Trainer) -> None:
        """End this process; to be called by all ranks at once."""
        # A rank that Lightning started must not fail: rank 0 would be killed for it before it has cleaned up.
        started = trainer.local_rank > 0 and isinstance(trainer.strategy.cluster_environment, LightningEnvironment)
        sys.exit(0 if started else STATUS)


def follow_launcher() -> None:
    """End this process when the rank that started it has died: in a collective operation it would wait for long."""
    launcher = int(os.environ.get(LAUNCHER, 0)) if "LOCAL_RANK" in os.environ else 0
    os.environ[LAUNCHER] = str(os.getpid())
    if launcher not in (0, os.getpid()):
        threading.Thread(target=_follow, args=(launcher,), daemon=True, name="follow-launcher").start()


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)
