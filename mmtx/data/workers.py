"""A pool of worker processes, any of which may be killed at any moment."""

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

PATIENCE = 5  # seconds from the end of a process's pipe to that of the process
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class WorkerDied(Exception):
    """A worker process ended before its work was done; the message says how: "died ..."."""

    def __init__(self, status: int | None):
        """`status`: of the process, negative for the signal that killed it; None if unknown."""
        if status is not None and status >= 0:  # the system kills with a signal
            how = f"with status {status}, see above; a script that starts processes needs `if __name__ == \"__main__\":`"
        else:
            how = "(out of memory?)" if status in (None, -signal.SIGKILL) else f"of signal {-status}"
        super().__init__(f"died {how}")


class Workers:
    """A pool of freshly started processes, each with a pipe of its own.

    The standard library's pool forks processes with whatever locks other threads hold, and they share locks and pipes: one
    that is killed while it holds a lock blocks all others. Here, the end of a process closes its pipe, and no other.
    """

    def __init__(self, count: int, work: Callable[..., Any], setting: Any):
        """The processes run `work(setting, ...)`, a function of a module, which is imported before they are forked."""
        context = multiprocessing.get_context(METHOD)
        if METHOD == "forkserver":
            context.set_forkserver_preload([work.__module__])
        self.processes: list[tuple[Any, Connection]] = []
        self.free: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        data = pickle.dumps((work, setting))
        self.threads = ThreadPoolExecutor(count, "worker")  # each waits for the answer of a process
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
        """Run `work(setting, *arguments)` with pickled arguments. The future raises what `work` raises, or WorkerDied."""
        return self.threads.submit(self._ask, arguments)

    def _ask(self, arguments: bytes) -> Any:
        pipe = self.free.get()
        try:
            pipe.send_bytes(arguments)
            answer = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            process = next(process for process, here in self.processes if here is pipe)
            process.join(PATIENCE)
            raise WorkerDied(process.exitcode) from None
        finally:
            self.free.put(pipe)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """Kill all processes at once, whatever they are doing."""
        for process, _ in self.processes:
            process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process, pipe in self.processes:
            process.join()
            pipe.close()


class uninterrupted:
    """A context that defers Ctrl-C. Processes started in it never receive it, not even while their Python starts up."""

    def __enter__(self) -> None:
        self.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None

    def __exit__(self, *_: Any) -> None:
        if self.before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.before)


def _serve(pipe: Any, data: bytes) -> None:
    """Answer requests from the pipe until it closes or the parent process ends."""
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
                error.add_note(traceback.format_exc())  # pickling drops the traceback
            answer = error
        pipe.send_bytes(pickle.dumps(answer))


def end_with_parent() -> None:
    """End this process when its parent has ended, for whatever reason: the fork server may live on."""
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
