"""How much slower is decoding if its threads wait for one another while another process occupies a core?

    python benchmarks/busy_neighbour.py

Tokens/s of 384 x 6 at batch 1, in a process of its own for each thread setup: mmtx or torch imported first, one or two torch
threads, NumPy's default pool. All are measured in turn, alone and next to a process that keeps core 0 busy. The bar: no setup is
slower than half the speed of one thread in all pools under the same load. Writes results/busy_neighbour.json.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import median

from measure import RESULTS, machine, versions

ROOT = Path(__file__).parents[1]
LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
WAYS = {  # code that runs first, and the environment
    "one thread everywhere": ("", {"OMP_NUM_THREADS": "1"}),
    "mmtx first": ("import mmtx; mmtx.load; import torch; torch.set_num_threads(2)", {}),
    "torch first": ("import torch; torch.set_num_threads(2)", {}),
    "torch first, set_num_threads(1)": ("import torch; torch.set_num_threads(1)", {}),
    "numpy first, OPENBLAS_NUM_THREADS=2": ("import numpy", {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}),
    "torch first, OMP_WAIT_POLICY=active": ("import torch; torch.set_num_threads(2)", {"OMP_WAIT_POLICY": "active"}),
}
CHILD = """
import sys
sys.path[:0] = {paths!r}
{begin}
import json, time
import numpy as np, torch
import decode_speed as bench
from mmtx.ambient import neutral
from mmtx.grammar import Grammar
from mmtx.inference.generation import generate
from mmtx.inference.row import prepack_weights
from mmtx.inference.sampling import Sampling
from mmtx.inference.weights import Weights
from mmtx.sequence import Prompt
from mmtx.vocabulary import SLOTS, Entry, Vocabulary

config = bench.SHAPES[{shape!r}]
decoder = bench.random_decoder(config, "cpu", torch.float32)
grammar = Grammar(Vocabulary((Entry("text", 0, config.vocabulary_size - SLOTS, "", None, None),)))
prepack_weights(decoder)
weights, prompt = Weights.of(decoder, fixed=True), Prompt(np.arange(bench.PROMPT))
with neutral(), torch.inference_mode():
    generate(decoder, grammar, [prompt], "text", Sampling(max_new_tokens=4), weights=weights)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        generate(decoder, grammar, [prompt], "text", Sampling(max_new_tokens={new}), weights=weights)
        print({new} / (time.perf_counter() - start), flush=True)
"""
HOLD = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
while True:
    pass
"""


def begin(code: str, given: dict[str, str], shape: str, new: int) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if name not in LIMITS}
    code = CHILD.format(paths=[str(ROOT), str(ROOT / "benchmarks")], begin=code, shape=shape, new=new)
    child = subprocess.Popen([sys.executable, "-c", code], env={**kept, **given}, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def rate(child: subprocess.Popen) -> float:
    child.stdin.write("\n")
    child.stdin.flush()
    return float(child.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="384x6")
    parser.add_argument("--new", type=int, default=64, help="ids to write, default: 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    if options.short:
        options.shape, options.new, options.rounds = "short", 4, 1
    children = {name: begin(*way, options.shape, options.new) for name, way in WAYS.items()}
    rates: dict[str, dict[str, list[float]]] = {}
    try:
        for company in ("alone", "beside a busy process"):
            neighbour = subprocess.Popen([sys.executable, "-c", HOLD]) if company != "alone" else None
            try:
                found = rates[company] = {name: [] for name in children}
                for _ in range(options.rounds):
                    for name, child in children.items():
                        found[name].append(rate(child))
            finally:
                if neighbour is not None:
                    neighbour.kill()
                    neighbour.wait()
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    reached = True
    for company, found in rates.items():
        print(f"\n{options.shape}, ids/s, {company}" + (" (short: says nothing about speed)" if options.short else ""))
        one, *_ = found.values()
        for name, figures in found.items():
            ratio = median(a / b for a, b in zip(figures, one, strict=True))
            reached &= ratio >= 0.5
            print(f"  {name:40} {median(figures):8.1f}   {ratio:.2f} of one thread" + ("" if ratio >= 0.5 else "   MISSED"))
    if not options.short:
        RESULTS.mkdir(exist_ok=True)
        result = {"name": "busy_neighbour", "unit": "ids/s", "date": date.today().isoformat(), "reached": reached,
                  "load_average_before": os.getloadavg()[0],
                  "median": {company: {name: round(median(figures), 1) for name, figures in found.items()}
                             for company, found in rates.items()},
                  "settings": {"shape": options.shape, "new": options.new, "rounds": options.rounds},
                  "machine": machine(), "versions": versions()}
        (RESULTS / "busy_neighbour.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
