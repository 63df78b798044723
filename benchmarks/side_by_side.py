"""Many small runs in parallel: freshly started processes, each on one device, take one run after another until a deadline.

Small decoders are limited by how fast one core launches their kernels, so several of them share a GPU well, and remaining cores
train the smallest.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, cast

DEVICES = "CUDA_VISIBLE_DEVICES"
CAUTION = 1.5  # cores that share caches and clock are slower than one alone


class Task(NamedTuple):
    """A function call. `cost` is its approximate core time in seconds; tasks of a lower `stage` start first."""

    name: str
    arguments: tuple
    cost: float
    stage: int = 0


class Done(NamedTuple):
    name: str
    found: Any          # what the function returned
    device: str
    seconds: float


def slots(jobs: int, cpu_jobs: int) -> list[str]:
    """One device per process: `jobs` on the GPU, or on the CPU if there is none, and `cpu_jobs` more on the CPU."""
    import torch

    return ["cuda" if torch.cuda.is_available() else "cpu"] * jobs + ["cpu"] * cpu_jobs


def side_by_side(work: Callable, tasks: list[Task], devices: Sequence[str], seconds: float, logs: Path) -> Iterator[Done]:
    """Call `work(device, *arguments)` for all tasks, with one process per device -> results in order of completion.

    `work` must be a module-level function. Tasks may be appended to the list in the meantime. A GPU takes the most expensive task, a
    CPU the most expensive that it can finish. A failed task is reported with its traceback, and the others go on; tasks still running
    at the deadline are ended. Output of the tasks goes to files in `logs`.
    """
    context, deadline = multiprocessing.get_context("spawn"), time.monotonic() + seconds
    logs.mkdir(parents=True, exist_ok=True)
    processes: dict[Connection, tuple[multiprocessing.process.BaseProcess, str]] = {}
    for number, device in enumerate(devices):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(work, device, theirs, logs / f"{number}-{device}.log"), daemon=True)
        with _environment(OMP_NUM_THREADS="1", **({DEVICES: ""} if device == "cpu" else {})):
            process.start()
        theirs.close()
        processes[ours] = process, device
    idle, running = dict.fromkeys(processes), dict[Connection, tuple[Task, float]]()
    try:
        while True:
            for connection in [*idle]:
                left = deadline - time.monotonic()
                if not tasks or left <= 0:
                    break
                task = _choose(tasks, processes[connection][1], left)
                tasks.remove(task)
                del idle[connection]
                running[connection] = task, time.monotonic()
                connection.send(task.arguments)
            ready = wait(list(running), max(0.0, deadline - time.monotonic())) if running else []
            if not ready:
                break
            for connection in cast("list[Connection]", ready):
                (process, device), (task, begin) = processes[connection], running.pop(connection)
                try:
                    found, trouble = connection.recv()
                except EOFError:
                    process.join()
                    print(f"{task.name} on {device}: the process ended with {process.exitcode}", file=sys.stderr, flush=True)
                    continue
                idle[connection] = None
                if trouble:
                    print(f"{task.name} on {device} failed:\n{trouble}", file=sys.stderr, flush=True)
                else:
                    yield Done(task.name, found, device, time.monotonic() - begin)
        unfinished = [task.name for task in (*(task for task, _ in running.values()), *tasks)]
        if unfinished:
            print(f"not finished after {seconds:g} s: {', '.join(unfinished)}", file=sys.stderr, flush=True)
    finally:
        for process, _ in processes.values():
            process.kill()
            process.join()


def _choose(tasks: list[Task], device: str, seconds: float) -> Task:
    """The next task for a device that has `seconds` left."""
    first = min(task.stage for task in tasks)
    ready = sorted((task for task in tasks if task.stage == first), key=lambda task: task.cost)
    if device == "cpu":
        return next((task for task in reversed(ready) if CAUTION * task.cost <= seconds), ready[0])
    return ready[-1]


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for processes started in this context."""
    kept = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(work: Callable, device: str, connection: Connection, log: Path) -> None:
    """Main loop of a process: one task after another, until there are no more."""
    with open(log, "a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = work(device, *arguments), None
        except (Exception, SystemExit):
            answer = None, traceback.format_exc()
        connection.send(answer)
