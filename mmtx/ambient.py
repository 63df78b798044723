"""Isolation from the ambient state of torch and NumPy: it must not change results, and calls must not change it.

| state of the program | here |
| --- | --- |
| default dtype and device, autocast, inference mode, NumPy's error handling | pinned during a call: `neutral` |
| random state | not drawn from: `weights.load_module` builds networks without drawing initial values |
| torch's thread count | left alone: `in_threads` has threads of its own, `run_single_threaded` restores the count |
| NumPy's thread count (OpenBLAS) | one during a call: `neutral`; work that is worth several threads is torch's |
| a fork, which torch's threads do not survive | the forked thread uses one thread: `neutral` |

The default dtype and NumPy's thread count belong to the process: during a call other threads, too, see float32 and one
NumPy thread.
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

MOST_THREADS = 4  # of our own pool
AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # device types whose autocast may be on


class _State:
    """State shared by all threads of a process; a fork gets a new one, since the lock may be held and threads are gone."""

    def __init__(self):
        self.lock = threading.Lock()
        self.calls, self.dtype = 0, torch.float32  # calls that pin the default dtype, and the program's own dtype
        self.pool: ThreadPoolExecutor | None = None
        self.products, self.counts = 0, []  # calls that pin NumPy to one thread, and the program's own counts


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
    """Compute as if the program had set nothing; also a decorator, for functions that are not generators."""
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
    """`neutral` around each step of a generator function, so that the caller's code between steps is not affected."""
    @functools.wraps(generator)
    def stepped(*args: Any, **options: Any) -> Iterator:
        # No context may be open at a `yield`: an unfinished generator is closed at exit, when torch may be gone.
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
    """Pin the default dtype to float32 until the last of all overlapping calls has ended."""
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
    """The thread pool of a library."""

    get_num_threads: Callable[[], int]
    set_num_threads: Callable[[int], object]


@functools.cache
def numpy_pools() -> tuple[Pool, ...]:
    """Pools of every loaded OpenBLAS with threads of its own, NumPy's or not.

    A BLAS that shares torch's pool (MKL, OpenMP) follows torch's thread count. threadpoolctl finds the pools, but can set
    their size only from one thread of a program, the first that tries.
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
    """Pools of every loaded OpenMP and MKL, torch's or not; both keep a thread count of their own for each calling thread."""
    found = threadpool_info()
    openmp = [ctypes.CDLL(each["filepath"]) for each in found if each["user_api"] == "openmp"]
    pools = [Pool(library.omp_get_max_threads, library.omp_set_num_threads) for library in openmp]
    built_in = sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"))
    for path in [*built_in, *(each["filepath"] for each in found if each["internal_api"] == "mkl")]:
        with suppress(OSError, AttributeError):
            swap = ctypes.CDLL(str(path)).MKL_Set_Num_Threads_Local  # returns the previous count
            pools.append(Pool(functools.partial(swap, 0), swap))
    return tuple(pools)


def _give_counts(counts: Sequence[int]) -> None:
    for pool, count in zip(numpy_pools(), counts, strict=True):
        pool.set_num_threads(count)


@contextmanager
def _one_thread_of_numpy() -> Iterator[None]:
    """Pin NumPy's pools to one thread until the last of all overlapping calls has ended.

    Products for one token are too small for more, and idle threads of either pool spin on cores that the other needs. Width
    384, 6 blocks, two cores, torch on one thread: 15 to 18 ids a second with two NumPy threads, 77 to 118 with one.
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
    """Set torch's thread count to one in this thread, without changing it for threads to come.

    torch gives a thread that has not used it yet the count that any thread set last.
    """
    with _state.lock:
        _give_one_thread()


def _give_one_thread() -> None:
    torch.get_num_threads()  # otherwise this thread would take the common count with its first operation
    with ThreadPoolExecutor(1) as fresh:
        count = fresh.submit(torch.get_num_threads).result()
        torch.set_num_threads(1)
        fresh.submit(torch.set_num_threads, count).result()


def _pool() -> ThreadPoolExecutor:
    """Our own thread pool, made so that each of its threads is limited to one torch thread before any of them works."""
    with _state.lock:
        if _state.pool is None:
            pool, ready = ThreadPoolExecutor(MOST_THREADS, "mmtx"), threading.Barrier(MOST_THREADS)
            given = threading.Lock()

            def begin() -> None:
                with given:
                    _give_one_thread()
                ready.wait()  # otherwise one of them could run two of these tasks

            for future in [pool.submit(begin) for _ in range(MOST_THREADS)]:
                future.result()
            _state.pool = pool
        return _state.pool


def run_single_threaded(run: Callable[[], Any]) -> Any:
    """The result of `run`, with torch limited to one thread in the calling thread only.

    OpenMP and MKL keep a count per thread of a program. Where torch has neither, a thread of our pool calls `run` instead,
    which takes 50 microseconds, and its data is in the caches of the other core.
    """
    if not (pools := torch_pools()):
        inference = torch.is_inference_mode_enabled()
        return _pool().submit(lambda: torch.inference_mode(inference)(run)()).result()
    torch.get_num_threads()  # in a thread's first call torch sets its own count, which would otherwise happen in `run`
    counts = [pool.get_num_threads() for pool in pools]
    try:
        for pool in pools:
            pool.set_num_threads(1)
        return run()
    finally:
        for pool, count in zip(pools, counts, strict=True):
            pool.set_num_threads(count)


def in_threads(run: Callable[[Any], Any], items: Sequence[Any], threads: int) -> list[Any]:
    """The results of `run` for each item, `threads` items at a time, each limited to one torch thread.

    Of several errors, the one of the first item is raised. The threads are shared by all callers and kept for later calls.
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
        for future in running:  # only if the caller is interrupted
            future.cancel()
        wait(running)
    if failed:
        raise failed[min(failed)]
    return results
