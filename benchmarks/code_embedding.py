"""How should codes enter the decoder? One embedding row per code, rows composed from digits, or continuous patch features.

    python benchmarks/code_embedding.py --minutes 2

Trains the quickstart's decoder for the same minutes on the same views of the same pictures and notes, once for each
method, and prints the accuracy on its held-out samples. "full softmax" has composed rows, but keeps codes in the softmax
where the grammar allows none.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from mmtx.config import CodeRange, DecoderConfig
from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.collection import read_config, read_source
from mmtx.data.sample import Media
from mmtx.data.tokens import load_media, seed_of
from mmtx.embedding import Features
from mmtx.modality.base import load_tokenizer
from mmtx.model import Decoder
from mmtx.shipped_files import find_shipped
from mmtx.varlen import Packing
from mmtx.vocabulary import Vocabulary

CONFIG = "configs/quickstart/decoder.yaml"
WAYS = ("digits", "rows", "continuous_inputs", "full softmax")


@torch.no_grad()
def encode(samples, tokenizers, kind, views):
    """Codes (samples, views, N) and features before the quantizer (samples, views, N, D) for one kind of media."""
    tokenizer = tokenizers[kind]
    augment = {"image": ImageAugmentation(), "audio": AudioAugmentation()}[kind]
    media = [load_media(next(p for t in s.turns for p in t.parts if isinstance(p, Media)), tokenizers) for s in samples]
    codes, features = [], []
    for view in range(views):
        generator = torch.Generator().manual_seed(seed_of(0, view))
        for first in range(0, len(media), 64):
            items = media[first:first + 64]
            if view:
                extra = () if kind == "image" else (tokenizer.rate,)
                items = [augment(item, *extra, generator) for item in items]
            for encoding in tokenizer.embed_batch(items):
                codes.append(torch.from_numpy(encoding.codes).flatten())
                features.append(encoding.features.flatten(0, 1).half())
    shape = (views, len(samples))
    return (torch.stack(codes).unflatten(0, shape).transpose(0, 1),
            torch.stack(features).unflatten(0, shape).transpose(0, 1))


def train(way, data, vocabulary, tokenizers, minutes, batch):
    """Train one decoder -> its accuracy on the held-out samples of each kind, and the number of steps."""
    torch.manual_seed(0)
    ranges = tuple(CodeRange(vocabulary.range(k).start, vocabulary.levels(k)) for k in ("image", "audio"))
    shape = yaml.safe_load(Path(CONFIG).read_text())["model"]["init_args"]["decoder"]
    widths = {kind: tokenizers[kind].feature_width for kind in data} if way == "continuous_inputs" else {}
    config = DecoderConfig(vocabulary.size, composed=ranges, features=widths, **shape)
    plain = config.plain_rows
    decoder = Decoder(replace(config, composed=()) if way == "rows" else config)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    text = tokenizers["text"]

    def prompt(kind, codes):
        v, ids = vocabulary, (codes + vocabulary.range(kind).start).tolist()
        head = [v.image, v.height(8), v.width(8)] if kind == "image" else [v.audio]
        return [v.bos, v.user, *head, *ids, v.image_end if kind == "image" else v.audio_end, v.end, v.assistant]

    def hidden(ids, positions, packing, features):
        given = {}
        for kind, values in features.items():
            span = vocabulary.range(kind)
            places = ((ids >= span.start) & (ids < span.stop)).flatten().nonzero().squeeze(1)
            given[kind] = Features(places, values.flatten(0, 1).float())
        return decoder(ids, positions, packing, given)  # ignored if the config names no features

    def run(items):
        """Items (kind, codes, features, pieces so far) -> hidden states of the last prompt position and of each piece."""
        ids, positions, numbers, places = [], [], [], []
        features = {k: [] for k in data}
        for number, (kind, codes, feature, pieces) in enumerate(items):
            stream = prompt(kind, codes) + pieces
            places += range(len(ids) + len(stream) - len(pieces) - 1, len(ids) + len(stream))
            ids += stream
            positions += range(len(stream))
            numbers += [number] * len(stream)
            features[kind].append(feature)
        features = {k: torch.stack(f) for k, f in features.items() if f}
        x = hidden(torch.tensor([ids]), torch.tensor([positions]), Packing.of(torch.tensor([numbers])), features)
        return x.flatten(0, 1)[places]

    start, step = time.time(), 0
    while (passed := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 40) * max(0.02, 1 - passed)
        items, targets = [], []
        for kind in data:
            codes, features, captions = data[kind]["train"]
            for i in torch.randint(len(codes), (batch // 2,)).tolist():
                view = int(torch.randint(codes.shape[1], ()))
                pieces = text.encode(captions[i])
                items.append((kind, codes[i, view], features[i, view], pieces))
                targets += [*pieces, vocabulary.end]
        rows = decoder.output_matrix(plain=way != "full softmax")
        scores = decoder.logits(run(items), rows if way == "full softmax" else rows[:plain])
        loss = F.cross_entropy(scores, torch.tensor(targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step += 1

    accuracy = {}
    with torch.inference_mode():
        rows = decoder.output_matrix()[:plain]
        for kind in data:
            codes, features, captions = data[kind]["held_out"]
            right = []
            for first in range(0, len(codes), 32):
                chosen = range(first, min(first + 32, len(codes)))
                written, open_ = {i: [] for i in chosen}, set(chosen)
                while open_:
                    items = [(kind, codes[i, 0], features[i, 0], written[i]) for i in sorted(open_)]
                    counts = np.cumsum([len(item[3]) + 1 for item in items]) - 1
                    best = decoder.logits(run(items)[counts], rows).argmax(-1).tolist()
                    for i, ident in zip(sorted(open_), best, strict=True):
                        if ident >= text.size or len(written[i]) > 24:
                            open_.discard(i)
                        else:
                            written[i].append(ident)
                said = [text.decode(written[i]) for i in chosen]
                # Of a note, only the instrument: the pairing with this pitch is not in the training set.
                right += [s.rpartition(", ")[0] == captions[i].rpartition(", ")[0] if kind == "audio"
                          else s == captions[i] for s, i in zip(said, chosen, strict=True)]
            accuracy[kind] = float(np.mean(right))
    return accuracy, step


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    tokenizers = {kind: load_tokenizer(find_shipped(f"tokenizers/{kind}")) for kind in ("text", "image", "audio")}
    vocabulary = Vocabulary.build(tokenizers)
    config = read_config(CONFIG)
    data = {}
    for kind, train_source, test_source in zip(("image", "audio"), config.train, config.validation):
        data[kind] = {}
        for name, source, views in (("train", train_source, options.views), ("held_out", test_source, 1)):
            samples = read_source(source)
            data[kind][name] = (*encode(samples, tokenizers, kind, views), [s.caption for s in samples])
    print(f"{options.minutes} minutes each, {torch.get_num_threads()} threads")
    print(f"{'way':14} {'exact name':>10} {'instrument':>10} {'steps':>6}")
    for way in options.ways:
        accuracy, step = train(way, data, vocabulary, tokenizers, options.minutes, options.batch)
        print(f"{way:14} {accuracy['image']:10.3f} {accuracy['audio']:10.3f} {step:6}", flush=True)


if __name__ == "__main__":
    main()
