"""How many bits does a picture or a sound cost when the decoder is the compressor?

    python benchmarks/code_entropy.py
    python benchmarks/code_entropy.py --model runs/starter/entropy-model/model --no_write

An arithmetic coder with the decoder's probabilities needs -log2 of the probability of each code, and a few bits more (Deletang
et al. 2024, https://arxiv.org/abs/2309.10668). Without a model, each code costs the logarithm of the codebook size. In between
are two controls, fitted to the model's training data, part of which is coded here: the frequency of each digit of a code, and
that given the same digit of the previous code. Each is measured with the caption as a prompt, which must then be sent too, and
without. Only what the model has a tokenizer for is measured. Writes results/code_entropy.json.
"""

import argparse
import math
from dataclasses import replace
from datetime import date

import numpy as np
import torch
from measure import write_result

import mmtx
from mmtx.data.collection import DataSource, read_source
from mmtx.data.tokens import to_documents
from mmtx.document import Document, MediaPart
from mmtx.pipeline import Model
from mmtx.sequence import render

DATA = "demos/data/starter/"
# What the model was trained to generate; the controls count the same data.
LEARNT = {"image": DataSource([DATA + "images-train-*.tar.gz"], select={"style": ["noto"]}, task="generate"),
          "audio": DataSource([DATA + "sounds-train-*.tar.gz"], task="generate")}
SETS = {
    "pictures it has learnt": ("image", LEARNT["image"]),
    "pictures, unseen style": ("image", DataSource([DATA + "images-test-unseen-style.tar.gz"], task="generate")),
    "notes it has learnt": ("audio", LEARNT["audio"]),
    "notes, unseen": ("audio", DataSource([DATA + "sounds-test-unseen-notes.tar.gz"], task="generate")),
}
COUNTED = 2000  # media of LEARNT at most


def documents_of(source: DataSource, limit: int, model: Model) -> list[Document]:
    """Captions as user turns, media as answers."""
    return to_documents(read_source(replace(source, limit=limit)), model.tokenizers)


def medium_of(document: Document) -> MediaPart:
    return document.turns[-1].parts[0]


def bits_of_codes(document: Document, kind: str, model: Model) -> float:
    """Bits of the codes of the answer, each predicted by the decoder from all before it."""
    codes = model.vocabulary.range(kind)
    ids = torch.from_numpy(render(document, model.vocabulary).ids).long()
    with torch.inference_mode():
        hidden = model.decoder(ids[None, :-1], torch.arange(len(ids) - 1)[None])[0]
        coded = ((ids[1:] >= codes.start) & (ids[1:] < codes.stop)).nonzero().squeeze(1)
        scores = model.decoder.logits(hidden[coded])[:, codes.start:codes.stop].double()
        return float(torch.nn.functional.cross_entropy(scores, ids[1:][coded] - codes.start, reduction="sum")) / math.log(2)


class DigitCounts:
    """Counts of each digit of a code, with add-one smoothing; for `order` 1 conditioned on the same digit of the previous code."""

    def __init__(self, levels: tuple[int, ...], order: int):
        self.levels, self.order = levels, order
        self.counts = [np.ones((level + 1, level)) for level in levels]  # row `level`: no previous code, or order 0

    def digits(self, codes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(previous digit, digit) of all codes, for each digit position."""
        flat, found = codes.ravel().astype(np.int64), []
        for level in self.levels:
            digit, flat = flat % level, flat // level
            before = np.concatenate([[level], digit[:-1]]) if self.order else np.full(len(digit), level)
            found.append((before, digit))
        return found

    def add(self, codes: np.ndarray) -> None:
        for count, (before, digit) in zip(self.counts, self.digits(codes), strict=True):
            np.add.at(count, (before, digit), 1)

    def bits(self, codes: np.ndarray) -> float:
        return sum(float(-np.log2(count[before, digit] / count[before].sum(1)).sum())
                   for count, (before, digit) in zip(self.counts, self.digits(codes), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demos/generate")
    parser.add_argument("--limit", type=int, default=192, help="media of each set, default: 192")
    parser.add_argument("--no_write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = mmtx.load(options.model, device="cpu")
    result = {"name": "code_entropy", "date": date.today().isoformat(), "model": options.model, "sets": {}}
    print(f"{'bits a code':28} {'codes':>8} {'digits':>8} {'pairs':>8} {'decoder':>8} {'+ caption':>10}")
    controls = {kind: [DigitCounts(model.vocabulary.levels(kind), order) for order in (0, 1)]
                for kind in LEARNT if kind in model.tokenizers}
    for kind in controls:
        for document in documents_of(LEARNT[kind], COUNTED, model):
            for control in controls[kind]:
                control.add(medium_of(document).array)
    for name, (kind, source) in SETS.items():
        if kind not in controls:
            continue
        documents = documents_of(source, options.limit, model)
        sizes = [medium_of(document).array.size for document in documents]
        silent = [Document((replace(document.turns[0], parts=()), document.turns[1])) for document in documents]
        costs = {"codes": [size * math.log2(len(model.vocabulary.range(kind))) for size in sizes],
                 **{title: [control.bits(medium_of(document).array) for document in documents]
                    for title, control in zip(("digits", "pairs of digits"), controls[kind], strict=True)},
                 "decoder": [bits_of_codes(document, kind, model) for document in silent],
                 "decoder with the caption": [bits_of_codes(document, kind, model) for document in documents]}
        found = {title: round(sum(each) / sum(sizes), 3) for title, each in costs.items()}
        print(f"{name:28} " + " ".join(f"{value:8.2f}" for value in found.values()), flush=True)
        result["sets"][name] = {"media": len(documents), "codes a medium": round(sum(sizes) / len(sizes), 1), "bits a code": found,
                                "bytes a medium": {title: round(sum(each) / len(each) / 8, 1) for title, each in costs.items()}}
    if not options.no_write:
        write_result(result)


if __name__ == "__main__":
    main()
