"""Many small runs at once: processes that are started fresh, each on one device, take one run after another until a deadline.

Small decoders are bound by how fast one core can launch their kernels, so several of them share a GPU well, and cores that are left
train the smallest.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

DEVICES = "CUDA_VISIBLE_DEVICES"


class Task(NamedTuple):
    """A call of a function: `stage` says what is to come first, and `cost` what is worth a GPU."""

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
    """The devices of as many processes: `jobs` on the GPU, or on the CPU where there is none, and `cpu_jobs` more on the CPU."""
    import torch

    return ["cuda" if torch.cuda.is_available() else "cpu"] * jobs + ["cpu"] * cpu_jobs


def side_by_side(work: Callable, tasks: Sequence[Task], devices: Sequence[str], seconds: float, logs: Path) -> Iterator[Done]:
    """Call `work(device, *arguments)` for all tasks, one process for each of `devices` -> what is done, in the order of its end.

    `work` must be of a module. Of what may begin, a GPU takes the dearest and a CPU the cheapest. What fails is told with its traceback,
    and the others go on; at the deadline what still runs is ended. What runs print goes to files in `logs`.
    """
    left = sorted(tasks, key=lambda task: (task.stage, task.cost))
    context, deadline, mixed = multiprocessing.get_context("spawn"), time.monotonic() + seconds, len(set(devices)) > 1
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[Connection, tuple[multiprocessing.process.BaseProcess, str, Task | None, float]] = {}

    def give(connection: Connection) -> None:
        process, device, *_ = running[connection]
        if not left:
            running.pop(connection)
            connection.close()
            return
        count = sum(task.stage == left[0].stage for task in left)
        task = left.pop(0 if mixed and device == "cpu" else count - 1)  # alone of its kind a device begins with the longest
        running[connection] = process, device, task, time.monotonic()
        connection.send((task.name, task.arguments))

    processes = []
    for number, device in enumerate(devices[:len(tasks)]):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(work, device, theirs, logs / f"{number}-{device}.log"), daemon=True)
        kept = {name: os.environ.get(name) for name in (DEVICES, "OMP_NUM_THREADS")}
        os.environ |= {"OMP_NUM_THREADS": "1", **({DEVICES: ""} if device == "cpu" else {})}
        process.start()
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()
        processes.append(process)
        running[ours] = process, device, None, 0.0
        give(ours)
    try:
        while running and (ready := wait(list(running), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                process, device, task, begin = running[connection]
                try:
                    found, trouble = connection.recv()
                except EOFError:
                    running.pop(connection)
                    process.join()
                    print(f"{task.name} on {device}: the process ended with {process.exitcode}", file=sys.stderr, flush=True)
                    continue
                give(connection)
                if trouble:
                    print(f"{task.name} on {device} failed:\n{trouble}", file=sys.stderr, flush=True)
                else:
                    yield Done(task.name, found, device, time.monotonic() - begin)
        unfinished = [task.name for *_, task, _ in running.values()] + [task.name for task in left]
        if unfinished:
            print(f"not finished after {seconds:g} s: {', '.join(unfinished)}", file=sys.stderr, flush=True)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _serve(work: Callable, device: str, connection: Connection, log: Path) -> None:
    """What a process does: one task after another, until there are no more."""
    with open(log, "a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            _, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = work(device, *arguments), None
        except (Exception, SystemExit):
            answer = None, traceback.format_exc()
        connection.send(answer)
