"""Everything that needs a GPU, in one command and ten minutes on one card: tests, training, decoding, captions, codes, memory.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --short --device cpu         # a smoke test: tiny shapes, meaningless figures

Each step is a process of its own with a time limit: if it fails, or takes longer, its row says so and the others continue.
Utilisation is relative to the same card in the same run: training to the bf16 rate of a large matrix product, decoding to the
bandwidth of a copy. Writes results/gpu.json and results/gpu.md after every step. Exits with 1 if a step failed; a missed bar is
reported, but is not a failure.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import RESULTS, machine, versions

ROOT = Path(__file__).parents[1]
SHAPE = "0.6b"       # shape of train_speed for training
DECODED = "600m"     # shape of decode_speed for decoding
BARS = {"mfu": 0.5, "mfu compiled": 0.5, "share of the bandwidth": 0.8}
Figures = dict[str, Any]


class Bench(NamedTuple):
    """Settings for all steps."""

    device: str
    short: bool

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    def now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def gigabytes(self) -> float | None:
        """Peak memory of tensors."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.gpu else None

    def rate(self, run: Callable[[], object], seconds: float) -> float:
        """Calls per second, measured for about `seconds`; the first call is not counted."""
        run()
        count, start = 0, self.now()
        while count == 0 or (not self.short and time.perf_counter() - start < seconds):
            run()
            count += 1
            self.now()
        return count / (self.now() - start)


def tests(bench: Bench) -> Figures:
    """The tests that need a GPU."""
    found = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py",
                            *(["--collect-only"] if bench.short else [])], cwd=ROOT, capture_output=True, text=True)
    last = found.stdout.strip().splitlines()[-1] if found.stdout.strip() else found.stderr[-300:]
    if found.returncode:
        raise RuntimeError(f"{last}\n{found.stdout[-1500:]}")
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|skipped|tests? collected)", last)}
    return {"passed": counts.get("passed", 0), "skipped": counts.get("skipped", 0), "said": last}


def rates(bench: Bench) -> Figures:
    """Rates of the GPU: a large matrix product in bf16, and a copy."""
    side, size = (256, 2 ** 20) if bench.short else (8192, 2 ** 31)
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return {"dense bf16 FLOP/s": 2 * side ** 3 * bench.rate(lambda: a @ b, 3),
            "bytes read and written a second": 2 * size * bench.rate(lambda: target.copy_(source), 2)}


def _training(bench: Bench, compiled: bool, documents: int = 1) -> Figures:
    """Training steps of mmtx at one shape in bf16 -> tokens and FLOPs per second; `documents` is how many are packed into a row."""
    import train_speed

    from mmtx.config import DecoderConfig
    from mmtx.loss import next_token_loss
    from mmtx.model import Decoder
    from mmtx.scaling import cost
    from mmtx.training.optimizer import OptimizerConfig, configure
    from mmtx.varlen import Packing

    sizes, batch, length = train_speed.SHAPES["short" if bench.short else SHAPE]
    config = DecoderConfig(**sizes, tied=False)
    torch.manual_seed(0)
    decoder = Decoder(config).to(bench.device)
    optimizer = configure(decoder, OptimizerConfig(), 10 ** 6)["optimizer"]
    token = torch.arange(batch * length, device=bench.device).view(batch, length)
    document = length // documents
    packing = Packing.of(token % length // document) if documents > 1 else None
    ids = torch.randint(0, config.vocabulary_size, (batch, length + 1), device=bench.device)

    def loss() -> torch.Tensor:
        hidden = decoder(ids[:, :-1], token % document, packing).flatten(0, 1)
        return next_token_loss(decoder.output, hidden, ids[:, 1:].flatten()).total / token.numel()

    # With --short no C++ compiler is used, which takes minutes on a CPU.
    run = torch.compile(loss, backend="aot_eager" if bench.short else "inductor") if compiled else loss

    def step() -> None:
        with torch.autocast(bench.device, torch.bfloat16):
            value = run()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert bench.short or value.isfinite()

    before = bench.now()
    step()
    first = bench.now() - before
    for _ in range(0 if bench.short else 2):
        step()
    steps = bench.rate(step, 20)
    return {"tokens/s": steps * token.numel(), "FLOP/s": steps * cost(config, token.numel(), document).training,
            "seconds of the first step": first, "peak GB": bench.gigabytes()}


def training(bench: Bench) -> Figures:
    """Training in bf16, not compiled."""
    return _training(bench, compiled=False)


def compiled_training(bench: Bench) -> Figures:
    """The same through torch.compile."""
    return _training(bench, compiled=True)


def packed_training(bench: Bench) -> Figures:
    """The same with eight documents per row, each of which attends only to itself."""
    return _training(bench, compiled=False, documents=8)


def _decoder(bench: Bench) -> tuple:
    """A decoder with random weights, its grammar, and a function that makes prompts for a number of rows."""
    import decode_speed
    import numpy as np

    from mmtx.grammar import Grammar
    from mmtx.sequence import Prompt
    from mmtx.vocabulary import SLOTS, Entry, Vocabulary

    config = decode_speed.SHAPES["short" if bench.short else DECODED]
    decoder = decode_speed.random_decoder(config, bench.device, torch.bfloat16)
    grammar = Grammar(Vocabulary((Entry("text", 0, config.vocabulary_size - SLOTS, "", None, None),)))
    return decoder, grammar, lambda rows: [Prompt(np.arange(16) + row) for row in range(rows)]


def bytes_read(decoder: torch.nn.Module) -> int:
    """Bytes of weights that a step of one row reads: all, except that an untied embedding counts one row."""
    table = decoder.embedding.weight
    rest = sum(p.nbytes for p in decoder.parameters() if p is not table)
    return rest + (table.nbytes if decoder.output is None else table[0].nbytes)


LONG = 4000          # tokens in a long context


def _decode(bench: Bench, ways: dict[str, Callable], batches: dict[int, tuple[str, ...]]) -> Figures:
    """Greedy decoding with some of the engines at each batch size; `ways` make an engine from decoder, weights and rows.

    Measures a step of `generate` and parts of it: "network" feeds ids, "scores" also finds the best next id. The rest is the grammar
    and a share of reading the prompt.
    """
    import numpy as np

    from mmtx.inference.generation import generate
    from mmtx.inference.sampling import Sampling
    from mmtx.inference.weights import Weights
    from mmtx.sequence import Prompt

    decoder, grammar, prompts = _decoder(bench)
    new, found = 4 if bench.short else 128, {"bytes of weights read": bytes_read(decoder)}

    def figures(name: str, choose: Callable, rows: int, weights: Weights) -> list[np.ndarray]:
        given = prompts(rows)

        def answer() -> list[np.ndarray]:
            return generate(decoder, grammar, given, "text", Sampling(max_new_tokens=new), weights=weights, choose=choose)

        def part(kind: str, given: list[Prompt]) -> float:
            engine.prefill(given)
            ids = torch.zeros(rows, dtype=torch.long, device=bench.device)
            for _ in range(2):
                engine.step(ids)
            start = bench.now()
            for _ in range(new - 3):
                engine.step(ids)
                if kind == "scores":
                    ids = engine.best(allowed)
            return (bench.now() - start) / (new - 3) * 1e6

        start = bench.now()
        answer()
        found[f"{name}: seconds of the first answer"] = bench.now() - start
        answer()
        found[f"ids/s, {name}"] = bench.rate(answer, 1.5) * rows * new
        engine = choose(decoder, weights, rows)
        allowed = grammar.allowed(grammar.start(rows, "text", bench.device), grammar.reach("text"))
        found[f"{name}: us to read the prompt"] = 1e6 / bench.rate(lambda: engine.prefill(given), 0.2)
        for kind in ("network", "scores"):
            found[f"{name}: us a step, {kind}"] = part(kind, given)
        found[f"{name}: us a step, all"] = 1e6 * rows / found[f"ids/s, {name}"]
        if rows == 1 and "compiled" not in ways:   # each further shape takes a minute to compile
            long = [Prompt(np.arange(64 if bench.short else LONG) % 1000)]
            part("network", long)
            found[f"{name}: us a step, network behind {LONG} tokens"] = part("network", long)
        return answer()

    for rows, names in batches.items():
        answers: dict[str, list[np.ndarray]] = {}
        for way in names:
            name = f"{way}, {rows} row{'s' * (rows > 1)}"
            try:
                with torch.inference_mode():
                    answers[way] = figures(name, ways[way], rows, Weights.of(decoder, fixed=True))
                if way != names[0] and names[0] in answers:
                    # Random weights in bfloat16 give many ties; after the first tie broken differently, the answers diverge.
                    first = [int((a[:new] == b[:new]).cumprod().sum()) for a, b in zip(answers[names[0]], answers[way], strict=True)]
                    found[f"{name}: ids that are those of {names[0]}, up to the first that differs"] = sum(first) / rows
            except Exception:  # one engine failed: go on with the others
                traceback.print_exc()
                found[f"{name}: error"] = traceback.format_exc()[-1500:]
    return {**found, "peak GB": bench.gigabytes()}


def decoding(bench: Bench) -> Figures:
    """Greedy decoding in bf16: eager, replayed as a CUDA graph, and with our own kernels."""
    from mmtx.inference.graph_engine import GraphEngine
    from mmtx.inference.torch_engine import TorchEngine

    ways: dict[str, Callable] = {"eager": lambda decoder, weights, rows: TorchEngine(decoder, weights),
                                 "graph": lambda decoder, weights, rows: GraphEngine(decoder, weights)}
    if bench.short:
        return _decode(bench, ways, dict.fromkeys((1, 2), ("eager", "graph")))
    from mmtx.inference.fused_engine import FusedEngine

    ways["fused"] = lambda decoder, weights, rows: FusedEngine(decoder, weights)
    return _decode(bench, ways, {1: ("eager", "graph", "fused"), 8: ("graph", "fused"), 32: ("eager", "graph", "fused")})


def compiled_decoding(bench: Bench) -> Figures:
    """The same through torch.compile."""
    from functools import partial

    from mmtx.inference.graph_engine import GraphEngine
    from mmtx.inference.static_step import compiled_step

    make = partial(compiled_step, backend="aot_eager" if bench.short else "inductor")
    return _decode(bench, {"compiled": lambda decoder, weights, rows: GraphEngine(decoder, weights, make)},
                   dict.fromkeys((1, 2 if bench.short else 32), ("compiled",)))


def decoding_peer(bench: Bench) -> Figures:
    """transformers' Qwen3 of the same shape and weights: a static cache, its forward compiled and in CUDA graphs."""
    import decode_speed

    decoder, _, prompts = _decoder(bench)
    peer = decode_speed.qwen3(decoder).to(bench.device, torch.bfloat16)
    found, new = {}, 4 if bench.short else 128
    given = torch.tensor(prompts(1)[0].ids, device=bench.device)[None]

    def answer(**options: Any) -> object:
        return peer.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, eos_token_id=None,
                             pad_token_id=0, **options)

    with torch.inference_mode():
        found["ids/s, eager, dynamic cache"] = new * bench.rate(answer, 1.5)
    if not bench.short:
        with torch.no_grad():
            start = bench.now()
            answer(cache_implementation="static")
            found["seconds of the first answer, static cache, compiled"] = bench.now() - start
            found["ids/s, static cache, compiled"] = new * bench.rate(lambda: answer(cache_implementation="static"), 3)
    return found


@contextmanager
def _unpacked(bench: Bench, count: int) -> Iterator[dict[str, list[str]]]:
    import captions_speed

    with tempfile.TemporaryDirectory() as folder:
        yield {kind: [str(path) for path in captions_speed.unpack(kind, 4 if bench.short else count, Path(folder, kind))]
               for kind in captions_speed.SOURCES}


def captions(bench: Bench) -> Figures:
    """Captions of files with the shipped model, a folder at a time."""
    import mmtx

    model = mmtx.load(device=bench.device)
    with _unpacked(bench, 1000) as files:
        return {**{f"{kind}/s": len(some) * bench.rate(lambda: model.caption(some), 5) for kind, some in files.items()},
                "peak GB": bench.gigabytes()}


def codes(bench: Bench) -> Figures:
    """Encoding files to codes with the networks on the device."""
    import mmtx

    model, found = mmtx.load(device=bench.device), {}
    with _unpacked(bench, 1000) as files:
        for kind, some in files.items():
            marked = [(mmtx.Image if kind == "pictures" else mmtx.Audio)(file) for file in some]
            count = sum(part.codes.size for part in model.encode_parts(marked))
            found[f"codes/s of {kind}"] = count * bench.rate(lambda: model.encode_parts(marked), 5)
    return {**found, "peak GB": bench.gigabytes(), "cores": os.cpu_count()}


def starter(bench: Bench) -> Figures:
    """Two minutes of training on the starter data from scratch: a minute and a half of steps, the rest start-up and shutdown."""
    minutes = ["--trainer.max_steps", "2"] if bench.short else ["--trainer.max_steps", "1000000", "--trainer.max_time", "00:00:01:30"]
    config = "configs/quickstart/decoder.yaml" if bench.short else "configs/starter/decoder.yaml"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "mmtx", "fit", "--config", config, "--output", folder, "--trainer.accelerator",
                               "gpu" if bench.gpu else "cpu", "--trainer.devices", "1", "--trainer.log_every_n_steps", "1",
                               "--trainer.enable_progress_bar", "false", "--trainer.val_check_interval", "1000000",
                               "--trainer.limit_val_batches", "1", *minutes],
                              cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-1500:])
        with open(Path(folder, "metrics", "metrics.csv")) as file:
            losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    last = losses[-20:]
    return {"steps": len(losses), "loss of the first step": losses[0], "loss of the last 20": sum(last) / len(last),
            "seconds": time.perf_counter() - start}


# Most important first; the budgets, in seconds, add up to ten minutes.
STEPS: dict[str, tuple[Callable[[Bench], Figures], int]] = {
    "rates": (rates, 30), "training": (training, 60), "decoding": (decoding, 50), "tests": (tests, 100),
    "compiled training": (compiled_training, 110), "packed training": (packed_training, 50), "captions": (captions, 25),
    "codes": (codes, 25), "starter": (starter, 150)}


# Only on request: they would not fit into ten minutes.
MORE: dict[str, tuple[Callable[[Bench], Figures], int]] = {
    "compiled decoding": (compiled_decoding, 120), "decoding peer": (decoding_peer, 90)}


def take(name: str, bench: Bench, budget: float) -> Figures:
    """Run a step in its own process -> its figures, or its error; processes that it started are ended with it."""
    command = [sys.executable, __file__, "--step", name, "--device", bench.device, *(["--short"] if bench.short else [])]
    with tempfile.TemporaryDirectory() as folder:
        told, output = Path(folder, "figures.json"), Path(folder, "output")
        start = time.perf_counter()
        with open(output, "w") as file:
            process = subprocess.Popen([*command, "--result", str(told)], stdout=file, stderr=subprocess.STDOUT,
                                       start_new_session=True)
            try:
                status: int | None = process.wait(budget)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        took = {"took": time.perf_counter() - start}
        if status is None:
            return {"failed": f"longer than {budget:g} s", **took}
        if status or not told.exists():
            lines = output.read_text(errors="replace").strip().splitlines() or [f"status {status}"]
            return {"failed": lines[-1], "output": "\n".join(lines[-20:]), **took}
        return {**json.loads(told.read_text()), **took}


def shares(found: dict[str, Figures]) -> dict[str, float]:
    """Rates of the steps as shares of the rates of the GPU, where both were measured."""
    known, made = found.get("rates", {}), {}
    for share, step in (("mfu", "training"), ("mfu compiled", "compiled training"), ("mfu packed", "packed training")):
        if "FLOP/s" in found.get(step, {}) and "dense bf16 FLOP/s" in known:
            made[share] = found[step]["FLOP/s"] / known["dense bf16 FLOP/s"]
    if "bytes read and written a second" in known:
        for step, share in (("decoding", "share of the bandwidth"), ("fused decoding", "share of the bandwidth, fused"),
                             ("compiled decoding", "share of the bandwidth, compiled")):
            decoded = found.get(step, {})
            best = max((value for name, value in decoded.items() if re.fullmatch("ids/s, .*, 1 row", name)), default=None)
            if best is not None:
                made[share] = best * decoded["bytes of weights read"] / known["bytes read and written a second"]
    return made


def table(found: dict[str, Figures], short: bool) -> str:
    """Figures as Markdown."""
    lines = ["| step | figure | value |", "| --- | --- | --- |"]
    for step, figures in found.items():
        if "failed" in figures:
            lines.append(f"| {step} | FAILED | {figures['failed'].replace('|', '/')} |")
        for name, value in figures.items():
            if isinstance(value, (int, float)) and name != "took":
                lines.append(f"| {step} | {name} | {value:,.4g} |")
    for name, share in shares(found).items():
        bar = BARS.get(name)
        told = "" if bar is None or short else f", bar >= {bar}{'' if share >= bar else '   MISSED'}"
        lines.append(f"| share | {name} | {share:.3f}{told} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", nargs="+", choices=[*STEPS, *MORE], default=list(STEPS))
    parser.add_argument("--budget", type=float, default=None, help="seconds for each step, in place of its own")
    parser.add_argument("--output", type=Path, default=None, help="folder, default: benchmarks/results; with --short none")
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    parser.add_argument("--step", choices=[*STEPS, *MORE], help=argparse.SUPPRESS)  # the step that a process of `take` runs
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench = Bench(options.device, options.short)
    if options.step:
        options.result.write_text(json.dumps({**STEPS, **MORE}[options.step][0](bench)))
        return 0
    if bench.gpu and not torch.cuda.is_available():
        print("gpu: found no GPU, expected one (--short --device cpu sees that all runs)", file=sys.stderr)
        return 2
    output, found = options.output or (None if options.short else RESULTS), {}
    for name in options.steps:
        budget = options.budget or {**STEPS, **MORE}[name][1] * (10 if options.short else 1)  # a loaded CPU starts slowly
        found[name] = take(name, bench, budget)
        print(f"{name}: {found[name].get('failed', 'done')} ({found[name]['took']:.0f} s)", flush=True)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            result = {"name": "gpu", "date": date.today().isoformat(), "short": options.short, "found": found,
                      "shares": shares(found), "bars": BARS, "machine": machine(), "versions": versions()}
            (output / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            (output / "gpu.md").write_text(table(found, options.short) + "\n", encoding="utf-8")
    print(table(found, options.short))
    return int(any("failed" in figures for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
