"""The benchmarks of speed run, in short form: what they find then says nothing, and nothing is written."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mmtx.cli import main

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


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Shards as benchmarks/scaling_grid.py prepares them, of a few samples each."""
    root = tmp_path_factory.mktemp("stream")
    for kind, file in (("pictures", "images-train-004"), ("notes", "sounds-train-001"), ("speech", "speech-test")):
        with tarfile.open(ROOT / "demos" / "data" / "starter" / f"{file}.tar.gz") as tar:
            for member in [tar.next() for _ in range(24)]:
                tar.extract(member, root / kind, filter="data")
        main(["prepare", str(root / kind), "--output", str(root / "data" / kind), "--num_workers", "1"])
        shutil.copytree(root / "data" / kind, root / "data" / f"held-out-{kind}")
    return root / "data"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "told"), [("scaling_grid", r"64-4: loss_image foretold \d+\.\d+, measured \d"),
                                            ("learning_rate", r"muon\+mup +best .*: moves by a factor of \d"),
                                            ("recurrent", r"gated delta rule: \d.*\n +0 tokens between: \d\.\d+ right")])
def test_a_benchmark_of_laws_runs_in_short_form(name, told, stream, tmp_path):
    before = files()
    more = ["--output", str(tmp_path / "runs")] if name == "scaling_grid" else []
    result = subprocess.run([sys.executable, f"benchmarks/{name}.py", "--short", "--data", str(stream), *more], cwd=ROOT,
                            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert re.search(told, result.stdout), result.stdout
    assert files() == before
