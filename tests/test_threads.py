"""How many threads take part, whatever the program has set, and which way a step goes where threads wait for one another."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtx import ambient
from mmtx.ambient import neutral, numpy_pools, run_single_threaded
from mmtx.inference.thread_tuner import AGAIN, TRIAL, ThreadTuner

ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # that this process may use
SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "GOTO_NUM_THREADS")
PROGRAM = """
import sys
{first}
import mmtx, numpy, torch
model = mmtx.load(sys.argv[1], "cpu")
from mmtx import ambient
from mmtx.inference.row import RowEngine
from threadpoolctl import threadpool_info

def numbers():
    return [pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"], torch.get_num_threads()

seen, plain = [], RowEngine._step
def step(self, *given):
    seen.append(numbers())
    return plain(self, *given)
RowEngine._step = step
before = numbers()
model.caption(numpy.zeros((9, 9, 3), numpy.uint8), max_new_tokens=8)
assert len(seen) > 5 and numbers() == before, (before, numbers())
print(before[0], before[1], sorted({{found for _, found in seen}}), sorted({{n for counts, _ in seen for n in counts}}))
"""


@pytest.mark.parametrize(("first", "given", "numpy_threads", "torch_threads"), [
    ("import torch; torch.set_num_threads(1)", {"OPENBLAS_NUM_THREADS": "2"}, 2, 1),
    ("import torch; torch.set_num_threads(2)", {"OPENBLAS_NUM_THREADS": "2"}, 2, 2),
    ("import numpy, threadpoolctl; threadpoolctl.threadpool_limits(2, 'blas')", {"OMP_NUM_THREADS": "1"}, 2, 1),
])
@pytest.mark.skipif(CORES < 2, reason="OpenBLAS makes no more threads than there are cores")
def test_a_step_has_one_thread_of_numpys_and_the_program_its_own_number(first, given, numpy_threads, torch_threads, tiny_model,
                                                                        tmp_path):
    tiny_model.save(tmp_path / "model")
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(first=first), str(tmp_path / "model")], cwd=ROOT,
                          capture_output=True, text=True, env={**kept, **given}, timeout=200)
    assert done.returncode == 0, done.stderr
    pools, rest = done.stdout.strip().split("] ", 1)
    if pools == "[":
        pytest.skip("this NumPy has no pool of its own")
    # With two threads of torch's both ways are tried; in the other one a step has a thread with one of torch's.
    tried = [1] if torch_threads == 1 else [1, 2]
    assert (pools, rest) == (f"[{numpy_threads}", f"{torch_threads} {tried} [1]")


def pool_counts() -> list[int]:
    return [pool.get_num_threads() for pool in numpy_pools()]


def test_calls_that_overlap_give_numpys_threads_back_with_the_last(monkeypatch):
    if not numpy_pools():
        pytest.skip("this NumPy has no pool of its own")
    before, inside, leave = pool_counts(), threading.Event(), threading.Event()

    def other():
        with neutral():
            inside.set()
            leave.wait(30)

    try:
        for pool in numpy_pools():
            pool.set_num_threads(2)
        given = pool_counts()
        if given == [1] * len(given):
            pytest.skip("OpenBLAS makes no more threads than there are cores")
        thread = threading.Thread(target=other)
        with neutral():
            thread.start()
            assert inside.wait(30) and pool_counts() == [1] * len(given)
        assert pool_counts() == [1] * len(given)
        leave.set()
        thread.join(30)
        assert pool_counts() == given
        with pytest.raises(ZeroDivisionError), neutral():
            raise ZeroDivisionError
        assert pool_counts() == given
    finally:
        for pool, count in zip(numpy_pools(), before, strict=True):
            pool.set_num_threads(count)


def test_the_first_call_of_a_new_thread_has_one_thread_of_torchs_too():
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(run_single_threaded, torch.get_num_threads).result() == 1
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("openmp", [True, False])
def test_alone_has_one_thread_and_the_callers_inference_mode(openmp, monkeypatch):
    if not openmp:  # as where torch was built without it
        monkeypatch.setattr("mmtx.ambient.torch_pools", lambda: ())
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            assert run_single_threaded(lambda: (torch.get_num_threads(), torch.is_inference_mode_enabled())) == (1, True)
        assert run_single_threaded(lambda: (torch.get_num_threads(), torch.is_inference_mode_enabled())) == (1, False)
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            run_single_threaded(lambda: 1 // 0)
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as other:    # has its own number, also while this thread has one
            assert other.submit(torch.get_num_threads).result() == 2
            assert run_single_threaded(lambda: other.submit(torch.get_num_threads).result()) == 2
    finally:
        torch.set_num_threads(1)


SHARES = """
import time, torch
torch.set_num_threads(2)  # also sets MKL, which has a number of its own
from mmtx.ambient import run_single_threaded

def of_others(run):
    run()  # until threads that waited for more to do have given up
    total, own = time.process_time(), time.thread_time()
    run()
    return 1 - (time.thread_time() - own) / (time.process_time() - total)

a, half = torch.randn(700, 700), torch.randn(700, 700).bfloat16()
found = []
for work in (lambda: a @ a, lambda: torch.nn.functional.linear(half, half), a.exp):
    again = lambda: [work() for _ in range(50)]
    work()
    found.append((of_others(again), of_others(lambda: run_single_threaded(again)), of_others(again)))
assert all(alone < 0.05 for _, alone, _ in found), found
# With AMX, oneDNN does not share a bfloat16 product of this size in the first place.
assert all(after > 0.2 for before, _, after in found if before > 0.2) and found[0][0] > 0.2, found
"""


def test_no_product_of_torch_is_shared_in_the_thread_that_is_alone():
    subprocess.run([sys.executable, "-c", SHARES], check=True, timeout=300,
                   env={name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})


class Machine:
    """Steps of known length, on a clock of its own."""

    def __init__(self):
        self.now = 0.0
        self.tuner = ThreadTuner(lambda: self.now)

    def steps(self, count: int, shared: float, one: float) -> float:
        """Seconds that steps take which last so long on several threads and on one."""
        start = self.now
        for _ in range(count):
            way = self.tuner.shared
            self.now += shared if way else one
            self.tuner.record(way, shared if way else one)
        return self.now - start


@pytest.mark.parametrize(("shared", "one"), [(0.1, 0.01), (1.0, 0.001), (0.01, 0.02), (0.01, 0.01)])
def test_steps_go_the_faster_way_but_for_few(shared, one):
    machine = Machine()
    # The first step may be the slow one, before anything is known.
    assert machine.steps(5000, shared, one) <= 5000 * min(shared, one) * 1.15 + (TRIAL + 1) * max(shared, one)
    assert machine.tuner.shared == (shared <= one) or shared == one


def test_a_neighbour_that_comes_and_goes_is_noticed():
    machine = Machine()
    machine.steps(200, shared=0.01, one=0.015)
    assert machine.tuner.shared
    took = machine.steps(400, shared=0.1, one=0.02)
    assert not machine.tuner.shared and took < 2 * 400 * 0.02
    machine.steps(2000, shared=0.01, one=0.015)
    assert machine.tuner.shared


def test_one_slow_step_does_not_change_the_way():
    machine = Machine()
    machine.steps(20, shared=0.01, one=0.015)
    machine.steps(1, shared=0.5, one=0.5)
    machine.steps(int(3 * AGAIN / 0.01), shared=0.01, one=0.015)
    assert machine.tuner.shared


def test_what_was_begun_the_other_way_is_not_counted():
    tuner = ThreadTuner(lambda: 0.0)
    for _ in range(10):
        tuner.record(not tuner.shared, 5.0)
    assert tuner.shared and tuner._trial == []


def test_numpy_products_are_right_in_the_thread_that_is_alone():
    a = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    with neutral():
        assert np.allclose(run_single_threaded(lambda: a.T @ a), a.T @ a)
    assert ambient._state.products == 0
