"""Processes that are killed, stopped or interrupted while they work: one line, and no wait without an end."""

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import fresh  # noqa: F401  its server has imported what the processes need
import pytest
import torch

from mmtx.data.collection import DataSource
from mmtx.data.prepare import _packed, make_shard, prepare, stamp_of
from mmtx.data.sample import Sample, SampleTurn, Text
from mmtx.data.workers import WorkerDied, Workers
from mmtx.errors import InputError
from mmtx.training.loader import loader


def work(setting: str, number: int) -> tuple[str, int, bytes]:
    if number < 0:
        raise InputError(f"{number} is less than 0")
    if number == 13:
        raise KeyError(number)
    return setting, number, bytes(200_000)  # more than a pipe holds


def asked(pool: Workers, numbers) -> list:
    return [pool.submit(pickle.dumps((number,))) for number in numbers]


@pytest.fixture
def pool():
    pool = Workers(2, work, "setting")
    yield pool
    pool.end()


def test_answers_and_mistakes_come_back(pool):
    results = asked(pool, [3, -1, 4, 13])
    assert [results[n].result(60)[:2] for n in (0, 2)] == [("setting", 3), ("setting", 4)]
    with pytest.raises(InputError, match="^-1 is less than 0$"):
        results[1].result(60)
    with pytest.raises(KeyError) as caught:
        results[3].result(60)
    assert "in work" in caught.value.__notes__[0]  # where it came from


def test_processes_end_with_the_pool_even_while_they_are_stopped(pool):
    assert asked(pool, [1])[0].result(60)
    for process, _ in pool.processes:
        os.kill(process.pid, signal.SIGSTOP)
    waiting = asked(pool, range(5))
    pool.end()
    assert all(not process.is_alive() for process, _ in pool.processes)
    assert all(future.cancelled() or isinstance(future.exception(60), WorkerDied) for future in waiting)


def test_a_killed_process_is_told_whatever_it_held():
    chance = random.Random(0)
    for _ in range(5):
        pool = Workers(2, work, "setting")
        try:
            assert asked(pool, [1])[0].result(60)
            results = asked(pool, range(20, 60))
            time.sleep(chance.uniform(0, 0.02))
            pool.processes[0][0].kill()
            assert not wait(results, timeout=60).not_done
            ended = [future for future in results if future.exception()]
            assert all(isinstance(future.exception(), WorkerDied) and "out of memory" in str(future.exception()) for future in ended)
            assert all(future.result()[1] == n for n, future in enumerate(results, 20) if future not in ended)
        finally:
            pool.end()


def test_a_killed_process_ends_prepare_in_one_line_and_the_same_command_goes_on(tokenizers, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "line {n}"}}\n' for n in range(400)))
    start = Workers.__init__

    def begin(self, *arguments):
        start(self, *arguments)
        threading.Thread(target=self.processes[0][0].kill).start()

    with monkeypatch.context() as patch:
        patch.setattr(Workers, "__init__", begin)
        with pytest.raises(InputError, match="one of the 1 worker processes .*died .*the same command resumes"):
            prepare(DataSource([str(path)]), tokenizers, tmp_path / "a", rows=1)
    assert not [name for name in os.listdir(tmp_path / "a") if "part" in name or name == ".lock"]
    assert prepare(DataSource([str(path)]), tokenizers, tmp_path / "a", rows=100)["documents"] == 400


def test_a_script_that_its_own_processes_would_run_again_is_told(tmp_path):
    """New processes import the script that started them, which fails: that is no lack of memory."""
    (tmp_path / "script.py").write_text("""import operator, pickle
from mmtx.data.workers import WorkerDied, Workers
pool = Workers(1, operator.add, 1)
try:
    pool.submit(pickle.dumps((2,))).result()
except WorkerDied as died:
    print(died)
pool.end()
""")
    ran = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout == "died with status 1, see above; a script that starts processes needs `if __name__ == \"__main__\":`\n"


# -- Rows with any content -----------------------------------------------------------------------------------


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [10, 400, 900, 30_000])
def test_metadata_of_any_depth_are_prepared(tokenizers, vocabulary, depth):
    rows = [Sample(str(n), (SampleTurn(None, (Text(f"text {n}"),)),), {"deep": nested(depth)} if n == 1 else {}, f"row {n}")
            for n in range(3)]
    number, first, packed = pickle.loads(_packed(4, 9, rows))
    assert (number, first) == (4, 9) and [row.turns for row in packed] == [row.turns for row in rows]
    assert stamp_of(rows) and stamp_of(rows) != stamp_of(rows[:2])
    made, facts = make_shard(packed, 0, tokenizers, vocabulary, False)
    assert (facts["rows"], facts["skipped"], made["numbers"].tolist()) == (3, 0, [0, 1, 2])


def test_names_that_are_no_utf8_are_told(tokenizers, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for n in range(30):
        (folder / f"{n}.png").write_bytes(b"no picture") if n < 1 else None
        (folder / f"{n}.txt").write_text("a text")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n' * 30)
    facts = prepare(DataSource([str(folder), str(tmp_path / "rows.jsonl")]), tokenizers, tmp_path / "a", max_bad=0.5)
    assert facts["sources"][0].endswith("caf\\udce9") and facts["skipped"] == 1
    again = prepare(DataSource([str(folder), str(tmp_path / "rows.jsonl")]), tokenizers, tmp_path / "a", max_bad=0.5)
    assert again == facts


@pytest.mark.parametrize("option, value, told", [
    ("rows", -1, "rows: found -1"), ("num_workers", 0, "num_workers: found 0"), ("num_workers", 10**6, "num_workers: found 1000000"),
    ("max_bad", float("nan"), "max_bad is nan"), ("max_bad", -0.1, "max_bad is -0.1")])
def test_options_out_of_range_are_named(tokenizers, tmp_path, option, value, told):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(InputError, match=told):
        prepare(DataSource([str(tmp_path / "rows.jsonl")]), tokenizers, tmp_path / "a", **{option: value})
    assert not (tmp_path / "a").exists()


# -- Loaders of batches --------------------------------------------------------------------------------------


class Batches(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, k: int) -> int:
        if k == 2:
            raise InputError("sound.wav: no such file")
        return k


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_in_a_loader_s_worker_is_one_line(workers):
    batches = iter(loader(Batches(), workers))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(InputError) as caught:
        next(batches)
    assert str(caught.value) == "sound.wav: no such file"


LOADING = """
import multiprocessing, os, sys
from mmtx.training.loader import loader

class Pids:
    def __len__(self):
        return 100

    def __getitem__(self, k):
        return os.getpid()

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    batches = iter(loader(Pids(), workers=2))
    print(next(batches), next(batches), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_a_loader_end_with_a_process_that_is_killed(method, tmp_path):
    """Also where a server of forks, which they keep alive, is what the system calls their parent."""
    (tmp_path / "loading.py").write_text(LOADING)
    with subprocess.Popen([sys.executable, tmp_path / "loading.py", method], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        process.stdout.close()
        assert process.wait(120) == -signal.SIGKILL
    assert len(set(pids)) == 2
    end = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3] for pid in pids):
        assert time.monotonic() < end, "workers are left"
        time.sleep(0.05)
