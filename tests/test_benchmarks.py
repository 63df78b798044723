"""The benchmarks of speed run, in short form: what they find then says nothing, and nothing is written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEED = re.search(r"^SPEED := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1].split()
RESULTS = ROOT / "benchmarks" / "results"


def files() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in RESULTS.glob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPEED)
def test_a_benchmark_of_speed_runs_in_short_form(name):
    before = files()
    result = subprocess.run([sys.executable, f"benchmarks/{name}.py", "--short"], cwd=ROOT, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert re.search(r"ours/this .*, bar [<>]= ", result.stdout), result.stdout
    assert files() == before


@pytest.mark.slow
@pytest.mark.parametrize(("what", "told"), [("training", "GFLOP/s"), ("decoding", "GB/s"), ("captions", "feed the prompt")])
def test_time_shares_run_in_short_form(what, told):
    before = files()
    result = subprocess.run([sys.executable, "benchmarks/time_shares.py", what, "--short"], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 0 and told in result.stdout, result.stderr
    assert files() == before


def test_make_bench_runs_every_script_that_reports_speed():
    reporting = {path.stem for path in (ROOT / "benchmarks").glob("*.py")
                 if "measure import interleave" in path.read_text(encoding="utf-8")}
    assert reporting == set(SPEED)


@pytest.mark.slow
def test_specialists_run_in_short_form():
    result = subprocess.run([sys.executable, "benchmarks/specialists.py", "--short"], cwd=ROOT, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    rows = [line.split()[0] for line in result.stdout.splitlines()]
    assert rows == [task for task in ("pictures", "notes", "sentences") for _ in range(5)]
