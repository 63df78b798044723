"""Processes for tests, forked from a server that has imported everything and done nothing.

So a run costs seconds, and none can hold a lock that another one or the test itself waits for.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["mmtx.training.run", "mmtx.cli", "pytest"])
with contextlib.suppress(RuntimeError):  # this is one of the processes
    multiprocessing.forkserver.ensure_running()  # it imports while tests are collected


def script(path: Path, *arguments, cwd: Path, timeout: float | None = None) -> subprocess.CompletedProcess:
    """Run a script on one thread -> its exit status and what it printed; but for what is imported, as `python PATH` does."""
    command = [str(path), *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nothing:
        streams = [Connection(os.dup(file.fileno())) for file in (nothing, out, err)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # for processes that it starts
        process = context.Process(target=_run, args=(command, str(cwd), environment, streams))
        process.start()
        process.join(timeout)
        process.kill()  # if it is still at work
        process.join()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(command, process.exitcode, *(file.read().decode() for file in (out, err)))


def _run(command: list[str], cwd: str, environment: dict[str, str], streams: list[Connection]) -> None:
    import torch

    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
    sys.stdin = open(0, encoding="utf-8")
    sys.stdout, sys.stderr = open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8", buffering=1)
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    runpy.run_path(command[0], run_name="__main__")
