"""Prompts that wait together are encoded and answered together, each as it would be alone.

Whoever waits longest chooses the batch: all that are asked for in the same way and are of about its length come along. Text
that is cut earlier than its neighbours, or that nobody waits for any more, leaves the batch at the next step. Behind long answers
nobody waits: from its first turn on, a batch takes turns with those that come after it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
TURN = 16        # steps of a turn: a caption needs fewer, and so is answered in one
BESIDE = 4       # batches at most that take turns with those of the threads, each of which holds its keys and values


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

    @property
    def way(self) -> tuple:
        """What those of a batch must agree in. Text that may be longer begins with the same ids."""
        cut = None if self.out == "text" else self.sampling.max_new_tokens
        return self.out, replace(self.sampling, max_new_tokens=1), cut, self.size

    def take(self, ident: int, scores: torch.Tensor | None, ended: bool) -> bool:
        """Its next id -> whether it needs no more."""
        if self.dropped:
            return True
        if time.monotonic() > self.deadline:
            self.untold.append(Refused(504, "the answer was not ready in time", "timeout"))
            return True
        self.written += 1
        self.untold.append((ident, scores))
        if ended := ended or self.out == "text" and self.written == self.sampling.max_new_tokens:
            self.untold.append(None)
        return ended


class Batches:
    """Answers jobs; on a CPU as many batches at a time as torch may use threads, each with one thread of torch's.

    Belongs to the loop in which it is made: only `_answer` and what it calls runs in other threads.
    """

    def __init__(self, model: Model, observe: Callable[[int], None] = lambda rows: None):
        self.model, self.observe, self.loop = model, observe, asyncio.get_running_loop()
        self.coming = 0   # requests whose jobs will be there in a moment
        self.running = 0  # prompts that are being answered
        self._jobs: list[Job] = []
        self._arrived, self._idle = asyncio.Event(), 0
        on_cpu = model.decoder.embedding.weight.device.type == "cpu"
        count = min(torch.get_num_threads(), MOST_THREADS) if on_cpu else 1
        self._threads = ThreadPoolExecutor(count, "batches", one_thread if on_cpu else None)
        self._workers = {asyncio.create_task(self._work()) for _ in range(count)}
        self._beside: set[asyncio.Task] = set()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)
        self._arrived.set()

    async def answer(self, job: Job) -> AsyncIterator[tuple[int, torch.Tensor | None]]:
        """Each id of a job with its scores, as it comes. Who ends early gives the place to others."""
        self.submit(job)
        try:
            while True:
                for new in await job.queue.get():
                    if new is None:
                        return
                    if isinstance(new, Exception):
                        raise new
                    yield new
        finally:
            self.drop(job)

    def drop(self, job: Job) -> None:
        """Nobody waits for a job any more: its place is free at once, or at the next step of its batch, and its queue ends."""
        job.dropped = True
        with suppress(ValueError):
            self._jobs.remove(job)
        job.queue.put_nowait([None])

    async def close(self) -> None:
        """End with the turns that are under way; what waits is refused."""
        for task in self._workers | self._beside:
            task.cancel()
        for job in self._jobs:
            job.queue.put_nowait([Refused(503, "the server is going down", "going_down")])
        await asyncio.to_thread(self._threads.shutdown)

    async def _work(self) -> None:
        """Answer batch after batch. One that needs a second turn goes on beside the next, if there are not too many of them."""
        rows = 0
        while True:
            jobs = await self._next(rows)
            rows = len(jobs)
            self.running += rows
            turns = self._turns(jobs)
            while (more := await self._turn(turns)) and len(self._beside) >= BESIDE:
                pass
            if more:
                task = asyncio.create_task(self._finish(turns, rows))
                self._beside.add(task)
                task.add_done_callback(self._beside.discard)
            else:
                self.running -= rows

    async def _finish(self, turns: Iterator[bool], rows: int) -> None:
        while await self._turn(turns):
            pass
        self.running -= rows

    async def _turn(self, turns: Iterator[bool]) -> bool:
        """Let a batch take its turn, when a thread is free -> whether it needs another."""
        return await self.loop.run_in_executor(self._threads, next, turns, False)

    async def _next(self, before: int) -> list[Job]:
        """The next batch of a thread whose last one had `before` rows: their callers, once answered, often ask again."""
        self._idle += 1
        patient = self.loop.time() + PATIENCE
        while not self._jobs or (self.coming or len(self._jobs) < before) and self.loop.time() < patient:
            self._arrived.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(patient if self._jobs else None):
                    await self._arrived.wait()
        same = [job for job in self._jobs if job.way == self._jobs[0].way]
        (chosen,) = (batch for batch in by_length([job.length for job in same]) if 0 in batch)
        share = max(LEAST, -(-len(chosen) // self._idle))
        self._idle -= 1
        jobs = [same[number] for number in sorted(chosen)[:share]]
        self._jobs = [job for job in self._jobs if job not in jobs]
        return jobs

    def _turns(self, jobs: Sequence[Job]) -> Iterator[bool]:
        """Answer jobs turn by turn, or tell them why not: what is wrong with one is not told to the others, and the server lives."""
        try:
            yield from self._answer(jobs)
        except Exception as error:
            if len(jobs) > 1 and not any(job.written for job in jobs):
                for job in jobs:
                    yield from self._turns([job])
            else:
                self._tell([(job, [error]) for job in jobs])

    def _answer(self, jobs: Sequence[Job]) -> Iterator[bool]:
        self.observe(len(jobs))
        way, v = jobs[0], self.model.vocabulary
        documents = self.model.encode_documents([job.document for job in jobs], codes=False)
        prompts = [prompt(document, v) for document in documents]
        sampling = replace(way.sampling, max_new_tokens=max(job.sampling.max_new_tokens for job in jobs))
        # With a seed every job is the first of its own list; without one each draws for itself.
        places = range(len(jobs)) if sampling.seed is None else [0] * len(jobs)
        engines: list[OutputScores] = []

        def scored(*asked: Any) -> OutputScores:
            engines.append(OutputScores(choose_engine(*asked)))
            return engines[-1]

        choose = scored if any(job.scored for job in jobs) else choose_engine
        wanted = torch.ones(len(jobs), dtype=torch.bool)
        for step, ids in enumerate(self.model.stream_ids(prompts, way.out, way.size, sampling, places, wanted, choose), 1):
            for row, (job, ident) in enumerate(zip(jobs, ids.tolist())):
                if wanted[row]:
                    scores = engines[0].row(row) if job.scored else None
                    wanted[row] = not job.take(ident, scores, ident in (v.end, v.eos))
            told = [(job, job.untold) for row, job in enumerate(jobs) if job.untold and (job.live or not wanted[row])]
            for job, _ in told:
                job.untold = []
            self._tell(told)
            if not wanted.any():
                return
            if step % TURN == 0:
                yield True

    def _tell(self, told: Sequence[tuple[Job, list[Any]]]) -> None:
        """Put into the queues of jobs what is new, in the thread of the loop, which is woken once."""
        def put() -> None:
            for job, new in told:
                job.queue.put_nowait(new)

        if told:
            self.loop.call_soon_threadsafe(put)
