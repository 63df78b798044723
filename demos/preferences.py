"""Pairs of answers to learn preferences from: draws or plays each prompt several times, and another model judges the results.

    python demos/preferences.py demos/data/starter/sounds-train-*.tar.gz --out audio --file runs/preferences/notes.jsonl

The judge is a captioner: the better answer is the one that makes the prompt the more likely caption. Each line of the file is a row
for `data.train` of a run with `model.dpo`: a prompt, the best of its answers and the worst, as codes of the model's tokenizers.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import mmtx
from mmtx.commands.arguments import count
from mmtx.data.collection import DataSource, progress, read_source
from mmtx.document import MediaPart
from mmtx.inference.sampling import Sampling
from mmtx.sequence import parse

TOGETHER = 32  # answers that are generated at a time


def main() -> None:
    parser = argparse.ArgumentParser(description="Pairs of answers to learn preferences from.")
    parser.add_argument("sources", nargs="+", help="media whose captions are the prompts")
    parser.add_argument("--select", type=json.loads, metavar="JSON", help="as in a configuration: some samples only")
    parser.add_argument("--limit", type=int, help="evenly spread prompts")
    parser.add_argument("--out", choices=("image", "audio"), required=True)
    parser.add_argument("--model", default="demos/generate", help="default: demos/generate")
    parser.add_argument("--judge", default="demos/starter", help="a captioner; default: demos/starter")
    parser.add_argument("--num_return_sequences", type=count(2), default=6, help="answers to each prompt; default: 6")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--margin", type=float, default=0.7, help="least difference in nats between best and worst; default: 0.7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, required=True, help="JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        source = DataSource(options.sources, select=options.select, limit=options.limit)
        prompts = [*dict.fromkeys(sample.caption for sample in read_source(source))]
        model, judge = mmtx.load(options.model), mmtx.load(options.judge)
        options.file.parent.mkdir(parents=True, exist_ok=True)
        kept = 0
        with options.file.open("w", encoding="utf-8") as file:
            for row in rows(model, judge, prompts, options):
                file.write(json.dumps(row) + "\n")
                kept += 1
    except (mmtx.InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.file}: {kept} pairs of {len(prompts)} prompts; the answers to the others are equally good, or equal")


def rows(model: mmtx.Model, judge: mmtx.Model, prompts: Sequence[str], options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """The rows of the prompts whose answers differ enough."""
    tries = options.num_return_sequences
    each = max(1, TOGETHER // tries)
    for first in progress("prompts")(range(0, len(prompts), each)):
        some = prompts[first:first + each]
        answers = answer(model, [prompt for prompt in some for _ in range(tries)], options, first * tries)
        for number, prompt in enumerate(some):
            judged = [(judge.log_likelihood([medium], [prompt])[0], part)
                      for part, medium in answers[number * tries:(number + 1) * tries]]
            best, worst = (choose(judged, key=lambda pair: pair[0]) for choose in (max, min))
            if best[0] - worst[0] >= options.margin:
                yield {"prompt": [{"role": "user", "content": prompt}], **{
                    name: [{"role": "assistant", "content": [{"type": part.kind, "codes": part.array.tolist()}]}]
                    for name, (_, part) in (("chosen", best), ("rejected", worst))},
                    "log_probabilities": [round(best[0], 3), round(worst[0], 3)]}


def answer(model: mmtx.Model, prompts: Sequence[str], options: argparse.Namespace, seed: int) -> list[tuple[MediaPart, Any]]:
    """One answer to each prompt, as codes and as a medium."""
    v = model.vocabulary
    asked = [model.processor.prompt(prompt, options.out) for prompt in prompts]
    sampling = Sampling(temperature=options.temperature, seed=options.seed + seed)
    steps = torch.stack([*model.stream_ids(asked, options.out, sampling=sampling)], 1).tolist()
    answers = [ids[:ids.index(v.end)] for ids in steps]
    parts = [parse([v.bos, *ids, v.eos], v).turns[0].parts[0] for ids in answers]
    return [(part, model.processor.to_media(ids)[0]) for part, ids in zip(parts, answers, strict=True)]


if __name__ == "__main__":
    main()
