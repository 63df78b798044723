"""How long and how often a server is asked: failures that may pass, the time for one medium, calls without a timeout."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

TOTAL = 40.0         # seconds for a medium, including all retries
SLOWEST = 2**14      # bytes per second that earn back time, so that a large source may take longer than TOTAL
RETRIES = 3          # of transient failures: a busy server, a lost connection
FORGIVEN = 2**20     # bytes after which earlier failures no longer count
PAUSE = 0.5          # seconds before the first retry, doubled before each further one
LONGEST_PAUSE = 10.0  # seconds that a server may ask for


class Failure(Exception):
    """A failure, described without any URL; `transient` if a retry may help, after `pause` seconds."""

    def __init__(self, message: str, transient: bool = False, pause: float | None = None):
        super().__init__(message)
        self.transient, self.pause = transient, pause


class Budget:
    """The time that may be spent on a server, and how often it may fail."""

    def __init__(self):
        self.seconds, self.end, self.failed, self.since = TOTAL, 0.0, 0, 0

    @property
    def left(self) -> float:
        """Seconds until `end`, negative after it."""
        return self.end - time.monotonic()

    def spend(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """Call `run` while the clock runs, until `end` at the latest, and again after failures that may pass."""
        self.end = time.monotonic() + self.seconds
        try:
            while True:
                try:
                    return run(*arguments)
                except Failure as failure:
                    self._wait(failure)
        finally:
            self.seconds = max(0.0, self.left)

    def earn(self, count: int) -> None:
        """Earn back time for received bytes, so that a large source can be read to its end, but not at a trickle."""
        self.seconds = min(TOTAL, self.seconds + count / SLOWEST)
        self.since += count
        if self.since > FORGIVEN:
            self.failed = self.since = 0

    def _wait(self, failure: Failure) -> None:
        """Sleep before the next attempt, or raise the failure if a retry would not help or is not allowed."""
        pause = PAUSE * 2**self.failed if failure.pause is None else failure.pause
        self.failed, self.since = self.failed + 1, 0
        if not failure.transient or self.failed > RETRIES or pause > min(LONGEST_PAUSE, self.left):
            raise failure
        time.sleep(pause)


def out_of_time() -> str:
    """What errors say of a medium that took more than TOTAL."""
    return f"no complete response within {TOTAL:g} s"


def in_time(seconds: float, run: Callable[..., Any], *arguments: Any) -> Any:
    """Call `run`, which has no timeout of its own. Raises TimeoutError if it takes too long, leaving it to run on in its thread."""
    outcome: Future = Future()

    def work() -> None:
        try:
            outcome.set_result(run(*arguments))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome.result(max(0.0, seconds))
