"""Prompts that wait together are answered together, each as it would be alone.

Whoever waits longest chooses the batch: all that are asked for in the same way and are of about its length come along. Text
that is cut earlier than its neighbours, or that nobody waits for any more, leaves the batch at the next step.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmtx.ambient import MOST_THREADS, one_thread
from mmtx.inference.choose import choose_engine
from mmtx.inference.sampling import Sampling
from mmtx.inference.scored import Scored
from mmtx.pipeline import Model, by_length
from mmtx.sequence import Prompt
from mmtx.serving.limits import Refused

PATIENCE = 0.01  # seconds at most that a batch waits for requests whose media are being read


@dataclass(eq=False)
class Job:
    """A prompt on its way. `tell` gets each id with its log-probabilities (V,) or None, and None or an error at the end."""

    prompt: Prompt
    out: str
    sampling: Sampling
    size: tuple[int, int] | None
    deadline: float                # of time.monotonic
    tell: Callable[[Any], None]
    scored: bool = False           # whether log-probabilities are wanted
    dropped: bool = False          # set by who no longer waits
    written: int = 0

    @property
    def way(self) -> tuple:
        """What those of a batch must agree in. Text that may be longer begins with the same ids."""
        cut = None if self.out == "text" else self.sampling.max_new_tokens
        return self.out, replace(self.sampling, max_new_tokens=1), cut, self.size


class Batches:
    """Threads that answer jobs; on a CPU as many as torch may use, with one thread of torch's each."""

    def __init__(self, model: Model, observe: Callable[[int], None] = lambda rows: None):
        self.model, self.observe = model, observe
        self.coming = 0   # requests whose jobs will be there in a moment
        self.running = 0  # prompts that are being answered
        self._jobs: list[Job] = []
        self._ready, self._ended = threading.Condition(), False
        on_cpu = model.decoder.embedding.weight.device.type == "cpu"
        count = min(torch.get_num_threads(), MOST_THREADS) if on_cpu else 1
        self._threads = [threading.Thread(target=self._run, args=(on_cpu,), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        with self._ready:
            self._jobs.append(job)
            self._ready.notify()

    def close(self) -> None:
        """Answer what is under way and end; what waits is refused."""
        with self._ready:
            self._ended = True
            left, self._jobs = self._jobs, []
            self._ready.notify_all()
        for job in left:
            job.tell(Refused(503, "the server is going down", "going_down"))
        for thread in self._threads:
            thread.join()

    def _run(self, alone: bool) -> None:
        if alone:
            one_thread()
        while (jobs := self._next()) is not None:
            self.running += len(jobs)
            try:
                if jobs:
                    self._answer(jobs)
            except Exception as error:  # each of them is told, and the server lives
                for job in jobs:
                    job.tell(error)
            self.running -= len(jobs)

    def _next(self) -> list[Job] | None:
        with self._ready:
            while not self._jobs:
                if self._ended:
                    return None
                self._ready.wait()
            patient = time.monotonic() + PATIENCE
            while self.coming and self._jobs and (left := patient - time.monotonic()) > 0:
                self._ready.wait(left)
            self._jobs = [job for job in self._jobs if not job.dropped]
            if not self._jobs:
                return []
            same = [job for job in self._jobs if job.way == self._jobs[0].way]
            (chosen,) = (batch for batch in by_length([len(job.prompt.ids) for job in same]) if 0 in batch)
            jobs = [same[number] for number in sorted(chosen)]
            self._jobs = [job for job in self._jobs if job not in jobs]
            return jobs

    def _answer(self, jobs: Sequence[Job]) -> None:
        self.observe(len(jobs))
        way = jobs[0]
        sampling = replace(way.sampling, max_new_tokens=max(job.sampling.max_new_tokens for job in jobs))
        # With a seed every job is the first of its own list; without one each draws for itself.
        places = range(len(jobs)) if sampling.seed is None else [0] * len(jobs)
        engines: list[Scored] = []
        choose = (lambda *asked: engines.append(Scored(choose_engine(*asked))) or engines[-1]) if (
            any(job.scored for job in jobs)) else choose_engine
        wanted, ends = torch.ones(len(jobs), dtype=torch.bool), (self.model.vocabulary.end, self.model.vocabulary.eos)
        for ids in self.model.stream_ids([job.prompt for job in jobs], way.out, way.size, sampling, places, wanted, choose):
            for row, (job, ident) in enumerate(zip(jobs, ids.tolist())):
                if wanted[row] and self._tell(job, ident, engines[0].row(row) if job.scored else None, ident in ends):
                    wanted[row] = False
            if not wanted.any():
                return

    def _tell(self, job: Job, ident: int, scores: torch.Tensor | None, ended: bool) -> bool:
        """Give a job its next id -> whether it needs no more."""
        if job.dropped:
            return True
        if time.monotonic() > job.deadline:
            job.tell(Refused(504, "the answer was not ready in time", "timeout"))
            return True
        job.written += 1
        job.tell((ident, scores))
        if ended := ended or job.out == "text" and job.written == job.sampling.max_new_tokens:
            job.tell(None)
        return ended
