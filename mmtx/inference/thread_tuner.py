"""Chooses between one thread and several for decode steps, or prompts, by timing the steps themselves.

Threads that share a step synchronise some twenty times in it. If another process holds a core, each of these waits can last
for that process's time slice, a few milliseconds: several threads are then many times slower than one. This cannot be known
in advance, so now and then a few steps are taken the other way, and the faster way is kept.
"""

import time
from collections.abc import Callable
from typing import Any

from mmtx.ambient import run_single_threaded

TRIAL = 3         # steps of a trial, which are taken the other way
AGAIN = 0.5       # least number of seconds between two trials
SHARE = 0.1       # largest share of the time that trials may take
NEWEST = 0.2      # weight of the latest step in the running mean of seconds per step


class ThreadTuner:
    """Chooses how the next step runs: on several threads (`shared`), or on one.

    A trial ends early once it has taken as long as all of its steps would have taken the usual way, so that it costs little
    even if it is much slower. Threads that take steps concurrently may share a tuner, which then measures a mixture.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.shared = True                                                   # how the next step runs
        self._clock = clock
        self._seconds: dict[bool, float | None] = {True: None, False: None}  # of a step, each way
        self._trial: list[float] | None = []                                 # seconds of its steps, while one runs
        self._next = 0.0                                                     # when the next trial begins

    def run(self, step: Callable[[bool], Any], size: int = 1) -> Any:
        """The result of `step(shared)`, run the chosen way; `size` is its amount of work, by which its time is divided."""
        shared, start = self.shared, self._clock()
        found = step(True) if shared else run_single_threaded(lambda: step(False))
        self.record(shared, (self._clock() - start) / size)
        return found

    def record(self, shared: bool, seconds: float) -> None:
        """Record that a step that ran this way took so many seconds."""
        if shared != self.shared:
            return
        here, there, trial = self._seconds[shared], self._seconds[not shared], self._trial
        if trial is None:
            self._seconds[shared] = seconds if here is None else here + NEWEST * (seconds - here)
            if self._clock() >= self._next:
                self._trial, self.shared = [], not shared
            return
        self._trial = trial = [*trial, seconds]
        spent = sum(trial)
        if len(trial) < TRIAL and (there is None or spent < TRIAL * there):
            return
        self._seconds[shared] = mean = spent / len(trial)
        if there is None:  # the very first trial: now measure the other way
            self._trial, self.shared = [], not shared
            return
        self._next = self._clock() + max(AGAIN, spent / SHARE)
        self._trial, self.shared = None, shared if mean <= there else not shared
