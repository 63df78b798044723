"""Where does the time go in training, decoding and captions? Explains figures that miss their bar.

    python benchmarks/time_shares.py training --shape issue
    python benchmarks/time_shares.py decoding --shape 384x6
    python benchmarks/time_shares.py captions

One thread. Training: shares of a bf16 step by kind of operation, and the rate of its matrix products relative to that of
one large product in the same run. Decoding: a step compared with its matrix products alone, which read all weights. Captions:
each stage for files one at a time and in batches.
"""

import argparse
import json
import os
import tarfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from captions_speed import SOURCES
from decode_speed import PROMPT, random_decoder
from decode_speed import SHAPES as DECODERS
from measure import RESULTS, machine, versions
from train_speed import SHAPES as TRAINED
from train_speed import Ours

import mmtx
from mmtx.batching import BATCH
from mmtx.config import DecoderConfig
from mmtx.document import Document, MediaPart, Turn
from mmtx.inference.choose import choose_engine
from mmtx.inference.engine import Engine
from mmtx.inference.generation import generate
from mmtx.inference.row import RowEngine, prepack_weights
from mmtx.inference.screen import Screen
from mmtx.inference.weights import Weights
from mmtx.model import Decoder
from mmtx.model_folder import DEFAULT_MODEL
from mmtx.sequence import Prompt, prompt
from mmtx.training.memory import keep_memory
from mmtx.training.optimizer import OptimizerConfig, configure

KINDS = {  # of torch operations, by substrings of their names; the first match counts
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm"),
    "optimizer": ("adamw", "Optimizer"),
    "softmax of losses and attention": ("softmax", "logsumexp", "amax", "gather", "scatter", "_FusedLoss"),
    "copies and casts": ("copy_", "cat", "index", "embedding"),
    "making and clearing memory": ("zero_", "fill_", "empty"),
}
REST = "element by element"
SPARE = 2 ** 29
LARGE = 2048  # side of the matrix product that measures the machine's rate


def seconds(run: Callable[[], object], times: int) -> float:
    """Median time of a call."""
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return median(found)


def training(shape: str, times: int) -> dict:
    """Time of a step, the shares of its parts, and the rates of matrix products."""
    keep_memory()
    sizes, batch, context = TRAINED[shape]
    torch.manual_seed(0)
    model = Ours(Decoder(DecoderConfig(**sizes, tied=False)), context)
    optimizer = configure(model, OptimizerConfig(), 10 ** 6)["optimizer"]
    ids = torch.randint(0, sizes["vocabulary_size"], (batch, context + 1))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    whole = seconds(step, times)
    torch.ones(SPARE)  # freed at once: records of the profiler would otherwise take memory that the step reuses
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        step()
    spent, flops = dict.fromkeys([*KINDS, REST], 0.0), 0
    for event in profile.key_averages():
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), REST)
        spent[kind] += event.self_cpu_time_total
        flops += event.flops if kind == "matrix products" else 0
    total = sum(spent.values())
    square = torch.randn(LARGE, LARGE, dtype=torch.bfloat16)
    large = 2 * LARGE ** 3 / seconds(lambda: square @ square, 2 * times)
    products = spent["matrix products"] / total
    return {
        "shares": {kind: round(part / total, 3) for kind, part in spent.items()},
        "ms of a step": round(1000 * whole, 1),
        "GFLOP/s of the products": round(flops / (products * whole) / 1e9, 1),
        "GFLOP/s of one large product": round(large / 1e9, 1),
        "share of that rate, whole step": round(flops / whole / large, 3),
    }


@torch.inference_mode()
def decoding(shape: str, times: int) -> dict:
    """A decoding step at batch 1, and its parts."""
    decoder = random_decoder(DECODERS[shape], "cpu", torch.float32)
    prepack_weights(decoder)
    weights, new = Weights.of(decoder, fixed=True), 64
    asked, ids = [Prompt(np.arange(PROMPT))], torch.tensor([0])
    screen = Screen.of(weights.output)
    hidden = np.random.default_rng(0).standard_normal(decoder.config.width, np.float32)
    free = np.zeros(len(weights.output), np.float32)

    def row() -> RowEngine:
        engine = RowEngine(decoder, weights)
        engine.prefill(asked)
        return engine

    def steps() -> None:
        going = row()
        for _ in range(new):
            going.step(ids)
            screen.candidates(hidden, free)

    layers = row().layers[False]  # those of one thread

    def reading() -> None:
        for layer in layers:
            layer.qkv(), layer.out(), layer.swiglu(), layer.down()
        screen.scores(hidden)

    # All parts in turn, as in use: a single part repeated would find its weights in the cache.
    whole = (seconds(steps, times) - seconds(row, times)) / new
    read, screened = seconds(reading, 8 * times), screen.packed.numel()
    size = 4 * sum(each.numel() for layer in weights.layers for each in (layer.qkv, layer.out, layer.gate_up, layer.down))
    large = np.ones((2 ** 15, 2 ** 12), np.float32)
    rate = large.nbytes / seconds(lambda: large @ large[0], times)
    return {"ms of a step": round(1000 * whole, 3), "ms of reading weights": round(1000 * read, 3),
            "MB of the layers": round(size / 1e6, 1), "MB of the screen": round(screened / 1e6, 1),
            "GB/s of reading weights": round((size + screened) / read / 1e9, 1),
            "GB/s of one large matrix": round(rate / 1e9, 1)}


@torch.inference_mode()
def captions(name: str, times: int, files: int = 2 * BATCH) -> dict:
    """Milliseconds per file of each stage, one at a time and in batches."""
    model = mmtx.load(name)
    found: dict = {}
    for kind, source in SOURCES.items():
        with tarfile.open(source[0]) as tar:
            media = [tar.extractfile(member).read() for member in tar if member.isfile() and not member.name.endswith("json")]
        mark, make, tokenizer = ((mmtx.Image, partial(MediaPart, "image"), "image") if kind == "pictures"
                                 else (mmtx.Audio, partial(MediaPart, "audio"), "audio"))
        media = [mark(data) for data in media[:files]]
        tensors = [model.read_medium(item).data for item in media]
        embed = partial(model.tokenizers[tokenizer].embed_batch, patches=tokenizer in model.decoder.encoders)
        asked = [prompt(Document((Turn("user", (make(*encoding),)),)), model.vocabulary) for encoding in embed(tensors)]
        weights = model._weights

        def each(run: Callable[[list], object], items: list, size: int) -> float:
            batches = [items[first:first + size] for first in range(0, len(items), size)]
            return 1000 * seconds(lambda: [run(batch) for batch in batches], times) / len(items)

        def feed(batch: list) -> Engine:
            engine = choose_engine(model.decoder, weights, len(batch))
            engine.prefill(batch)
            return engine

        found[kind] = {}
        for way, size in (("one at a time", 1), ("in batches", BATCH)):
            stages = {
                "read": each(lambda batch: [model.read_medium(item).data for item in batch], media, size),
                "encode": each(embed, tensors, size),
                "feed the prompt": each(feed, asked, size),
            }
            whole = each(lambda batch: generate(model.decoder, model.grammar, batch, weights=weights), asked, size)
            stages["write"] = whole - stages["feed the prompt"]
            found[kind][way] = {stage: round(value, 2) for stage, value in {**stages, "all": sum(stages.values())}.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("of", choices=["training", "decoding", "captions"])
    parser.add_argument("--shape", help=f"training: {', '.join(TRAINED)}; decoding: {', '.join(DECODERS)}")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = 1 if options.short else options.times
    if options.of == "captions":
        name, found = "captions", captions(options.model, times, 4 if options.short else 2 * BATCH)
    else:
        shape = "short" if options.short else options.shape
        name, found = f"{options.of}-{shape}", {"training": training, "decoding": decoding}[options.of](shape, times)
    print(json.dumps(found, indent=1))
    if not options.short:
        result = {"name": f"time_shares-{name}", "date": date.today().isoformat(), **found, "machine": machine(),
                  "versions": versions()}
        (RESULTS / f"time_shares-{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
