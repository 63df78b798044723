"""How often does a model with 8-bit weights generate another id than with its own weights, and do its captions score lower?

    python benchmarks/int8_agreement.py

The shipped models on held-out starter data: along the ids that float32 weights choose greedily, the share of steps in which 8-bit
weights choose the same (without the first id of an answer, for which both prefill in float32). Captions of the first --count media
of each source are then generated both ways and scored. Pictures are drawn for names that the generator was trained on, and for
names that it was not: there it is unsure, and all rounding tells. --model is another model folder, for captions alone.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch
from measure import RESULTS, machine, versions

import mmtx
from mmtx.data.collection import DataSource, read_config, read_source, read_sources
from mmtx.data.tokens import usable
from mmtx.document import Document, TextPart, Turn
from mmtx.inference.choose import choose_engine
from mmtx.inference.engine import Engine
from mmtx.inference.sampling import Sampling
from mmtx.inference.weights import Weights
from mmtx.model_folder import DEFAULT_MODEL
from mmtx.pipeline import Model
from mmtx.report import _figures, _reader
from mmtx.sequence import Prompt, prompt
from mmtx.shipped_files import shipped

ROOT = Path(__file__).parents[1]
SAME, LOSS = 0.99, 0.005  # targets: minimum share of equal steps, maximum difference of a metric
BATCH = 32
DRAWN = {"names of training": "images-train-*.tar.gz", "other names": "images-test-unseen-emoji.tar.gz"}


class Beside(Engine):
    """A leading engine, and another that is fed the same ids and compared in its choices."""

    def __init__(self, leading: Engine, other: Engine, told: list[torch.Tensor]):
        self.leading, self.other, self.told, self.read = leading, other, told, False

    @property
    def hidden(self) -> torch.Tensor:
        return self.leading.hidden

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        self.leading.prefill(prompts), self.other.prefill(prompts)
        self.read = False

    def step(self, ids: torch.Tensor) -> None:
        self.leading.step(ids), self.other.step(ids)
        self.read = True

    def scores(self, first: int | None = None) -> torch.Tensor:
        return self.leading.scores(first)

    def best(self, allowed: torch.Tensor) -> torch.Tensor:
        ids = self.leading.best(allowed)
        if self.read:
            self.told.append(self.other.best(allowed) == ids)
        return ids

    def keep(self, rows: torch.Tensor) -> Engine:
        self.leading, self.other = self.leading.keep(rows), self.other.keep(rows)
        return self


def agreement(model: Model, documents: Sequence[Document], out: str = "text", batch: int = BATCH) -> tuple[int, int]:
    """Greedy answers to documents -> steps in which 8-bit weights choose the same id, and all steps, without the first of each."""
    told: list[torch.Tensor] = []
    plain, small = (Weights.of(model.decoder, fixed=True, load_in_8bit=bits) for bits in (False, True))
    beside = lambda decoder, _, rows: Beside(choose_engine(decoder, plain, rows), choose_engine(decoder, small, rows), told)
    for first in range(0, len(documents), batch):
        prompts = [prompt(document, model.vocabulary) for document in documents[first:first + batch]]
        for _ in model.stream_ids(prompts, out, sampling=Sampling(max_new_tokens=128), choose=beside):
            pass
    same = torch.cat(told)
    return int(same.sum()), len(same)


def captions(folder: str, count: int) -> dict:
    """Equal steps and caption metrics on each held-out source, for a model of the starter data."""
    model, small = mmtx.load(folder, "cpu"), mmtx.load(folder, "cpu", load_in_8bit=True)
    config = read_config(shipped("configs/starter/captions.yaml"))
    known = [{**sample.metadata, "caption": sample.caption} for sample in read_sources(
        [source for source in config.train if source.task == "caption"], config.max_bad).samples]
    found: dict[str, dict] = {}
    for source in config.validation:
        held_out = read_sources([source], config.max_bad)
        chosen = [held_out.samples[i] for i in np.random.default_rng(0).permutation(len(held_out.samples))[:count]]
        samples, documents = zip(*usable(chosen, model.tokenizers, held_out.counters[0], iter, model.decoder.config.encoders),
                                 strict=True)
        asked = [Document(document.turns[:1]) for document in documents]
        same, steps = agreement(model, asked)
        reader = _reader(source, known)
        scores = [{name: score.value for name, score in _figures(samples, reader, each.caption_documents(asked)).items()}
                  for each in (model, small)]
        worst = max((abs(scores[1][name] - value), name) for name, value in scores[0].items())
        found[Path(source.paths[0]).name] = {
            "media": len(asked), "steps": steps, "same": same / steps, "float32": scores[0], "int8": scores[1],
            "largest difference": worst[0], "of": worst[1]}
    return found


def pictures(pattern: str, count: int) -> dict:
    """Equal steps in image generation, with the shipped generator and `count` names evenly spread over those of a source."""
    model = mmtx.load(shipped("demos/generate"), "cpu")
    names = sorted({sample.caption for sample in read_source(DataSource([str(shipped("demos/data/starter") / pattern)]))})
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(count, len(names))).astype(int)]
    asked = [Document((Turn("user", (TextPart(model.tokenizers["text"].encode(name)),)),)) for name in chosen]
    same, steps = agreement(model, asked, "image")
    return {"media": len(asked), "steps": steps, "same": same / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--count", type=int, default=400, help="media of each source, default: 400")
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    if options.short:
        options.count = 8
    found = captions(options.model or DEFAULT_MODEL, options.count)
    if options.model is None:
        found |= {f"drawn, {what}": pictures(pattern, options.count) for what, pattern in DRAWN.items()}
    print("| what | answers | steps | same id | largest difference of a score |\n| --- | --- | --- | --- | --- |")
    for name, each in found.items():
        difference = f"{each['largest difference']:.4f} ({each['of']})" if "of" in each else "-"
        print(f"| {name} | {each['media']} | {each['steps']:,} | {each['same']:.4f} | {difference} |")
    steps = sum(each["steps"] for each in found.values())
    share = sum(each["same"] * each["steps"] for each in found.values()) / steps
    print(f"all: {share:.4f} of {steps:,} steps, bar >= {SAME}{'' if share >= SAME else '   MISSED'}")
    if not options.short:
        RESULTS.mkdir(exist_ok=True)
        result = {"name": "int8_agreement", "date": date.today().isoformat(), "same": share, "found": found,
                  "bars": {"same": SAME, "difference": LOSS},
                  "settings": {"count": options.count, "model": options.model or DEFAULT_MODEL},
                  "machine": machine(), "versions": versions()}
        (RESULTS / "int8_agreement.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
