"""Why attention? What decoders recall from thousands of tokens ago, at equal training cost.

    python benchmarks/recurrent.py --minutes 0.5 --plot docs/results/recurrent.png
    python benchmarks/recurrent.py --minutes 10 --shown 6
    python benchmarks/recurrent.py --steps 1000 --jobs 6           # equal steps as well, side by side on a GPU
    python benchmarks/recurrent.py --short

A row shows a real picture (four codes from its middle) with the name of another one, which only the row reveals; then 0 to 4,000
tokens of codes of other pictures and notes; then the picture again, whose name (its first piece) is to be recalled. With `--shown`
there are several pictures, asked for in another order, so that names must be matched to pictures as well. The decoder of mmtx is
trained with its attention, and with two layers in its place: torch's LSTM, and the gated delta rule of transformers' Qwen3-Next, a
linear attention, which on a GPU runs the Triton kernels of flash-linear-attention if that is installed. Embedding, feed-forward
layers, norms, loss and optimizer are the same, and so are the minutes on one core or a GPU; with `--steps` they are also compared
after equal numbers of steps. Training uses the test's distances, in every other batch the shortest, but other pictures and names.
Also reported: tokens per second in training and, if one layer runs at a time on a CPU, time and memory of a decoding step. Shards are
those of benchmarks/scaling_grid.py. Writes results/recurrent.json.
"""

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from measure import RESULTS, machine, versions
from scaling_grid import prepare
from side_by_side import Task, side_by_side, slots
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from mmtx.config import CodeRange, DecoderConfig
from mmtx.data.collection import DataSource
from mmtx.data.corpus import read_corpus
from mmtx.modality.base import load_tokenizer
from mmtx.model import Decoder, rotary_embedding
from mmtx.training.optimizer import OptimizerConfig, configure
from mmtx.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
DISTANCES = (0, 64, 250, 1000, 2000, 4000)
NAME = 1                       # pieces of a name that are shown and asked for
KEY = slice(26, 30)            # codes shown of an image of 8 x 8, from its middle, where no two images are equal
ITEM = 1 + 4 + NAME            # <image>, codes, name
TOKENS = 1024                  # per batch, or one row if it is longer
WIDTH, DEPTH, HEADS = 64, 2, 4
ASKED = 64                     # rows per distance
RATES = OptimizerConfig(5e-3, 2e-2, warmup_steps=30)


class LSTM(nn.Module):
    """torch's LSTM in place of the attention of a block."""

    def __init__(self, layer: int):
        super().__init__()
        self.lstm, self.out = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, angles=None, packing=None, state=None) -> Tensor:
        y, self.state = self.lstm(x, state)
        return self.out(y)


class DeltaRule(qwen3_next.Qwen3NextGatedDeltaNet):
    """The linear attention of Qwen3-Next in place of the attention of a block."""

    config = Qwen3NextConfig(hidden_size=WIDTH, num_hidden_layers=DEPTH, layer_types=["linear_attention"] * DEPTH,
                             linear_num_key_heads=HEADS, linear_num_value_heads=HEADS, linear_key_head_dim=WIDTH // HEADS,
                             linear_value_head_dim=WIDTH // HEADS)

    def __init__(self, layer: int):
        super().__init__(self.config, layer)

    def forward(self, x: Tensor, angles=None, packing=None, state=None) -> Tensor:  # type: ignore[override]
        return super().forward(x, cache_params=state)


def use_reference() -> None:
    """Let the delta rule run in torch, whatever kernels are installed."""
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        function = getattr(qwen3_next, name)
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        setattr(qwen3_next, name, function)


LAYERS: dict[str, Callable[[int], nn.Module] | None] = {"attention": None, "LSTM": LSTM, "gated delta rule": DeltaRule}


def build(name: str, vocabulary: Vocabulary) -> Decoder:
    torch.manual_seed(0)
    composed = tuple(CodeRange(vocabulary.range(k).start, levels) for k in vocabulary.kinds if (levels := vocabulary.levels(k)))
    decoder = Decoder(DecoderConfig(vocabulary.size, WIDTH, DEPTH, HEADS, HEADS, WIDTH // HEADS, 3 * WIDTH, composed=composed))
    if (layer := LAYERS[name]) is not None:
        for k, block in enumerate(decoder.blocks):
            block.attention = layer(k)
    return decoder


class Rows:
    """Rows of ids, drawn from prepared images and notes."""

    def __init__(self, folder: Path, names: tuple[str, str], vocabulary: Vocabulary, tokenizers: dict, shown: int):
        self.v, self.shown = vocabulary, shown
        pictures, notes = (self._ids(folder / name, tokenizers) for name in names)
        image, text = vocabulary.range("image"), vocabulary.range("text")
        self.keys, self.names = [], []
        for ids in pictures:
            codes, pieces = ids[(ids >= image.start) & (ids < image.stop)], ids[(ids >= text.start) & (ids < text.stop)]
            if len(codes) == 64 and len(pieces) >= NAME:
                self.keys.append(codes[KEY])
                self.names.append(pieces[:NAME])
        self.between = np.concatenate([*pictures, *notes])
        self.between = self.between[self.between >= vocabulary.range("special").stop]  # only codes

    def _ids(self, folder: Path, tokenizers: dict) -> list[np.ndarray]:
        corpus = read_corpus([DataSource([str(folder)])], tokenizers, self.v, max_seq_len=1024)
        return [rendered.ids for rendered in corpus.render([(k, 0) for k in range(len(corpus))])]

    def draw(self, random: np.random.Generator, distance: int, rows: int) -> tuple[Tensor, Tensor]:
        """Ids (rows, T), and positions (rows, shown * NAME) of the pieces to predict."""
        v, made, places = self.v, [], []
        for _ in range(rows):
            keys = [self.keys[k] for k in random.choice(len(self.keys), self.shown, replace=False)]
            names = [self.names[k] for k in random.choice(len(self.names), self.shown, replace=False)]
            items = [np.array([v.image, *key, *name]) for key, name in zip(keys, names, strict=True)]
            start = int(random.integers(len(self.between) - distance))
            order = random.permutation(self.shown)
            made.append(np.concatenate([*items, self.between[start:start + distance], *(items[k] for k in order)]))
            first = self.shown * ITEM + distance
            places.append([first + (k + 1) * ITEM - NAME + piece for k in range(self.shown) for piece in range(NAME)])
        return torch.from_numpy(np.stack(made)).long(), torch.tensor(places)


def scores(decoder: Decoder, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (places, plain ids) at the positions, and the ids there."""
    device = decoder.norm.weight.device
    ids, places = ids.to(device), places.to(device)
    positions = torch.arange(ids.shape[1] - 1, device=device).expand(len(ids), -1)
    hidden = decoder(ids[:, :-1], positions)
    rows = torch.arange(len(ids), device=device)[:, None]
    return decoder.logits(hidden[rows, places - 1], decoder.output_matrix(plain=True)).flatten(0, 1), ids[rows, places].flatten()


class Budget(NamedTuple):
    """Training budget: seconds, of processor time on a CPU and of wall time on a GPU; or steps."""

    seconds: float | None
    steps: int | None = None


def train(decoder: Decoder, rows: Rows, budget: Budget, distances: tuple[int, ...], batch: int) -> tuple[int, int, float, float]:
    """Train for a budget, with `batch` tokens per batch -> steps, tokens, the loss of the last steps and seconds."""
    optimizer = configure(decoder, RATES, 10**9)["optimizer"]
    random, tokens, step, last = np.random.default_rng(0), 0, 0, []
    clock = time.process_time if decoder.norm.weight.device.type == "cpu" else time.perf_counter
    begin = clock()
    while (passed := step / budget.steps if budget.steps else (clock() - begin) / budget.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1, (step + 1) / RATES.warmup_steps, 2.5 * (1 - passed))
        distance = int(random.choice(distances)) if step % 2 else distances[0]  # half of the steps use short rows, which teach faster
        ids, places = rows.draw(random, distance, max(1, batch // (2 * rows.shown * ITEM + distance)))
        loss = F.cross_entropy(*scores(decoder, ids, places))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step, tokens, last = step + 1, tokens + ids.numel(), [*last[-19:], loss.item()]
    return step, tokens, float(np.mean(last)), clock() - begin


@torch.inference_mode()
def accuracy(decoder: Decoder, rows: Rows, distance: int, count: int) -> float:
    """Share of names with all pieces predicted correctly."""
    random, right = np.random.default_rng(1), []
    for _ in range(0, count, 4):
        found, wanted = scores(decoder, *rows.draw(random, distance, 4))
        right.append((found.argmax(-1) == wanted).view(-1, NAME).all(1))
    return float(torch.cat(right).float().mean())


@torch.inference_mode()
def decoding(decoder: Decoder, name: str, length: int, repeats: int) -> tuple[float, int]:
    """Milliseconds per step of one row after `length` tokens, all layers without the logits, and bytes of state."""
    states: list = []
    cache = DynamicCache(config=DeltaRule.config) if name == "gated delta rule" else None
    x = torch.randn(1, max(1, length), WIDTH)
    for block in decoder.blocks:
        if name == "attention":
            states.append([torch.randn(1, HEADS, length + 1, WIDTH // HEADS) for _ in range(2)])
        elif name == "LSTM":
            block.attention(x)
            states.append(block.attention.state)
        else:
            block.attention(x, state=cache)
            states.append(None)
    position = rotary_embedding(torch.tensor([[length]]), WIDTH // HEADS, decoder.config.rope_theta)

    def step() -> float:
        begin, y = time.perf_counter(), torch.randn(1, 1, WIDTH)
        for block, state in zip(decoder.blocks, states, strict=True):
            normed = block.attention_norm(y)
            if name == "attention":
                query, key, value = (part.transpose(1, 2) for part in block.attention.heads(normed, position))
                state[0][:, :, -1:], state[1][:, :, -1:] = key, value
                found = F.scaled_dot_product_attention(query, *state)
                y = y + block.attention.out(found.transpose(1, 2).flatten(2))
            else:
                y = y + block.attention(normed, state=cache if name == "gated delta rule" else state)
            y = y + block.feed_forward(block.feed_forward_norm(y))
        decoder.norm(y)
        return 1000 * (time.perf_counter() - begin)

    taken = median(step() for _ in range(repeats))
    if name != "gated delta rule":
        kept = sum(part.nbytes for state in states for part in state)
    else:
        kept = sum(state.nbytes for layer in range(DEPTH) for state in
                   (cache.get_conv_state(layer, state_idx=0), cache.get_recurrent_state(layer, state_idx=0)))
    return taken, kept


@lru_cache(1)
def opened(folder: Path, shown: int, short: bool) -> tuple[Rows, Rows, Vocabulary]:
    """Training rows, held-out rows and their vocabulary."""
    tokenizers = {kind: load_tokenizer(ROOT / "tokenizers" / kind) for kind in ("text", "image", "audio")}
    vocabulary = Vocabulary.build(tokenizers)
    held_out = Rows(folder, ("held-out-pictures", "held-out-notes"), vocabulary, tokenizers, shown)
    return held_out if short else Rows(folder, ("pictures", "notes"), vocabulary, tokenizers, shown), held_out, vocabulary


def measure(device: str, folder: Path, name: str, shown: int, distances: tuple[int, ...], budget: Budget, batch: int, alone: bool,
            short: bool) -> dict:
    """Train and evaluate one layer; the cost of a decoding step is measured only if it runs alone on the CPU."""
    rows, held_out, vocabulary = opened(folder, shown, short)
    kernels = None
    if name == "gated delta rule":
        kernels = "flash-linear-attention" if device == "cuda" and find_spec("fla") else "reference"
        if kernels == "reference":
            use_reference()
    try:  # compile kernels before the clock starts
        train(build(name, vocabulary).to(device), rows, Budget(None, 4 if device == "cuda" else 1), distances, batch)
    except Exception:  # compilers raise many kinds of errors
        if kernels != "flash-linear-attention":
            raise
        kernels = "reference, since flash-linear-attention failed: " + traceback.format_exc(limit=-2)
        use_reference()
    decoder = build(name, vocabulary).to(device)
    steps, tokens, loss, seconds = train(decoder, rows, budget, distances, batch)
    found = {"parameters": sum(p.numel() for p in decoder.parameters()), "steps": steps, "seconds": round(seconds, 1),
             "loss": round(loss, 4), "tokens_a_second": round(tokens / seconds), "device": device,
             "accuracy": {d: round(accuracy(decoder, held_out, d, 4 if short else ASKED), 3) for d in distances}}
    if kernels:
        found["kernels"] = kernels
    if alone and device == "cpu":
        steps_of = {d: decoding(decoder, name, d, 3 if short else 50) for d in distances}
        found |= {"step_milliseconds": {d: round(taken, 3) for d, (taken, _) in steps_of.items()},
                  "kept_bytes": {d: kept for d, (_, kept) in steps_of.items()}}
    return found


def plot(result: dict, file: Path) -> None:
    from matplotlib.figure import Figure

    for part in ("found", "equal_steps"):
        result[part] = {name: result[part][name] for name in LAYERS if name in result[part]}
    panels = [("found", what, label) for what, label in (
        ("accuracy", "names right"), ("step_milliseconds", "ms a step of decoding"), ("kept_bytes", "bytes kept of a row"))
        if all(what in found for found in result["found"].values())]
    if result["equal_steps"]:
        panels.insert(1, ("equal_steps", "accuracy", "names right, equal steps"))
    figure = Figure(figsize=(3.7 * len(panels), 3.6), layout="constrained")
    for axes, (part, what, label) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for name, found in result[part].items():
            axes.plot([float(d) + 16 for d in found[what]], list(found[what].values()), "o-", markersize=4, label=name)
        axes.set(xscale="log", xlabel=f"tokens {'between' if what == 'accuracy' else 'before'} (+ 16)", ylabel=label)
        if what == "accuracy":
            axes.set_ylim(0, 1.03)
        if what == "kept_bytes":
            axes.set_yscale("log")
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/scaling/data"), help="shards, which are made where they lack")
    parser.add_argument("--minutes", type=float, default=3.0, help="of a core or GPU, for each layer")
    parser.add_argument("--steps", type=int, default=None, help="train each layer for so many steps, too")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a batch, or one row where it is longer")
    parser.add_argument("--shown", type=int, default=1, help="pictures of a row")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--distances", type=int, nargs="+", default=DISTANCES)
    parser.add_argument("--jobs", type=int, default=1, help="processes, on the GPU if there is one")
    parser.add_argument("--seconds", type=float, default=1e6, help="layers that are not finished by then are left out")
    parser.add_argument("--results", type=Path, default=RESULTS / "recurrent.json", help="file of the figures")
    parser.add_argument("--plot", type=Path, help="where a plot goes")
    parser.add_argument("--short", action="store_true", help="a second each and short distances, which say nothing; writes no result")
    options = parser.parse_args()
    distances = (0, 64) if options.short else tuple(options.distances)
    minutes = 1 / 60 if options.short else options.minutes
    prepare(options.data)
    budgets = {"found": Budget(60 * minutes), **({"equal_steps": Budget(None, options.steps)} if options.steps else {})}
    tasks = [Task(f"{part}: {name}", (options.data, name, options.shown, distances, budget, options.tokens, options.jobs == 1,
                                      options.short), 60 * minutes)
             for part, budget in budgets.items() for name in options.layers]
    result: dict = {"name": "recurrent", "date": date.today().isoformat(), "minutes": minutes, "shown": options.shown,
                    "tokens": options.tokens, "found": {}, "equal_steps": {}}
    with tempfile.TemporaryDirectory() as logs:
        for done in side_by_side(measure, tasks, slots(options.jobs, 0), options.seconds, Path(logs)):
            part, name = done.name.split(": ")
            found = result[part][name] = done.found
            kernels = f", {found['kernels']}" if "kernels" in found else ""
            print(f"{name}: {found['parameters']:,} parameters, {found['steps']} steps in {found['seconds']:.0f} s, "
                  f"{found['tokens_a_second']:,} tokens/s, loss {found['loss']:.3f}{kernels}")
            for d in distances:
                cost = (f", {found['step_milliseconds'][d]:.3f} ms a step, {found['kept_bytes'][d]:,} bytes kept"
                        if "step_milliseconds" in found else "")
                print(f"  {d:5} tokens between: {found['accuracy'][d]:.3f} right{cost}", flush=True)
            if not options.short:
                options.results.write_text(json.dumps({**result, "machine": machine(), "versions": versions()}, indent=1) + "\n",
                                           encoding="utf-8")
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
