"""Batching of requests: prompts that wait together are encoded and answered together, each as it would be alone.

The job that has waited longest determines the batch: all with the same settings and about its length join it. Text that is cut
earlier than the rest of its batch, or whose caller has gone, leaves the batch at the next step. Long answers do not block others:
after its first turn, a batch takes turns with those that come after it.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from mmtx.ambient import MOST_THREADS, one_thread
from mmtx.batching import by_length
from mmtx.document import Document
from mmtx.inference.choose import choose_engine
from mmtx.inference.output_scores import OutputScores
from mmtx.inference.sampling import Sampling
from mmtx.pipeline import Model
from mmtx.sequence import prompt
from mmtx.serving.limits import Refused, in_time

MAX_WAIT = 0.01  # most seconds that a batch waits for requests that are about to arrive
MIN_ROWS = 4     # fewest rows in the share of an idle thread when a batch is split
TURN = 16        # steps in a turn: a caption needs fewer, and so is answered in one
MAX_SUSPENDED = 4  # most batches that wait for their next turn, each of which holds its KV cache
CUT = ("text", "document")  # kinds of answers that end at their limit, whatever is open: only their text is delivered


@dataclass(eq=False)
class Job:
    """A prompt being answered. `queue` gets `number` with lists of ids and their scores (V,) or None; then None, or an error."""

    document: Document  # its media are decoded, and are encoded together with those of other jobs
    length: int         # tokens of its prompt
    out: str
    sampling: Sampling
    size: tuple[int, int] | None
    deadline: float     # in the event loop's time
    queue: asyncio.Queue     # shared by the jobs of a request
    number: int = 0          # among the jobs of its request, which determines the random choices under a seed
    stream: bool = False     # whether ids are delivered as they come, not all at the end
    logprobs: bool = False   # whether scores are wanted
    cancelled: bool = False  # whether the caller no longer waits
    written: int = 0
    undelivered: list[tuple[int, torch.Tensor | None]] = field(default_factory=list)

    @cached_property
    def settings(self) -> tuple:
        """The settings that jobs of a batch must share; not the limit of answers in CUT: longer ones start with the same ids."""
        cut = None if self.out in CUT else self.sampling.max_new_tokens
        return self.out, replace(self.sampling, max_new_tokens=1), cut, self.size

    def append(self, ident: int, scores: torch.Tensor | None) -> bool:
        """Add the next id -> whether the answer ends here, because it is cut or cancelled."""
        self.written += 1
        self.undelivered.append((ident, scores))
        return self.cancelled or self.out in CUT and self.written == self.sampling.max_new_tokens


class BatchScheduler:
    """Answers jobs; on a CPU in as many threads as torch may use, each of which runs torch single-threaded.

    An instance belongs to the event loop in which it is made: only `_work` and what it calls run in other threads.
    """

    def __init__(self, model: Model, observe: Callable[[int], None] = lambda rows: None):
        self.model, self.observe, self.loop = model, observe, asyncio.get_running_loop()
        self.arriving = 0  # requests that are about to submit a job
        self.running: set[Job] = set()  # jobs being answered
        self._jobs: list[Job] = []      # jobs that wait
        self._suspended: deque[Iterator[bool]] = deque()  # batches that wait for their next turn
        self._changed, self._idle, self._closed = threading.Condition(), 0, False  # its lock guards all that changes
        self._on_cpu = model.decoder.embedding.weight.device.type == "cpu"
        count = min(torch.get_num_threads(), MOST_THREADS) if self._on_cpu else 1
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    async def answer(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, list[tuple[int, torch.Tensor | None]] | None], None]:
        """The number of a job with its new ids and their scores, as they come, and with None at its end; `jobs` share a queue.

        Closing the iterator early drops the jobs.
        """
        with self._changed:
            self._jobs += jobs
            self._changed.notify_all()
        going = {job.number for job in jobs}
        try:
            while going:
                async with in_time(jobs[0].deadline):
                    number, new = await jobs[0].queue.get()
                if isinstance(new, Exception):
                    raise new
                if new is None:
                    going.discard(number)
                yield number, new
        finally:
            self.cancel(jobs)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Abandon jobs: each frees its place at once, or at the next step of its batch, and ends in its queue."""
        for job in jobs:
            job.cancelled = True
            job.queue.put_nowait((job.number, None))
        with self._changed:
            self._jobs = [job for job in self._jobs if not job.cancelled]

    async def close(self) -> None:
        """Stop after the turns in progress; jobs that have not begun are refused."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for job in self._jobs:
            job.queue.put_nowait((job.number, Refused(503, "the server is shutting down", "going_down")))
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _work(self) -> None:
        """Let batches take turns until the server closes: if there are both new and begun ones, alternately."""
        if self._on_cpu:
            one_thread()
        rows, new = 0, False  # of the last new batch, and whether it was the last turn
        while True:
            with self._changed:
                self._wait(rows)
                if self._closed:
                    return
                if new := bool(self._jobs) and len(self._suspended) < MAX_SUSPENDED and not (new and self._suspended):
                    turns, rows = self._next()
                elif self._suspended:
                    turns = self._suspended.popleft()
                else:  # another thread was faster
                    continue
            if next(turns, False):
                with self._changed:
                    self._suspended.append(turns)
                    self._changed.notify()

    def _wait(self, before: int) -> None:
        """Wait for work, then up to MAX_WAIT longer, if no batch waits, for more jobs that may come.

        These are jobs about to be submitted, and those of the callers of the previous batch of `before` rows, who often ask again.
        """
        patient = time.monotonic() + MAX_WAIT
        self._idle += 1
        self._changed.wait_for(lambda: self._jobs or self._suspended or self._closed)
        self._changed.wait_for(lambda: self._suspended or self._closed or not self.arriving and len(self._jobs) >= before,
                               max(0.0, patient - time.monotonic()))
        self._idle -= 1

    def _next(self) -> tuple[Iterator[bool], int]:
        """The next batch, of a size that leaves a share for each idle thread, and its number of rows."""
        same = [job for job in self._jobs if job.settings == self._jobs[0].settings]
        (chosen,) = (batch for batch in by_length([job.length for job in same]) if 0 in batch)
        share = max(MIN_ROWS, -(-len(chosen) // (self._idle + 1)))
        jobs = [same[number] for number in sorted(chosen)[:share]]
        self._jobs = [job for job in self._jobs if job not in jobs]
        self.running.update(jobs)
        return self._turns(jobs), len(jobs)

    def _turns(self, jobs: Sequence[Job]) -> Iterator[bool]:
        """Answer jobs turn by turn, or report an error to the job that caused it, not to the others of its batch."""
        try:
            yield from self._answer(jobs)
        except Exception as error:
            if len(jobs) > 1 and not any(job.written for job in jobs):
                for job in jobs:
                    yield from self._turns([job])
                return
            self._deliver([], jobs, error)

    def _answer(self, jobs: Sequence[Job]) -> Iterator[bool]:
        self.observe(len(jobs))
        way, v = jobs[0], self.model.vocabulary
        documents = self.model.encode_documents([job.document for job in jobs], codes=False)
        prompts = [prompt(document, v) for document in documents]
        sampling = replace(way.sampling, max_new_tokens=max(job.sampling.max_new_tokens for job in jobs))
        # With a seed, each job draws by its place in its own request; without one, independently.
        places = range(len(jobs)) if sampling.seed is None else [job.number for job in jobs]
        engines: list[OutputScores] = []

        def scored(*asked: Any) -> OutputScores:
            engines.append(OutputScores(choose_engine(*asked)))
            return engines[-1]

        choose = scored if any(job.logprobs for job in jobs) else choose_engine
        wanted = torch.ones(len(jobs), dtype=torch.bool)
        rows = dict(enumerate(jobs))  # those still in progress
        for step, column in enumerate(self.model.stream_ids(prompts, way.out, way.size, sampling, places, wanted, choose), 1):
            ids = column.tolist()
            over = [row for row, job in rows.items() if job.append(ids[row], engines[0].row(row) if job.logprobs else None)
                    or ids[row] in (v.end, v.eos)]
            wanted[over] = False
            ended = [rows[row] for row in over]
            self._deliver([job for job in rows.values() if job.stream or job in ended], ended, None)
            rows = {row: job for row, job in rows.items() if row not in over}
            if not rows:
                return
            if step % TURN == 0:
                yield True

    def _deliver(self, jobs: Sequence[Job], ended: Sequence[Job], last: Exception | None) -> None:
        """Put new ids into the queues of `jobs`, and `last` into those of `ended`, in the thread of the event loop."""
        new = [(job, job.undelivered) for job in jobs] + [(job, last) for job in ended]

        def put() -> None:
            for job, item in new:
                job.queue.put_nowait((job.number, item))

        for job in jobs:
            job.undelivered = []
        self.running.difference_update(ended)
        if new:
            self.loop.call_soon_threadsafe(put)  # which wakes it once
