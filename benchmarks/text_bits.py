"""Bits per byte of plain text: the decoder, and an n-gram baseline with as many numbers as the decoder has parameters.

    python benchmarks/text_bits.py
    python benchmarks/text_bits.py --model runs/starter/speech/model

The baseline (benchmarks/ngram.py, interpolated Kneser-Ney) counts the pieces of the same tokenizer in the same training text. Both
pay for each piece and for the end of each row.
"""

import argparse
import json
from collections.abc import Sequence
from math import log
from pathlib import Path

import torch
from ngram import KneserNey

from mmtx.data.collection import DataSource, read_source
from mmtx.data.documents import Documents
from mmtx.data.packing import PackedBatches
from mmtx.data.sample import Sample
from mmtx.loss import next_token_loss
from mmtx.modality.base import load_tokenizer
from mmtx.pipeline import Model, load

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"


@torch.inference_mode()
def decoder_bits(model: Model, samples: Sequence[Sample], texts: Sequence[str]) -> float:
    """Bits per byte of a decoder on rows of text of at most 1024 tokens."""
    documents = Documents(samples, model.tokenizers, model.vocabulary, max_seq_len=1024)
    if len(documents) < len(samples):
        raise SystemExit(f"{len(samples) - len(documents)} rows are longer than 1024 tokens")
    nats, decoder = 0.0, model.decoder.eval()
    for batch in PackedBatches(documents, model.vocabulary, 4096, shuffle=False):
        hidden = decoder(batch.ids, batch.positions, batch.packing, batch.features).flatten(0, 1)[batch.supervised]
        nats += float(next_token_loss(decoder.output or decoder.embedding, hidden, batch.targets, batch.plain).loss.double().sum())
    return nats / log(2) / sum(len(text.encode()) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", nargs="+", default=[str(STARTER / "text-train.jsonl")])
    parser.add_argument("--test", nargs="+", default=[str(path) for path in sorted(STARTER.glob("text-test-*.jsonl"))])
    parser.add_argument("--tokenizer", default="tokenizers/text", help="of the control, where no model is given")
    parser.add_argument("--model", help="folder of a decoder")
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--numbers", type=int, default=2_080_000, help="of the control, where no model is given")
    options = parser.parse_args()
    model = load(options.model) if options.model else None
    tokenizer = model.tokenizers["text"] if model else load_tokenizer(options.tokenizer)
    numbers = sum(parameter.numel() for parameter in model.decoder.parameters()) if model else options.numbers
    known = [sample.caption for sample in read_source(DataSource(options.train))]
    control = KneserNey([tokenizer.encode(text) for text in known], tokenizer.size, options.order, numbers)
    for path in options.test:
        samples = read_source(DataSource([path]))
        texts = [sample.caption for sample in samples]
        row = {"test": Path(path).name, "bytes": sum(len(text.encode()) for text in texts),
               "n-gram": round(control.bits_per_byte([tokenizer.encode(text) for text in texts], texts), 3),
               "numbers": control.numbers, "order": options.order}
        if model:
            row |= {"decoder": round(decoder_bits(model, samples, texts), 3), "parameters": numbers}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
