"""How does the loss fall with parameters and tokens? Runs of many sizes and numbers of tokens, for `mmtx plan --runs`.

    python benchmarks/scaling_grid.py                # prepares the stream and trains what is missing
    python benchmarks/scaling_grid.py --jobs 8 --cpu_jobs 8 --seconds 240   # in parallel on a GPU and on CPU cores
    mmtx plan --runs runs/scaling --flops 1e15 --tokens_per_batch 2048 --max_seq_len 640 --model runs/scaling/64-1000/model \
        --file docs/results/scaling.png

Each run is `mmtx fit --config configs/scaling/decoder.yaml` with another width (of `mmtx.scaling.sizes`) and another number of steps,
at whose end its learning rate is 0, as the law requires: an intermediate state of a longer run would have a higher loss. Finished
runs are not repeated, so the command can be run again at any time. With --seconds, runs that are not finished by then are left out.
Writes results/scaling_grid.json: all runs, and the loss of the run with the most compute, predicted from the others.
"""

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import yaml
from measure import RESULTS, machine, versions
from side_by_side import Task, side_by_side, slots

from mmtx.cli import main as mmtx
from mmtx.config import DecoderConfig
from mmtx.errors import InputError
from mmtx.saved_folder import CONFIG
from mmtx.scaling import RESAMPLES, held_out, read_runs, sizes

ROOT = Path(__file__).parents[1]
BASE = ROOT / "configs" / "scaling" / "decoder.yaml"
STARTER = ROOT / "demos" / "data" / "starter"
STREAM = {"pictures": ["images-train-00[0-3].tar.gz", "images-more-*.tar.gz", "images-drawings-train-*.tar.gz"],
          "notes": ["sounds-train-000.tar.gz", "sounds-more-*.tar.gz", "sounds-percussion-train-*.tar.gz"],
          "speech": ["speech-train-*.tar.gz", "speech-synthetic-train-*.tar.gz"], "text": ["text-train.jsonl"],
          "held-out-pictures": ["images-train-004.tar.gz"], "held-out-notes": ["sounds-train-001.tar.gz"],
          "held-out-speech": ["speech-test.tar.gz", "speech-synthetic-test-sentences.tar.gz"],
          "held-out-text": ["text-test-chapters.jsonl"]}
WIDTHS, STEPS = (32, 48, 64, 96, 128), (500, 1000, 2000, 4000)
HELD_OUT = (160, 5000)


def prepare(folder: Path) -> None:
    """Write the shards that do not exist yet."""
    for name, files in STREAM.items():
        if not (folder / name / "prepared.json").exists():
            mmtx(["prepare", *(str(STARTER / file) for file in files), "--output", str(folder / name), "--num_workers", "1"])


def train(device: str, base: dict, width: int, steps: int, output: Path, data: Path) -> None:
    """Train one size for a number of steps, unless done before; `base` is the parsed configuration."""
    if (output / "model" / CONFIG).is_file():
        return
    shape = base["model"]["init_args"]["decoder"]
    size = next(c for c in sizes(DecoderConfig(**shape)) if c.width == width)
    config = {**base, "output": str(output), "trainer": {**base["trainer"], "max_steps": steps, "accelerator": device, "devices": 1,
                                                             "enable_progress_bar": False}}
    shape.update({name: getattr(size, name) for name in ("width", "depth", "heads", "kv_heads", "mlp_dim")})
    for sources in (config["data"]["init_args"][name] for name in ("train", "validation")):
        for source in sources:
            source["paths"] = [str(data / Path(path).name) for path in source["paths"]]
    path = output.with_name(f"{output.name}.yaml")
    path.write_text(yaml.safe_dump(config))
    mmtx(["fit", "--config", str(path), "--ckpt_path", "last"])


def core_seconds(width: int) -> float:
    """Approximate time of a step of 2,048 tokens on one core of an AMD EPYC."""
    return 0.02 + 4e-4 * width + 4.2e-8 * width ** 3


def tell(folder: Path) -> dict:
    """Print and return the results of the runs."""
    runs = read_runs(folder)
    result: dict = {"name": "scaling_grid", "date": date.today().isoformat(), "runs": [run._asdict() for run in runs], "foretold": {}}
    for what in runs[0].losses:
        try:
            run, law = held_out(runs, what, RESAMPLES)
        except InputError as error:  # the deadline left too few runs
            print(f"scaling_grid: {error}", file=sys.stderr, flush=True)
            break
        told, measured = law.loss(run.parameters, run.tokens), run.losses[what]
        result["foretold"][what] = {"run": run.name, "foretold": told, "interval": law.interval(run.parameters, run.tokens),
                                    "measured": measured}
        print(f"{run.name}: {what} foretold {told:.3f}, measured {measured:.3f} ({told / measured - 1:+.1%})", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"), help="folder of the runs")
    parser.add_argument("--data", type=Path, help="folder of the shards, default: data in that of the runs")
    parser.add_argument("--config", type=Path, default=BASE)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="multiples of the head width")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--held_out", type=int, nargs=2, metavar=("WIDTH", "STEPS"), default=HELD_OUT, help="the run to foretell")
    parser.add_argument("--jobs", type=int, default=1, help="processes, on the GPU if there is one")
    parser.add_argument("--cpu_jobs", type=int, default=0, help="more of them on the CPU, which train what costs least")
    parser.add_argument("--seconds", type=float, default=1e6, help="runs that are not finished by then are left out")
    parser.add_argument("--results", type=Path, default=RESULTS / "scaling_grid.json", help="file of the figures")
    parser.add_argument("--short", action="store_true", help="a few steps, which say nothing; writes no result")
    options = parser.parse_args()
    if options.short:
        options.widths, options.steps, options.held_out = (16, 32, 48), (1, 2, 3), (64, 4)
    data = options.data or options.output / "data"
    options.output.mkdir(parents=True, exist_ok=True)
    prepare(data)
    pairs = [*((w, s) for w in options.widths for s in options.steps), tuple(options.held_out)]
    base = yaml.safe_load(options.config.read_text())
    tasks = [Task(f"{w}-{n}", (base, w, n, options.output / f"{w}-{n}", data), n * core_seconds(w)) for w, n in pairs]
    took = {}
    for done in side_by_side(train, tasks, slots(options.jobs, options.cpu_jobs), options.seconds, options.output / "logs"):
        took[done.name] = {"seconds": round(done.seconds, 1), "device": done.device}
        print(f"{done.name}: {done.seconds:.0f} s on {done.device}", flush=True)
    result = tell(options.output) | {"took": took}
    if not options.short:
        result |= {"machine": machine(), "versions": versions()}
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
