"""Processes that work for this one, of which any may be killed at any moment."""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from mmtx.errors import InputError

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class Ended(Exception):
    """A process ended before its work did."""


class Workers:
    """Processes that are started fresh, each at the end of a pipe of its own.

    Those of the standard library's pool are forked with whatever locks other threads hold, and share locks and pipes: one
    that is killed while it holds one stops all. Here the end of a process is the end of its pipe.
    """

    def __init__(self, count: int, work: Callable[..., Any], setting: Any):
        """`work(setting, ...)` is what they do: a function of a module, which is imported before they are forked."""
        context = multiprocessing.get_context(METHOD)
        if METHOD == "forkserver":
            context.set_forkserver_preload([work.__module__])
        self.processes: list[tuple[Any, Connection]] = []
        self.free: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        data = pickle.dumps((work, setting))
        self.threads = ThreadPoolExecutor(count, "worker")  # each waits for an answer
        try:
            with uninterrupted():
                for _ in range(count):
                    here, there = context.Pipe()
                    with there:
                        make = context.Process  # type: ignore[attr-defined]  # all contexts have one
                        process = make(target=_serve, args=(there, data), daemon=True)
                        process.start()
                    self.processes.append((process, here))
                    self.free.put(here)
        except BaseException:
            self.end()
            raise

    def submit(self, arguments: bytes) -> Future:
        """Have `work(setting, *arguments)` done, of pickled arguments. Its result may raise what that does, or Ended."""
        return self.threads.submit(self._ask, arguments)

    def _ask(self, arguments: bytes) -> Any:
        pipe = self.free.get()
        try:
            pipe.send_bytes(arguments)
            answer = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            raise Ended from None
        finally:
            self.free.put(pipe)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """End all at once, whatever they do."""
        for process, _ in self.processes:
            process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process, pipe in self.processes:
            process.join()
            pipe.close()


class uninterrupted:
    """Within, Ctrl-C waits. Processes that are started never see it, not even while Python itself begins there."""

    def __enter__(self) -> None:
        self.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None

    def __exit__(self, *_: Any) -> None:
        if self.before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.before)


def _serve(pipe: Any, data: bytes) -> None:
    """Answer what comes through the pipe, until it or the process that started this one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    work, setting = pickle.loads(data)
    while True:
        try:
            arguments = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            answer = work(setting, *pickle.loads(arguments))
        except Exception as error:
            if not isinstance(error, InputError):
                error.add_note(traceback.format_exc())  # pickled without its traceback
            answer = error
        pipe.send_bytes(pickle.dumps(answer))


def end_with_parent() -> None:
    """End this process when the one that started it has ended, whatever ended that: a server of forks may live on."""
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
