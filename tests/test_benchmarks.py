"""The benchmarks of speed run, in short form: what they find then says nothing, and nothing is written."""

import glob
import multiprocessing
import re
import shutil
import sys
import tarfile
from argparse import ArgumentTypeError
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fresh
import numpy as np
import pytest
import torch
import yaml

from mmtx.cli import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import attention_variants  # noqa: E402
import learning_rate  # noqa: E402
from halves import halved  # noqa: E402
from measure import interpreter  # noqa: E402
from side_by_side import Task, _choose, side_by_side  # noqa: E402

SPEED = re.search(r"^SPEED := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1].split()
RESULTS = ROOT / "benchmarks" / "results"


def files() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in RESULTS.glob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPEED)
def test_a_benchmark_of_speed_runs_in_short_form(name):
    before = files()
    result = fresh.script(ROOT / f"benchmarks/{name}.py", "--short", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert re.search(r"ours/this .*, bar [<>]= ", result.stdout), result.stdout
    assert files() == before


@pytest.mark.slow
@pytest.mark.parametrize(("what", "told"), [("training", "GFLOP/s"), ("decoding", "GB/s"), ("captions", "feed the prompt")])
def test_time_shares_run_in_short_form(what, told):
    before = files()
    result = fresh.script(ROOT / "benchmarks/time_shares.py", what, "--short", cwd=ROOT)
    assert result.returncode == 0 and told in result.stdout, result.stderr
    assert files() == before


def test_make_bench_runs_every_script_that_reports_speed():
    reporting = {path.stem for path in (ROOT / "benchmarks").glob("*.py")
                 if "measure import interleave" in path.read_text(encoding="utf-8")}
    assert reporting - {"vllm_speed"} == set(SPEED)  # which needs an environment of its own


def test_another_python_is_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert interpreter("env/python") == str(tmp_path / "env" / "python")
    with pytest.raises(ArgumentTypeError, match="found none/python, expected a Python"):
        interpreter("none/python")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A function from a shipped configuration to one of a small decoder on the first samples of each source."""
    root = tmp_path_factory.mktemp("few")

    def cut(path: str) -> str:
        target = root / Path(path).stem
        with tarfile.open(path) as tar, tarfile.open(target, "w") as made:
            for member in [tar.next() for _ in range(24 if "images" in target.name else 8)]:  # the pitch of a sound takes a second
                made.addfile(member, tar.extractfile(member))
        return str(target)

    def few(name: str) -> Path:
        config = yaml.safe_load((ROOT / "configs" / name).read_text(encoding="utf-8"))
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        model["decoder"] |= {"width": 64, "depth": 1, "heads": 2, "kv_heads": 2, "mlp_dim": 128}
        for source in (*data["train"], *data["validation"]):
            source["paths"] = [cut(max(glob.glob(str(ROOT / path)))) for path in source["paths"]]
            source.pop("select", None)
        path = root / name.replace("/", "-")
        path.write_text(yaml.safe_dump(config))
        return path

    return few


@pytest.mark.slow
@pytest.mark.parametrize("config, more, rows", [
    ("quickstart/decoder.yaml", [], {"pictures": 9, "notes": 9}),
    ("starter/captions.yaml", ["--tasks", "sentences"], {"sentences": 9}),
    ("quickstart/decoder.yaml", ["--short", "--tasks", "pictures", "--image_encoder", "demos/starter", "--only", "pretrained"],
     {"pictures": 2}),
])
def test_specialists_run_in_short_form(config, more, rows, few):
    result = fresh.script(ROOT / "benchmarks/specialists.py", "--config", few(config), "--minutes", "0.001", *more, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert Counter(line.split()[0] for line in result.stdout.splitlines()) == rows


@pytest.mark.slow
@pytest.mark.parametrize("name, more, told", [
    ("one_model", ["--minutes", "0.001"],
     r"one for all: exact name \d\.\d+, instrument .*, note .*, picture .*, played instrument \d"),
    ("caption_codec", ["--short", "--weights", "0", "0.01"],
     r"weight 0\.01: psnr_db 2\d\..*, exact name, codes .*, exact name, features .*, picture \d"),
])
def test_a_benchmark_of_tasks_runs_in_short_form(name, more, told, few):
    result = fresh.script(ROOT / f"benchmarks/{name}.py", "--config", few("quickstart/decoder.yaml"), *more, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert re.search(told, result.stdout), result.stdout


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Shards as benchmarks/scaling_grid.py prepares them, of a few samples each."""
    root = tmp_path_factory.mktemp("stream")
    for kind, file in (("pictures", "images-train-004"), ("notes", "sounds-train-001"), ("speech", "speech-test")):
        with tarfile.open(ROOT / "demos" / "data" / "starter" / f"{file}.tar.gz") as tar:
            for member in [tar.next() for _ in range(24)]:
                tar.extract(member, root / kind, filter="data")
        main(["prepare", str(root / kind), "--output", str(root / "data" / kind), "--num_workers", "1"])
    (root / "text.jsonl").write_text('{"text": "A row of words."}\n' * 8)
    main(["prepare", str(root / "text.jsonl"), "--output", str(root / "data" / "text"), "--num_workers", "1"])
    for kind in ("pictures", "notes", "speech", "text"):
        shutil.copytree(root / "data" / kind, root / "data" / f"held-out-{kind}")
    return root / "data"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "told"), [("scaling_grid", r"64-4: loss_image foretold \d+\.\d+, measured \d"),
                                            ("learning_rate", r"muon\+mup +best .*: moves by a factor of \d"),
                                            ("attention_variants", r"prefix, seed 0: 1,0\d\d,\d+ parameters, .* right"),
                                            ("recurrent", r"gated delta rule: \d.*\n +0 tokens between: \d\.\d+ right")])
def test_a_benchmark_of_laws_runs_in_short_form(name, told, stream, tmp_path):
    before = files()
    more = ["--output", str(tmp_path / "runs")] if name == "scaling_grid" else []
    result = fresh.script(ROOT / f"benchmarks/{name}.py", "--short", "--data", str(stream), *more, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert re.search(told, result.stdout), result.stdout
    assert files() == before


def test_work_goes_on_side_by_side_whatever_fails(tmp_path, capfd):
    tasks = [Task(f"half {number}", (number,), cost=number) for number in (1, 2, 0, 13)]
    found = {}
    for done in side_by_side(halved, tasks, ["cpu", "cpu"], 300, tmp_path):
        found[done.name] = done.found
        if done.name == "half 1":
            tasks.append(Task("added", (3,), cost=1))
    assert found == {"half 1": ("cpu", "1", 6), "half 2": ("cpu", "1", 3), "added": ("cpu", "1", 2)}
    told = capfd.readouterr().err
    assert "half 13 on cpu: the process ended with 3" in told
    assert "half 0 on cpu failed:\nTraceback" in told and "ZeroDivisionError" in told
    assert multiprocessing.active_children() == []


def test_at_a_deadline_what_is_done_is_kept(tmp_path, capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("side_by_side.time", SimpleNamespace(monotonic=lambda: now[0]))
    tasks = [Task("endless", (101,), cost=9), Task("short", (2,), cost=1), Task("waits", (102,), cost=0)]
    found = []
    for done in side_by_side(halved, tasks, ["cpu", "cpu"], 300, tmp_path):
        found.append(done.name)
        now[0] = 301.0
    assert found == ["short"]
    assert capfd.readouterr().err == "not finished after 300 s: endless, waits\n"
    assert multiprocessing.active_children() == []


def test_a_gpu_takes_the_dearest_and_a_cpu_what_it_can_finish():
    tasks = [Task("later", (), 99, stage=1), *(Task(str(cost), (), cost) for cost in (10, 40, 20, 30))]
    assert _choose(tasks, "cuda", 1).name == "40"
    assert _choose(tasks, "cpu", 1000).name == "40"
    assert _choose(tasks, "cpu", 31).name == "20"   # 1.5 times 20 fits, 1.5 times 30 does not
    assert _choose(tasks, "cpu", 1).name == "10"
    assert _choose(tasks[:1], "cuda", 1).name == "later"


def curve(power, best):
    return 5 + 0.01 * (power - best) ** 2


@pytest.mark.parametrize("best", [-9, -1.3, 0, 0.4, 7.6])
def test_the_best_rate_is_found_wherever_it_lies(best):
    found = {}
    for _ in range(20):
        asked = learning_rate.missing(found, seeds=2)
        for power, seed in asked:
            assert seed not in found.setdefault(power, {})
            found[power][seed] = curve(power, best)
    assert asked == []
    near = sorted(power for power in found if abs(power - best) <= 1.5)
    assert len(near) >= 3 and all(set(found[power]) == {0, 1} for power in near)
    assert learning_rate.best_rate({power: losses[0] for power, losses in found.items()}) == pytest.approx(best)


def test_at_an_end_no_better_rate_is_made_up():
    assert learning_rate.best_rate({0: 3.0, 2: 2.0, 4: 1.0}) == 4


@pytest.fixture(scope="module")
def held_out(stream):
    return attention_variants.Captions(stream, held_out=True)


def test_the_causal_variant_is_the_decoder_and_all_are_of_one_size(held_out):
    batch, models = held_out.batch(np.arange(0, len(held_out.documents), 5)), {}
    for name, variant in attention_variants.VARIANTS.items():
        torch.manual_seed(0)
        models[name] = variant(held_out.decoder_config())
    targets = {name: model(batch)[1] for name, model in models.items()}
    ids = batch.ids[:, :-1]
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    expected = models["causal"].decoder(ids, positions)[batch.trained[:, 1:]]
    assert torch.allclose(models["causal"](batch)[0], expected, atol=1e-5)
    assert all(torch.equal(found, batch.ids[:, 1:][batch.trained[:, 1:]]) for found in targets.values())
    sizes = [sum(p.numel() for p in model.parameters()) for model in models.values()]
    assert sizes[0] == sizes[1] and abs(sizes[2] / sizes[0] - 1) < 0.01


@pytest.mark.parametrize("variant", attention_variants.VARIANTS)
def test_captions_see_all_of_a_medium_and_nothing_that_is_still_to_be_written(variant, held_out):
    torch.manual_seed(0)
    model = attention_variants.VARIANTS[variant](held_out.decoder_config()).double()
    # The longest and a short one: what is padded is not seen either.
    lengths = [len(ids) for ids, _ in held_out.documents]
    batch = held_out.batch(np.array([int(np.argmin(lengths)), int(np.argmax(lengths))]))
    count, begins = int(batch.trained[0].sum()), int(batch.begins[0])
    assert count >= 2 and batch.begins[1] > begins + count

    def hidden(place):
        """Hidden states before each piece of the caption of the first where one id is another."""
        ids = batch.ids.clone()
        ids[0, place] += 1 if place < begins else -1
        return model(batch._replace(ids=ids))[0][:count]

    before = model(batch)[0][:count]
    for piece in range(count):  # a piece is seen by those behind it only
        changed = (hidden(begins + piece) != before).any(1).tolist()
        assert changed == [False] * (piece + 1) + [True] * (count - piece - 1)
    codes = batch.medium[0].nonzero().flatten()
    assert (hidden(codes[0]) != before).any(1).all() and (hidden(codes[-1]) != before).any(1).all()


def test_codes_of_a_medium_see_each_other_in_both_directions(held_out):
    batch = held_out.batch(np.array([0, len(held_out.documents) - 1]))
    mask = attention_variants.Prefix(held_out.decoder_config()).mask(batch)
    for row, (medium, seen) in enumerate(zip(batch.medium[:, :-1], mask, strict=True)):
        v, ids = held_out.v, batch.ids[row, :-1]
        kind = "image" if row == 0 else "audio"
        codes = torch.isin(ids, torch.tensor(v.range(kind)))
        assert torch.equal(medium, codes) and codes.sum() > 30
        expected = torch.ones_like(seen).tril() | codes[:, None] & codes[None, :]
        assert torch.equal(seen, expected)
