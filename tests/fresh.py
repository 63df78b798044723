"""Processes for tests, forked from a server that has imported everything and done nothing.

So a run costs seconds, and none can hold a lock that another one or the test itself waits for.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["mmtx.training.run", "mmtx.cli", "pytest"])
with contextlib.suppress(RuntimeError):  # this is one of the processes
    multiprocessing.forkserver.ensure_running()  # it imports while tests are collected

# A program that has itself run elsewhere: with its arguments, folder, environment and standard streams.
ELSEWHERE = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b" "], [0, 1, 2])
server.sendall(json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
sys.exit(int(server.recv(9)))
"""


def script(path: Path, *arguments, cwd: Path, timeout: float | None = None) -> subprocess.CompletedProcess:
    """Run a script on one thread -> its exit status and what it printed; but for what is imported, as `python PATH` does."""
    command = ["python", str(path), *map(str, arguments)]
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
        return subprocess.CompletedProcess(command[1:], process.exitcode, *(file.read().decode() for file in (out, err)))


@contextlib.contextmanager
def programs() -> Iterator[str]:
    """A folder with `mmtx` and `python`, for PATH, that run as `script` does, called by whatever program."""
    with tempfile.TemporaryDirectory() as folder, socketserver.ThreadingUnixStreamServer(f"{folder}/socket", _Elsewhere) as server:
        for name in ("mmtx", "python"):
            program = Path(folder, name)
            program.write_text(ELSEWHERE.format(python=sys.executable, address=server.server_address))
            program.chmod(0o755)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield folder
        finally:
            server.shutdown()


class _Elsewhere(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        _, streams, _, _ = socket.recv_fds(self.request, 1, 3)
        (program, *arguments), cwd, environment = json.loads(self.rfile.readline())
        command = [os.path.basename(program), *arguments]
        process = context.Process(target=_run, args=(command, cwd, environment, [Connection(number) for number in streams]))
        process.start()  # and the streams are the other process's only
        ended = process.sentinel in wait([process.sentinel, self.request])
        if not ended:
            process.terminate()  # as was the program that stands for it
        process.join()
        if ended:
            self.wfile.write(str(process.exitcode % 256).encode())


def _run(command: list[str], cwd: str, environment: dict[str, str], streams: list[Connection]) -> None:
    """`mmtx ARGUMENTS`, `python FILE ARGUMENTS` or `python -c CODE` in the process that this is."""
    import torch

    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
    sys.stdin = open(0, encoding="utf-8")
    sys.stdout, sys.stderr = open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8", buffering=1)
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    program, *sys.argv = command
    if program == "mmtx":
        from mmtx.cli import main

        main(command[1:])
    elif command[1] == "-c":
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(command[2], vars(module))
    else:
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
