"""`make gpu` in its short form on a CPU: every step gives figures, and one that fails takes none of the others along."""

import json
import sys
import time
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).parents[1]
GPU = ROOT / "benchmarks" / "gpu.py"
sys.path.insert(0, str(GPU.parent))
from gpu import MORE, STEPS, Bench, bytes_read, shares, table, take  # noqa: E402

from mmtx.config import DecoderConfig  # noqa: E402
from mmtx.model import Decoder  # noqa: E402


def test_the_steps_fit_into_ten_minutes():
    assert sum(budget for _, budget in STEPS.values()) <= 600


def test_shares_are_those_of_the_rates_of_the_same_run():
    found = {"rates": {"dense bf16 FLOP/s": 8e14, "bytes read and written a second": 3e12},
             "training": {"FLOP/s": 2e14}, "compiled training": {"failed": "longer than 110 s"},
             "decoding": {"ids/s, eager, 1 row": 300.0, "ids/s, graph, 1 row": 1000.0, "ids/s, graph, 32 rows": 9000.0,
                          "bytes of weights read": 1.5e9}}
    assert shares(found) == {"mfu": 0.25, "share of the bandwidth": 0.5}
    lines = table(found, short=False).splitlines()
    assert "| share | mfu | 0.250, bar >= 0.5   MISSED |" in lines
    assert "| compiled training | FAILED | longer than 110 s |" in lines
    assert shares({name: each for name, each in found.items() if name != "rates"}) == {}


def test_bytes_that_a_step_reads_are_those_of_matrices_and_of_one_row_of_an_embedding():
    shape = {"width": 8, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp_dim": 16}
    layer = 8 * (8 + 2 * 4) + 8 * 8 + 8 * 2 * 16 + 16 * 8 + 2 * 8 + 2 * 4
    assert bytes_read(Decoder(DecoderConfig(100, **shape))) == 4 * (layer + 8 + 100 * 8)
    assert bytes_read(Decoder(DecoderConfig(100, **shape, tied=False))) == 4 * (layer + 8 + 100 * 8 + 8)


def test_a_step_that_fails_is_told():
    found = take("rates", Bench("nowhere", True), 120)
    assert "nowhere" in found["failed"] and "ids/s" not in found


def test_a_step_that_takes_too_long_is_ended():
    start = time.perf_counter()
    assert take("starter", Bench("cpu", True), 0.3)["failed"] == "longer than 0.3 s"
    assert time.perf_counter() - start < 60


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = fresh.script(GPU, cwd=ROOT)
    assert found.returncode == 2 and found.stderr.strip().startswith("gpu: found no GPU, expected one")


@pytest.mark.slow
def test_every_step_runs_in_short_form(tmp_path):
    """Each in a process, as `take` has it, but not a new one, whose imports would take longer than most of the steps."""
    found, told = {}, tmp_path / "figures.json"
    for name in (*STEPS, *MORE):
        done = fresh.script(GPU, "--short", "--device", "cpu", "--step", name, "--result", told, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        found[name] = json.loads(told.read_text())
    assert shares(found).keys() == {"mfu", "mfu compiled", "mfu packed", "share of the bandwidth", "share of the bandwidth, compiled"}


def test_what_was_taken_is_told_and_written(tmp_path):
    done = fresh.script(GPU, "--short", "--device", "cpu", "--output", tmp_path, "--steps", "rates", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert list(result["found"]) == ["rates"] and "dense bf16 FLOP/s" in result["found"]["rates"]
    assert (tmp_path / "gpu.md").read_text() in done.stdout
