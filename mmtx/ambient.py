"""The ambient state of torch and NumPy: what the surrounding program set must not change an answer, nor be changed by one.

| the program's | here |
| --- | --- |
| default dtype and device, autocast, inference mode, NumPy's error handling | pinned while a call runs: `neutral` |
| random state | not drawn from: `weights.load_module` builds networks without their initial values |
| number of torch's threads | left alone: `in_threads` has threads of its own, `run_single_threaded` gives back what it took |
| number of NumPy's threads (OpenBLAS) | one while a call runs: `neutral`; what is worth several is torch's |
| a fork, which torch's threads do not survive | the thread that comes out of it uses one: `neutral` |

The default dtype and NumPy's threads belong to the process: other threads see float32, and have one thread of NumPy's,
while a call runs.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_info

MOST_THREADS = 4  # of ours in a process
AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # kinds of devices whose autocast may be on


class _State:
    """What all threads of a process share; a fork starts anew, since a lock may be held and no thread is there."""

    def __init__(self):
        self.lock = threading.Lock()
        self.calls, self.dtype = 0, torch.float32  # that pin the default dtype, and the program's own
        self.pool: ThreadPoolExecutor | None = None
        self.products, self.counts = 0, []  # calls that keep NumPy to one thread, and the program's own number of each pool


_state, _thread = _State(), threading.local()


def _forked() -> None:
    global _state
    if _state.calls:
        torch.set_default_dtype(_state.dtype)
    if _state.products:
        _give_counts(_state.counts)
    _state, _thread.forked = _State(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@contextmanager
def neutral() -> Iterator[None]:
    """Compute as in a program that has set nothing; also a decorator, for functions that are no generators."""
    if getattr(_thread, "forked", False):
        one_thread()
        _thread.forked = False
    with ExitStack() as stack:
        stack.enter_context(_float32())
        stack.enter_context(_one_thread_of_numpy())
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def neutral_steps(generator: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """`neutral` for a generator function: around each step, so that the caller's code between two of them is as it was."""
    @functools.wraps(generator)
    def stepped(*args: Any, **options: Any) -> Iterator:
        # No context is open at a `yield`: what is left at exit is closed when torch may be gone.
        steps, over = generator(*args, **options), object()
        while True:
            with neutral():
                item = next(steps, over)
            if item is over:
                return
            yield item
    return stepped


@contextmanager
def _float32() -> Iterator[None]:
    """The default dtype float32, until the last of all calls that overlap has ended."""
    state = _state
    with state.lock:
        pinned = state.calls > 0 or torch.get_default_dtype() != torch.float32
        if pinned:
            if not state.calls:
                state.dtype = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            state.calls += 1
    try:
        yield
    finally:
        if pinned:
            with state.lock:
                state.calls -= 1
                if not state.calls:
                    torch.set_default_dtype(state.dtype)


class Pool(NamedTuple):
    """A pool of threads of a library."""

    get_num_threads: Callable[[], int]
    set_num_threads: Callable[[int], object]


@functools.cache
def numpy_pools() -> tuple[Pool, ...]:
    """OpenBLAS with threads of its own, of NumPy and whatever else is loaded; what shares torch's (MKL, OpenMP) goes by its number.

    threadpoolctl finds it, but sets it for one thread of a program only, the first that tries.
    """
    pools = []
    for found in threadpool_info():
        if found["internal_api"] == "openblas" and found["threading_layer"] == "pthreads":
            library = ctypes.CDLL(found["filepath"])
            names = [(before, after) for before in ("scipy_", "") for after in ("64_", "", "_64", "_64_")
                     if hasattr(library, f"{before}openblas_set_num_threads{after}")]
            pools += [Pool(*(getattr(library, f"{before}openblas_{verb}_num_threads{after}") for verb in ("get", "set")))
                      for before, after in names[:1]]
    return tuple(pools)


@functools.cache
def torch_pools() -> tuple[Pool, ...]:
    """OpenMP, and MKL, which has a number of its own, of torch or loaded beside it: the numbers are those of the thread that asks."""
    found = threadpool_info()
    openmp = [ctypes.CDLL(each["filepath"]) for each in found if each["user_api"] == "openmp"]
    pools = [Pool(library.omp_get_max_threads, library.omp_set_num_threads) for library in openmp]
    built_in = sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"))
    for path in [*built_in, *(each["filepath"] for each in found if each["internal_api"] == "mkl")]:
        with suppress(OSError, AttributeError):
            swap = ctypes.CDLL(str(path)).MKL_Set_Num_Threads_Local  # returns the number that was there
            pools.append(Pool(functools.partial(swap, 0), swap))
    return tuple(pools)


def _give_counts(counts: Sequence[int]) -> None:
    for pool, count in zip(numpy_pools(), counts, strict=True):
        pool.set_num_threads(count)


@contextmanager
def _one_thread_of_numpy() -> Iterator[None]:
    """One thread in NumPy's pools, until the last of all calls that overlap has ended.

    Products of one token are too small for more; and threads of both pools wait for work on cores that the other needs. 384
    x 6, two cores, torch on one thread: 15 to 18 ids a second with NumPy's pool on two, 77 to 118 on one.
    """
    state = _state
    with state.lock:
        counts = [pool.get_num_threads() for pool in numpy_pools()]
        pinned = state.products > 0 or any(count != 1 for count in counts)
        if pinned:
            if not state.products:
                state.counts = counts
                _give_counts([1] * len(counts))
            state.products += 1
    try:
        yield
    finally:
        if pinned:
            with state.lock:
                state.products -= 1
                if not state.products:
                    _give_counts(state.counts)


def one_thread() -> None:
    """Give this thread one thread of torch's, and those to come what they would have got.

    torch remembers the number that was set last, in whatever thread, for all that have not used it yet.
    """
    with _state.lock:
        _give_one_thread()


def _give_one_thread() -> None:
    torch.get_num_threads()  # a thread that has not asked yet takes the common number with its first work
    with ThreadPoolExecutor(1) as fresh:
        count = fresh.submit(torch.get_num_threads).result()
        torch.set_num_threads(1)
        fresh.submit(torch.set_num_threads, count).result()


def _pool() -> ThreadPoolExecutor:
    """Threads of our own, all of which have their one thread before any of them works: it takes a moment to give it."""
    with _state.lock:
        if _state.pool is None:
            pool, ready = ThreadPoolExecutor(MOST_THREADS, "mmtx"), threading.Barrier(MOST_THREADS)
            given = threading.Lock()

            def begin() -> None:
                with given:
                    _give_one_thread()
                ready.wait()  # or one of them could take the turn of two

            for future in [pool.submit(begin) for _ in range(MOST_THREADS)]:
                future.result()
            _state.pool = pool
        return _state.pool


def run_single_threaded(run: Callable[[], Any]) -> Any:
    """What `run` returns while torch uses one thread only in this thread of the program.

    OpenMP and MKL have a number for each thread of a program. To ask one of ours instead, as is done where torch has no OpenMP,
    takes 50 microseconds, and what it reads lies in the caches of the other core.
    """
    if not (pools := torch_pools()):
        inference = torch.is_inference_mode_enabled()
        return _pool().submit(lambda: torch.inference_mode(inference)(run)()).result()
    counts = [pool.get_num_threads() for pool in pools]
    try:
        for pool in pools:
            pool.set_num_threads(1)
        return run()
    finally:
        for pool, count in zip(pools, counts, strict=True):
            pool.set_num_threads(count)


def in_threads(run: Callable[[Any], Any], items: Sequence[Any], threads: int) -> list[Any]:
    """`run` each item, `threads` of them at a time, each of which lets torch use one thread only.

    Of several errors, that of the first item is raised. The threads serve all callers in turn and stay for later calls.
    """
    pool = _pool()
    numbers = iter(range(len(items)))
    running: dict[Future, int] = {}
    failed: dict[int, BaseException] = {}
    results: list[Any] = [None] * len(items)
    try:
        while True:
            while len(running) < threads and not failed and (number := next(numbers, None)) is not None:
                running[pool.submit(run, items[number])] = number
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(future)
                if error := future.exception():
                    failed[number] = error
                else:
                    results[number] = future.result()
    finally:
        for future in running:  # only where the caller is interrupted
            future.cancel()
        wait(running)
    if failed:
        raise failed[min(failed)]
    return results
