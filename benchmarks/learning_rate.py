"""Does the best learning rate move with the width, and does `mup_base_width` hold it?

    python benchmarks/learning_rate.py                       # AdamW and Muon, each without and with muP
    python benchmarks/learning_rate.py --ways adamw adamw+mup
    python benchmarks/learning_rate.py --jobs 8 --cpu_jobs 8 --seconds 120    # side by side on a GPU and on cores beside it

Trains decoders of several widths on the shards of benchmarks/scaling_grid.py and with the shape of configs/scaling/decoder.yaml, at
learning rates a factor of two apart until the best one is between two others, and then at the two a factor of sqrt(2) from it; then
again with other seeds. The optimal rate is the minimum of a parabola fitted to the held-out loss at the best rate and those within a
factor of two of it (over the logarithm of the rate, mean over seeds). The bar: it moves by less than a factor of 1.5. Measurements
are added to the results at once, and existing ones are not repeated.
"""

import argparse
import json
import tempfile
from datetime import date
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml
from measure import RESULTS, machine, versions
from scaling_grid import BASE, core_seconds, prepare
from side_by_side import Task, side_by_side, slots

from mmtx.config import CodeRange, DecoderConfig
from mmtx.data.collection import DataSource
from mmtx.data.corpus import read_corpus
from mmtx.data.packing import Batch, PackedBatches
from mmtx.loss import next_token_loss
from mmtx.modality.base import load_tokenizer
from mmtx.model import Decoder
from mmtx.scaling import sizes
from mmtx.training.mup import rescale, scaled
from mmtx.training.optimizer import OptimizerConfig, configure
from mmtx.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
RATES = {"adamw": 4e-3, "muon": 2e-2}  # starting point at the smallest width; all others are powers of sqrt(2) times this
WAYS = ("adamw", "adamw+mup", "muon", "muon+mup")
EMBEDDING = 4e-3   # learning rate of parameters that Muon does not train
CHECKED = 24       # held-out batches
BAR = 1.5


class Stream:
    """Training and held-out batches, of one vocabulary."""

    def __init__(self, folder: Path, tokens: int, steps: int):
        data = yaml.safe_load(BASE.read_text())["data"]["init_args"]
        tokenizers = {kind: load_tokenizer(ROOT / path) for kind, path in data["tokenizers"].items()}
        self.vocabulary = Vocabulary.build(tokenizers)
        sources = {name: [DataSource(**{**source, "paths": [str(folder / Path(path).name) for path in source["paths"]]})
                          for source in data[name]] for name in ("train", "validation")}
        self.train, held_out = (
            PackedBatches(read_corpus(sources[name], tokenizers, self.vocabulary, max_seq_len=data["max_seq_len"]), self.vocabulary,
                          max(tokens, data["max_seq_len"] + 1), steps=steps) for name in ("train", "validation"))
        self.held_out = [held_out[k] for k in range(min(CHECKED, steps))]

    def decoder(self, width: int) -> Decoder:
        v, shape = self.vocabulary, yaml.safe_load(BASE.read_text())["model"]["init_args"]["decoder"]
        composed = tuple(CodeRange(v.range(kind).start, levels) for kind in v.kinds if (levels := v.levels(kind)))
        config = DecoderConfig(**{**shape, "vocabulary_size": v.size, "composed": composed})
        return Decoder(next(c for c in sizes(config) if c.width == width))


def losses(decoder: Decoder, batch: Batch):
    hidden = decoder(batch.ids, batch.positions, batch.packing).flatten(0, 1)[batch.supervised]
    return next_token_loss(decoder.output or decoder.embedding, hidden, batch.targets, batch.plain, None, 1e-5)


@lru_cache(1)
def opened(folder: Path, tokens: int, steps: int) -> Stream:
    """The stream of a process, shared by its runs."""
    return Stream(folder, tokens, steps)


def train(device: str, folder: Path, tokens: int, width: int, way: str, rate: float, base: int, steps: int, seed: int) -> float:
    """Train one decoder -> its held-out loss in nats per target. The seed sets the initial weights and the training batches."""
    torch.manual_seed(seed)
    stream = opened(folder, tokens, steps * (seed + 1))
    decoder = stream.decoder(width).to(device)
    config = OptimizerConfig(rate, warmup_steps=10) if way.startswith("adamw") else OptimizerConfig(EMBEDDING, rate, warmup_steps=10)
    more = {}
    if way.endswith("+mup"):
        rescale(decoder, base)
        more = {"scaled": scaled(decoder), "ratio": base / width}
    made = configure(decoder, config, steps, **more)
    for k in range(steps):
        batch = on(stream.train[seed * steps + k], device)
        made["optimizer"].zero_grad()
        (losses(decoder, batch).total / len(batch.targets)).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    with torch.inference_mode():
        found = torch.cat([losses(decoder, on(batch, device)).loss for batch in stream.held_out])
    return round(float(found.mean()), 4)


def on(batch: Batch, device: str) -> Batch:
    """A batch on a device; fields not used in training are not moved."""
    packing = batch.packing._replace(gather=batch.packing.gather.to(device), scatter=batch.packing.scatter.to(device))
    moved = {name: getattr(batch, name).to(device) for name in ("ids", "positions", "supervised", "targets")}
    return batch._replace(packing=packing, **moved)


def best_rate(found: dict[int, float]) -> float:
    """Power of sqrt(2) at the minimum of a parabola through the best and those within 2 of it; the best itself at an end."""
    best = min(found, key=lambda power: found[power])
    near = sorted(power for power in found if abs(power - best) <= 2)
    if best in (near[0], near[-1]):
        return float(best)
    a, b, _ = np.polyfit(near, [found[power] for power in near], 2)
    return float(np.clip(-b / (2 * a), near[0], near[-1])) if a > 0 else float(best)


def missing(found: dict[int, dict[int, float]], seeds: int) -> list[tuple[int, int]]:
    """Which (power of sqrt(2), seed) to measure next, given all results so far, {power: {seed: loss}}."""
    first = {power: losses[0] for power, losses in found.items() if 0 in losses}
    if not first:
        return [(power, 0) for power in (-2, 0, 2)]
    best = min(first, key=lambda power: first[power])
    around = [power for power in (best - 2, best + 2) if power not in first] or \
        [power for power in (best - 1, best + 1) if power not in first]
    if around:
        return [(power, 0) for power in around]
    return [(power, seed) for seed in range(1, seeds) for power in (best - 2, best, best + 2, best - 1, best + 1)
            if seed not in found[power]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/scaling/data"), help="shards, which are made where they lack")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="the first is the base of muP")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="processes, on the GPU if there is one")
    parser.add_argument("--cpu_jobs", type=int, default=0, help="more of them on the CPU, which train what costs least")
    parser.add_argument("--seconds", type=float, default=1e6, help="runs that are not finished by then are left out")
    parser.add_argument("--results", type=Path, default=RESULTS / "learning_rate.json", help="file of the figures")
    parser.add_argument("--short", action="store_true", help="two steps, which say nothing, and nothing is written")
    options = parser.parse_args()
    if options.short:
        options.steps, options.seeds, options.widths = 2, 1, [16, 32]
    prepare(options.data)
    base, path = options.widths[0], options.results
    settings = {"steps": options.steps, "tokens": options.tokens, "base": base}
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not options.short else {}
    if result.get("settings") != settings:
        result = {"name": "learning_rate", "settings": settings, "losses": {}}
    pairs = [(way, width) for way in options.ways for width in options.widths]
    found = {(way, width): {int(power): {int(seed): loss for seed, loss in losses.items()} for power, losses in
                            result["losses"].get(way, {}).get(str(width), {}).items()} for way, width in pairs}
    asked: dict[tuple[str, int], int] = dict.fromkeys(pairs, 0)
    tasks: list[Task] = []

    def start(way: str) -> float:
        return RATES[way.split("+")[0]]

    def ask(way: str, width: int) -> None:
        """Add the next measurements for a way and width."""
        at = 0 if way != "adamw" else round(-2 * np.log2(width / base))  # expected best rate of AdamW
        known = {power - at: losses for power, losses in found[way, width].items()}
        if options.short and known:
            return
        for power, seed in missing(known, options.seeds):
            rate = start(way) * 2 ** ((power + at) / 2)
            arguments = options.data, options.tokens, width, way, rate, base, options.steps, seed
            cost = options.steps * core_seconds(width) * options.tokens / 2048
            tasks.append(Task(f"{way} {width} {power + at} {seed}", arguments, cost, seed))
            asked[way, width] += 1

    for pair in pairs:
        ask(*pair)
    with tempfile.TemporaryDirectory() as logs:
        for done in side_by_side(train, tasks, slots(options.jobs, options.cpu_jobs), options.seconds, Path(logs)):
            way, *numbers = done.name.split()
            width, power, seed = map(int, numbers)
            found[way, width].setdefault(power, {})[seed] = done.found
            asked[way, width] -= 1
            if not asked[way, width]:
                ask(way, width)
            if not options.short:
                result["losses"].setdefault(way, {})[str(width)] = found[way, width]
                result |= {"date": date.today().isoformat(), "machine": machine(), "versions": versions(),
                           "rates": {way: start(way) for way in options.ways}}
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result["best"] = {}
    for way in options.ways:
        best = {}
        for width in (width for width in options.widths if found[way, width]):
            means = {power: float(np.mean(list(losses.values()))) for power, losses in sorted(found[way, width].items())}
            best[width] = start(way) * 2 ** (best_rate(means) / 2)
            told = ", ".join(f"{start(way) * 2 ** (power / 2):.3g} {loss:.3f}" for power, loss in means.items())
            print(f"{way:10} {width:4}: {told}")
        if best:
            moved = max(best.values()) / min(best.values())
            result["best"][way] = {"rates": best, "moved": round(moved, 3)}
            print(f"{way:10} best " + ", ".join(f"{rate:.4g}" for rate in best.values()) + f": moves by a factor of {moved:.2f}, "
                  f"bar < {BAR}" + ("" if moved < BAR else "   MISSED"), flush=True)
    if not options.short:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
