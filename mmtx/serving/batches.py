"""Prompts that wait together are encoded and answered together, each as it would be alone.

Whoever waits longest chooses the batch: all that are asked for in the same way and are of about its length come along. Text
that is cut earlier than its neighbours, or that nobody waits for any more, leaves the batch at the next step.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mmtx.ambient import MOST_THREADS, one_thread
from mmtx.document import Document
from mmtx.inference.choose import choose_engine
from mmtx.inference.output_scores import OutputScores
from mmtx.inference.sampling import Sampling
from mmtx.pipeline import Model, by_length
from mmtx.sequence import prompt
from mmtx.serving.limits import Refused

PATIENCE = 0.01  # seconds at most that a batch waits for requests that will be there in a moment
LEAST = 4        # rows of a batch below which a thread that has nothing to do gets no share of it


@dataclass(eq=False)
class Job:
    """A prompt on its way. In `queue` come lists of what is new: an id with its scores (V,) or None, an error, None at the end."""

    document: Document  # media are read, and encoded together with those of the others
    length: int         # tokens of its prompt
    out: str
    sampling: Sampling
    size: tuple[int, int] | None
    deadline: float     # of time.monotonic
    live: bool = False    # whether ids are told as they come, not all at the end
    scored: bool = False  # whether scores are wanted
    dropped: bool = False  # set by who no longer waits
    written: int = 0
    untold: list[Any] = field(default_factory=list)
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

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
        self._ready, self._idle, self._ended = threading.Condition(), 0, False
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
        _tell([(job, [Refused(503, "the server is going down", "going_down")]) for job in left])
        for thread in self._threads:
            thread.join()

    def _run(self, alone: bool) -> None:
        if alone:
            one_thread()
        rows = 0
        while (jobs := self._next(rows)) is not None:
            rows = len(jobs)
            if jobs:
                self._try(jobs)
            with self._ready:
                self.running -= rows

    def _try(self, jobs: Sequence[Job]) -> None:
        """Answer jobs, or tell them why not: what is wrong with one of them is not told to the others, and the server lives."""
        try:
            self._answer(jobs)
        except Exception as error:
            if len(jobs) > 1 and not any(job.written for job in jobs):
                for job in jobs:
                    self._try([job])
            else:
                _tell([(job, [error]) for job in jobs])

    def _next(self, before: int) -> list[Job] | None:
        """The next batch of a thread whose last one had `before` rows: their callers, once answered, often ask again."""
        with self._ready:
            self._idle += 1
            patient = time.monotonic() + PATIENCE
            while not self._ended and (
                    not self._jobs or (self.coming or len(self._jobs) < before) and time.monotonic() < patient):
                self._ready.wait(patient - time.monotonic() if self._jobs else None)
            self._idle -= 1
            if self._ended:
                return None
            self._jobs = [job for job in self._jobs if not job.dropped]
            if not self._jobs:
                return []
            same = [job for job in self._jobs if job.way == self._jobs[0].way]
            (chosen,) = (batch for batch in by_length([job.length for job in same]) if 0 in batch)
            share = max(LEAST, -(-len(chosen) // (1 + self._idle)))
            jobs = [same[number] for number in sorted(chosen)[:share]]
            self._jobs = [job for job in self._jobs if job not in jobs]
            self.running += len(jobs)
            return jobs

    def _answer(self, jobs: Sequence[Job]) -> None:
        self.observe(len(jobs))
        way, v = jobs[0], self.model.vocabulary
        prompts = [prompt(document, v) for document in self.model.encode_documents([job.document for job in jobs])]
        sampling = replace(way.sampling, max_new_tokens=max(job.sampling.max_new_tokens for job in jobs))
        # With a seed every job is the first of its own list; without one each draws for itself.
        places = range(len(jobs)) if sampling.seed is None else [0] * len(jobs)
        engines: list[OutputScores] = []

        def scored(*asked: Any) -> OutputScores:
            engines.append(OutputScores(choose_engine(*asked)))
            return engines[-1]

        choose = scored if any(job.scored for job in jobs) else choose_engine
        wanted = torch.ones(len(jobs), dtype=torch.bool)
        for ids in self.model.stream_ids(prompts, way.out, way.size, sampling, places, wanted, choose):
            for row, (job, ident) in enumerate(zip(jobs, ids.tolist())):
                if wanted[row]:
                    scores = engines[0].row(row) if job.scored else None
                    wanted[row] = not self._take(job, ident, scores, ident in (v.end, v.eos))
            told = [(job, job.untold) for row, job in enumerate(jobs) if job.untold and (job.live or not wanted[row])]
            for job, _ in told:
                job.untold = []
            _tell(told)
            if not wanted.any():
                return

    def _take(self, job: Job, ident: int, scores: torch.Tensor | None, ended: bool) -> bool:
        """Give a job its next id -> whether it needs no more."""
        if job.dropped:
            return True
        if time.monotonic() > job.deadline:
            job.untold.append(Refused(504, "the answer was not ready in time", "timeout"))
            return True
        job.written += 1
        job.untold.append((ident, scores))
        if ended := ended or job.out == "text" and job.written == job.sampling.max_new_tokens:
            job.untold.append(None)
        return ended


def _tell(told: Sequence[tuple[Job, list[Any]]]) -> None:
    """Put into the queues of jobs what is new, in the thread of their loop, which is woken once."""
    def put() -> None:
        for job, new in told:
            job.queue.put_nowait(new)

    if told:
        told[0][0].loop.call_soon_threadsafe(put)
