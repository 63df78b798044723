"""Does the best learning rate move with the width, and does `mup_base_width` hold it?

    python benchmarks/learning_rate.py                       # AdamW and Muon, each without and with muP
    python benchmarks/learning_rate.py --ways adamw adamw+mup

Trains decoders of several widths at several learning rates for a few steps each, on the shards of benchmarks/scaling_grid.py and
with the shape of configs/scaling/decoder.yaml, and says at which rate the held-out loss is least: where a parabola through the best
rate and its neighbours (over the logarithm of the rate) is lowest. The bar: it moves by less than a factor of 1.5. What is measured
is added to results/learning_rate.json at once, and what is there is not measured again.
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
import yaml
from measure import RESULTS, machine, versions
from scaling_grid import BASE, prepare

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
RATES = {"adamw": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), "muon": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)}
WAYS = ("adamw", "adamw+mup", "muon", "muon+mup")
EMBEDDING = 8e-3   # learning rate of what Muon does not train
CHECKED = 24       # held-out batches
BAR = 1.5


class Stream:
    """Batches to train on and held-out ones, of one vocabulary."""

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


def train(stream: Stream, width: int, way: str, rate: float, base: int, steps: int) -> float:
    """Train one decoder -> its held-out loss in nats a target."""
    torch.manual_seed(0)
    decoder = stream.decoder(width)
    config = OptimizerConfig(rate, warmup_steps=10) if way.startswith("adamw") else OptimizerConfig(EMBEDDING, rate, warmup_steps=10)
    more = {}
    if way.endswith("+mup"):
        rescale(decoder, base)
        more = {"scaled": scaled(decoder), "ratio": base / width}
    made = configure(decoder, config, steps, **more)
    for k in range(steps):
        batch = stream.train[k]
        made["optimizer"].zero_grad()
        (losses(decoder, batch).total / len(batch.targets)).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    with torch.inference_mode():
        found = torch.cat([losses(decoder, batch).loss for batch in stream.held_out])
    return float(found.mean())


def best_rate(found: dict[float, float]) -> float:
    """Where the parabola through the best rate and its neighbours is lowest; the best rate where it is the first or last."""
    rates = sorted(found)
    k = min(range(len(rates)), key=lambda i: found[rates[i]])
    if k in (0, len(rates) - 1):
        return rates[k]
    near = rates[k - 1:k + 2]
    a, b, _ = np.polyfit(np.log(near), [found[rate] for rate in near], 2)
    return float(np.exp(-b / (2 * a)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/scaling/data"), help="shards, which are made where they lack")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128], help="the first is the base of muP")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=640, help="of a batch")
    parser.add_argument("--short", action="store_true", help="two steps, which say nothing, and nothing is written")
    options = parser.parse_args()
    steps, path = 2 if options.short else options.steps, RESULTS / "learning_rate.json"
    prepare(options.data)
    stream = Stream(options.data, options.tokens, steps)
    settings = {"steps": steps, "tokens": options.tokens, "base": options.widths[0]}
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not options.short else {}
    if result.get("settings") != settings:
        result = {"name": "learning_rate", "settings": settings, "losses": {}}
    for way in options.ways:
        for width in options.widths:
            found = result["losses"].setdefault(way, {}).setdefault(str(width), {})
            begin = time.process_time()
            for rate in RATES[way.split("+")[0]][:2 if options.short else None]:
                if str(rate) not in found:
                    found[str(rate)] = round(train(stream, width, way, rate, options.widths[0], steps), 4)
                    if not options.short:
                        result |= {"date": date.today().isoformat(), "machine": machine(), "versions": versions()}
                        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"{way:10} {width:4}: " + ", ".join(f"{rate} {loss:.3f}" for rate, loss in found.items())
                  + f"  ({time.process_time() - begin:.0f} s of the processor)", flush=True)
        best = [best_rate({float(rate): loss for rate, loss in found.items()}) for found in result["losses"][way].values()]
        moved = max(best) / min(best)
        print(f"{way:10} best " + ", ".join(f"{rate:.4g}" for rate in best) + f": moves by a factor of {moved:.2f}, bar < {BAR}"
              + ("" if moved < BAR else "   MISSED"), flush=True)


if __name__ == "__main__":
    main()
