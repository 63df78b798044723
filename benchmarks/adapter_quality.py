"""What do LoRA and QLoRA cost in quality? The shipped captioner learns new names: all of it, with adapters, and on a 4-bit base.

    python benchmarks/adapter_quality.py --steps 200 --seeds 2

Pictures of starter emoji whose names no earlier training has seen: four styles for training, and a fifth, Fluent (flat), of the
same names for the test. Each method runs at two learning rates with the first seed, and at the better one with the other seeds.
Finished runs are not repeated, so the command can be run again. Writes results/adapter_quality.json.
"""

import argparse
import json
import tarfile
from datetime import date
from pathlib import Path

import numpy as np
import yaml
from measure import RESULTS, machine, versions

import mmtx
from mmtx.cli import main as run
from mmtx.data.collection import read_config, read_sources
from mmtx.data.tokens import usable
from mmtx.saved_folder import CONFIG

ROOT = Path(__file__).parents[1]
START = ROOT / "demos" / "starter"
ARCHIVE = ROOT / "demos" / "data" / "starter" / "images-test-unseen-emoji.tar.gz"
TRAIN, TEST = ("noto", "noto-v1", "emojione", "fxemoji"), "fluent-emoji-flat"
RATES = (1.0, 2.0)  # factors of the rates in configs/starter/captions.yaml; doubled for adapters
ADAPTERS = {"rank": 64, "alpha": 128.0}
BATCH = 64
WAYS = {"full": None, "lora": ADAPTERS, "qlora": {**ADAPTERS, "load_in_4bit": True}}


def names() -> list[str]:
    """Names that occur in the test style and in at least one training style."""
    found: dict[str, set[str]] = {}
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            if member.name.endswith(".json"):
                about = json.load(archive.extractfile(member))
                found.setdefault(about["caption"], set()).add(about["style"])
    return sorted(name for name, styles in found.items() if TEST in styles and styles & {*TRAIN})


def settings(way: str, rate: float, seed: int, steps: int, output: Path) -> dict:
    config = yaml.safe_load((ROOT / "configs" / "starter" / "captions.yaml").read_text())
    model, data = (config[part]["init_args"] for part in ("model", "data"))
    model |= {"init_from": str(START), "lora": WAYS[way]}
    scale = rate if way == "full" else 2 * rate  # adapters are trained without Muon
    model["optimizer"] |= {"learning_rate": 1.5e-3 * scale, "muon_lr": 4e-3 * rate if way == "full" else None, "warmup_steps": 20}
    chosen = names()
    source = lambda styles, **more: {"paths": [str(ARCHIVE)], "select": {"style": list(styles), "caption": chosen}, **more}
    data |= {"train": [source(TRAIN)], "validation": [source([TEST])],
             "tokenizers": {kind: str(START / kind) for kind in ("text", "image", "audio")}}
    config["trainer"] |= {"max_steps": steps, "val_check_interval": steps}
    return {**config, "output": str(output), "seed_everything": seed}


def train(way: str, rate: float, seed: int, steps: int, folder: Path) -> dict:
    """Train, unless done before, and caption the images of the held-out style."""
    output = folder / f"{way}-{rate:g}-{seed}-{steps}"
    path = output.with_suffix(".yaml")
    if not (output / "model" / CONFIG).is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(settings(way, rate, seed, steps, output)))
        run(["fit", "--config", str(path), "--ckpt_path", "last"])
    model, found = mmtx.load(output / "model", "cpu"), read_sources(read_config(path).validation, 0.0)
    samples, documents = zip(*usable(found.samples, model.tokenizers, found.counters[0], patches=model.decoder.config.encoders))
    said = [caption for first in range(0, len(documents), BATCH)
            for caption in model.caption_documents(documents[first:first + BATCH])]
    right = [caption == sample.caption for caption, sample in zip(said, samples, strict=True)]
    return {"way": way, "rate": rate, "seed": seed, "exact name": float(np.mean(right))}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "adapter_quality")
    options = parser.parse_args()
    found = []
    for way in WAYS:
        first = [train(way, rate, 0, options.steps, options.runs) for rate in RATES]
        best = max(first, key=lambda one: one["exact name"])["rate"]
        found += first + [train(way, best, seed, options.steps, options.runs) for seed in range(1, options.seeds)]
        print(*found[-options.seeds - 1:], sep="\n", flush=True)
    (RESULTS / "adapter_quality.json").write_text(json.dumps(
        {"date": str(date.today()), "machine": machine(), "versions": versions(), "steps": options.steps, "runs": found}, indent=1))


if __name__ == "__main__":
    main()
