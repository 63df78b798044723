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
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["mmtx.training.run", "mmtx.cli", "pytest"])
with contextlib.suppress(RuntimeError):  # this is one of the processes
    multiprocessing.forkserver.ensure_running()  # it imports while tests are collected


def script(path: Path, *arguments, cwd: Path, timeout: float | None = None) -> subprocess.CompletedProcess:
    """Run a script on one thread -> its exit status and what it printed; but for what is imported, as `python PATH` does."""
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "out"), Path(folder, "err")
        command = [str(path), *map(str, arguments)]
        process = context.Process(target=_script, args=(command, str(cwd), *map(str, printed)))
        process.start()
        process.join(timeout)
        process.kill()  # if it is still at work
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode, *(each.read_text("utf-8") for each in printed))


def _script(command: list[str], cwd: str, out: str, err: str) -> None:
    import torch

    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8", buffering=1)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that it starts
    os.chdir(cwd)
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    runpy.run_path(command[0], run_name="__main__")
