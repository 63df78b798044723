"""Whether steps, or prompts, are faster on one thread or on several, told from the steps themselves.

Threads that share a step wait for one another some twenty times in it. Where another process holds a core, each of these
waits can last until that process has had its turn, a few milliseconds: several threads then cost many times what one does.
Nothing tells beforehand, so now and then a few steps are taken the other way, and the faster way goes on.
"""

import time
from collections.abc import Callable
from typing import Any

from mmtx.ambient import run_single_threaded

TRIAL = 3         # steps that compare one way with the other
AGAIN = 0.5       # seconds between two trials, at least
SHARE = 0.1       # of the time that trials may take, at most
NEWEST = 0.2      # weight of the last step in the seconds that a step takes


class ThreadTuner:
    """Which way the next step takes: on several threads (`shared`), or on one.

    A trial ends early once it has taken as long as all of its steps would the other way, so that it costs little where the
    other way is much slower. Threads that take steps at the same time may ask one tuner: what they tell is then a mixture.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.shared = True                                                   # how the next step is taken
        self._clock = clock
        self._seconds: dict[bool, float | None] = {True: None, False: None}  # of a step, each way
        self._trial: list[float] | None = []                                 # seconds of its steps, while one runs
        self._next = 0.0                                                     # when the next trial begins

    def run(self, step: Callable[[bool], Any], size: int = 1) -> Any:
        """What a step returns, which is told whether threads share it. Steps take longer the larger their `size` is."""
        shared, start = self.shared, self._clock()
        found = step(True) if shared else run_single_threaded(lambda: step(False))
        self.record(shared, (self._clock() - start) / size)
        return found

    def record(self, shared: bool, seconds: float) -> None:
        """A step that was taken this way has taken so long."""
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
        if there is None:  # the first of all: now the other way
            self._trial, self.shared = [], not shared
            return
        self._next = self._clock() + max(AGAIN, spent / SHARE)
        self._trial, self.shared = None, shared if mean <= there else not shared
