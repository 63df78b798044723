"""Is a multi-task model worse than single-task models? The same compute, data and shape for both.

    python benchmarks/one_model.py --minutes 3 --seed 0 --out one_model.json

Four tasks on the data of the quickstart: naming pictures of an unseen style, naming unseen notes, and drawing and playing names
seen in training. Each has a decoder of its own, trained for --minutes on one core, and one decoder of the same shape is trained on
all of them for the sum of their minutes, with about a quarter of its tokens for each task. Decoders start from scratch, encoders
from those of the tokenizers; learning rates decay to zero at the end of the minutes. Two more decoders do half of the tasks each,
in twice the minutes: naming, and generating.

A drawn picture is right if the nearest training picture, at 12 x 12 pixels, has its name. A played note is in tune within
50 cents (pYIN of librosa, extra `bench`, without which this is skipped), and of the right instrument if the nearest training
note, in mel bands, is.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from generated import generate, in_tune, originals, pixel_features
from specialists import by_source, figures, learn, medium, new_decoder, options_of, size_of, task_of

from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.collection import read_config, read_sources, swap_turns
from mmtx.data.corpus import Corpus
from mmtx.data.documents import Documents
from mmtx.data.packing import PackedBatches
from mmtx.data.sample import Sample
from mmtx.data.tokens import Augmentation, to_documents
from mmtx.evaluation import mel_features
from mmtx.modality.base import load_tokenizer
from mmtx.pipeline import Model
from mmtx.shipped_files import find_shipped
from mmtx.vocabulary import Vocabulary

STYLE = "noto"  # style of the generated images
MAKES = {"draw": "image", "play": "audio"}
SAMPLING = {"temperature": 0.3, "seed": 0}
GROUPS = {"one for each": [["name pictures"], ["name notes"], ["draw"], ["play"]],
          "one for naming, one for making": [["name pictures", "name notes"], ["draw", "play"]],
          "one for all": [["name pictures", "name notes", "draw", "play"]]}


class Task(NamedTuple):
    """Training samples with their repeats per epoch, and test samples."""

    train: list[Sample]
    repeats: list[int]
    tests: list[Sample]


def tasks_of(path: str, few: int | None) -> dict[str, Task]:
    """The tasks on the data of a configuration, limited to `few` samples each if given."""
    config = read_config(path)
    known, held_out = read_sources(config.train, 0.0), read_sources(config.validation, 0.0)
    found = {}
    for task, kind in (("name pictures", "pictures"), ("name notes", "notes")):
        pairs = [(s, r) for s, r in zip(known.samples, known.repeats, strict=True) if task_of(s) == kind][:few]
        tests = next(some for some in by_source(held_out) if task_of(some[0]) == kind)[:few]
        found[task] = Task([s for s, _ in pairs], [r for _, r in pairs], tests)
    drawn = [s for s in found["name pictures"].train if few or s.metadata["style"] == STYLE]
    played = [s for s in found["name notes"].train if medium(s).speed == 1]
    for task, samples in (("draw", drawn), ("play", played)):
        found[task] = Task([swap_turns(s) for s in samples], [1] * len(samples), samples)
    return found


def train(path: str, names: Sequence[str], tasks: dict[str, Task], tokenizers: dict, augmentation: Augmentation, minutes: float):
    """Train one decoder on some of the tasks -> the model, and the number of steps."""
    options, data = options_of(path)
    kinds = {medium(tasks[name].tests[0]).kind for name in names}
    tokenizers = {kind: tokenizer for kind, tokenizer in tokenizers.items() if kind == "text" or kind in kinds}
    vocabulary = Vocabulary.build(tokenizers)
    decoder = new_decoder(options, vocabulary, tokenizers, "encoder")
    parts = [Documents(tasks[name].train, tokenizers, vocabulary, max_seq_len=data["max_seq_len"], patches=tuple(decoder.encoders),
                       augmentation=Augmentation() if name in MAKES else augmentation) for name in names]
    # Each task gets about as many tokens per epoch as the largest.
    tokens = [int(part.lengths @ np.array(tasks[name].repeats)) for part, name in zip(parts, names, strict=True)]
    repeats = [np.array(tasks[name].repeats) * round(max(tokens) / some) for name, some in zip(names, tokens, strict=True)]
    corpus = Corpus(parts, repeats)
    batches = PackedBatches(corpus, vocabulary, data["tokens_per_batch"], repeats=np.concatenate(repeats), steps=10**6)
    steps = learn(decoder, options, batches, minutes)
    return Model(decoder, vocabulary, tokenizers), steps


def nearest(made: Sequence[np.ndarray], known: Sequence[np.ndarray], features) -> np.ndarray:
    """Index of the known medium nearest to each generated one."""
    points = torch.tensor(np.stack([features(medium) for medium in known]))
    return torch.cdist(torch.tensor(np.stack([features(medium) for medium in made])), points).argmin(1).numpy()


def score(name: str, model: Model, tests: list[Sample]) -> dict[str, float]:
    """Accuracies on the test samples of a task."""
    true = [s.caption for s in tests]
    if name not in MAKES:
        said = model.caption_documents(to_documents(tests, model.tokenizers, patches=tuple(model.decoder.encoders)))
        return figures("pictures" if name == "name pictures" else "notes", said, true)
    made, real = generate(model, true, MAKES[name], SAMPLING), originals(tests)
    if name == "draw":
        found = nearest(made, real, lambda picture: pixel_features(picture, 12, centred=True))
        return {"picture": float(np.mean([true[i] == caption for i, caption in zip(found, true, strict=True)]))}
    found = nearest(made, real, lambda sound: mel_features(sound, 16_000, power=1, floor=1.0))
    right = [tests[i].metadata["instrument"] == s.metadata["instrument"] for i, s in zip(found, tests, strict=True)]
    tuned = {"pitch": float(in_tune(made, tests).mean())} if importlib.util.find_spec("librosa") else {}
    return tuned | {"played instrument": float(np.mean(right))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart/decoder.yaml")
    parser.add_argument("--minutes", type=float, default=3.0, help="of a core for each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--short", action="store_true", help="see that all run, on a few samples")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizers = {kind: load_tokenizer(find_shipped(f"tokenizers/{kind}")) for kind in ("text", "image", "audio")}
    data = options_of(options.config)[1]
    augmentation = Augmentation(ImageAugmentation(**data["image_augmentation"]), AudioAugmentation(**data["audio_augmentation"]))
    minutes, few = (0.02, 8) if options.short else (options.minutes, None)
    tasks, results = tasks_of(options.config, few), {}
    for group in options.groups:
        found: dict[str, float] = {}
        for names in GROUPS[group]:
            torch.manual_seed(options.seed)
            begin = time.process_time()
            model, steps = train(options.config, names, tasks, tokenizers, augmentation, minutes * len(names))
            trained = (time.process_time() - begin) / 60
            for name in names:
                found |= score(name, model, tasks[name].tests)
            print(f"  {', '.join(names)}: {size_of(model.decoder) / 1e6:.2f} M parameters, {steps} steps, {trained:.1f} minutes",
                  flush=True)
        results[group] = found
        print(f"{group}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"config": options.config, "minutes": minutes, "seed": options.seed, "results": results},
                                          indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
