"""Causal attention over one stream, or bidirectional attention within media? Captions by three decoders of the same size.

    python benchmarks/attention_variants.py --jobs 6

- causal: the decoder of mmtx as it is. Each code of a picture or sound attends to those before it.
- prefix: the same parameters, but the codes of a medium attend to each other in both directions; text stays causal.
- encoder-decoder: half of the blocks encode the medium bidirectionally, and the other half generates the text, with cross-attention
  to the encoder's output. Its feed-forward layers are narrower by the size of cross-attention, so that parameter counts are equal.

Embedding, loss, optimizer, steps, documents and their order are the same, on pictures and notes as codes of the shards of
benchmarks/scaling_grid.py; held out are other files of the same styles and soundfonts. A caption is right if each of its pieces,
and its end, has the highest logit: then greedy decoding generates it. Writes results/attention_variants.json.
"""

import argparse
import json
import tempfile
import time
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from measure import RESULTS, machine, versions
from scaling_grid import BASE, prepare
from side_by_side import Task, side_by_side, slots
from torch import Tensor, nn

from mmtx.config import CodeRange, DecoderConfig
from mmtx.data.collection import DataSource
from mmtx.data.corpus import read_corpus
from mmtx.loss import next_token_loss
from mmtx.modality.base import load_tokenizer
from mmtx.model import Block, BlockConfig, Decoder, RMSNorm, initialise, rotary_embedding
from mmtx.training.optimizer import OptimizerConfig, configure
from mmtx.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
WIDTH, DEPTH, HEADS, MLP_DIM = 128, 4, 8, 384
BATCH = 96
CHECKS = 4  # evaluations on held-out captions per run
RATES = OptimizerConfig(4e-3, 1.5e-2, warmup_steps=50)


class Batch(NamedTuple):
    """Documents of a medium and its caption, padded on the right."""

    ids: Tensor         # (B, T)
    begins: Tensor      # (B,) start of the caption; everything before it is given
    trained: Tensor     # (B, T) whether an id belongs to the caption or its end
    medium: Tensor      # (B, T) whether an id belongs to the medium

    def to(self, device: str) -> "Batch":
        return Batch(*(part.to(device) for part in self))


class Captions:
    """Documents of prepared images and notes."""

    def __init__(self, folder: Path, held_out: bool, limit: int | None = None):
        data = yaml.safe_load(BASE.read_text())["data"]["init_args"]
        tokenizers = {kind: load_tokenizer(ROOT / path) for kind, path in data["tokenizers"].items()}
        self.v = v = Vocabulary.build(tokenizers)
        self.documents: list[tuple[np.ndarray, np.ndarray]] = []
        self.kinds: list[str] = []
        for kind in ("pictures", "notes"):
            source = DataSource([str(folder / (f"held-out-{kind}" if held_out else kind))], limit=limit)
            corpus = read_corpus([source], tokenizers, v, max_seq_len=data["max_seq_len"])
            self.documents += [rendered[:2] for rendered in corpus.render([(k, 0) for k in range(len(corpus))])]
            self.kinds += [kind] * len(corpus)

    def batch(self, chosen: np.ndarray) -> Batch:
        documents = [self.documents[k] for k in chosen]
        shape = len(documents), max(len(ids) for ids, _ in documents)
        ids, trained = np.full(shape, self.v.pad, np.int64), np.zeros(shape, bool)
        for row, (document, loss) in enumerate(documents):
            ids[row, :len(document)], trained[row, :len(document)] = document, loss
        coded = ids >= self.v.range("special").stop
        # From the first code to the last: there are no separators between the rows of an image.
        first, last = coded.argmax(1), shape[1] - 1 - coded[:, ::-1].argmax(1)
        place = np.arange(shape[1])
        medium = (place >= first[:, None]) & (place <= last[:, None])
        return Batch(*map(torch.from_numpy, (ids, trained.argmax(1), trained, medium)))

    def decoder_config(self) -> DecoderConfig:
        v = self.v
        composed = tuple(CodeRange(v.range(kind).start, levels) for kind in v.kinds if (levels := v.levels(kind)))
        return DecoderConfig(v.size, WIDTH, DEPTH, HEADS, HEADS, WIDTH // HEADS, MLP_DIM, rope_theta=100.0, composed=composed)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Queries (B, T, H, K), keys and values (B, S, H, K), mask (B, T, S) of what is visible -> (B, T, H * K)."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask[:, None]).transpose(1, 2).flatten(2)


def masked(block: Block, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """The attention half of a block with a mask."""
    return x + block.attention.out(attend(*block.attention.heads(block.attention_norm(x), angles), mask))


def causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class Causal(nn.Module):
    """The decoder of mmtx over the whole document."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.decoder = Decoder(config)

    def mask(self, batch: Batch) -> Tensor:
        """What each position attends to (B, T - 1, T - 1)."""
        length = batch.ids.shape[1] - 1
        return causal_mask(length, batch.ids.device).expand(len(batch.ids), -1, -1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the supervised ids (M, D), and these ids (M,)."""
        decoder, ids = self.decoder, batch.ids[:, :-1]
        x, mask = decoder.embed(ids), self.mask(batch)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        angles = rotary_embedding(positions, decoder.config.head_dim, decoder.config.rope_theta)
        for block in decoder.blocks:
            x = masked(block, x, angles, mask)
            x = x + block.feed_forward(block.feed_forward_norm(x))
        wanted = batch.trained[:, 1:]
        return decoder.norm(x)[wanted], batch.ids[:, 1:][wanted]


class Prefix(Causal):
    """The same, but the codes of a medium attend to each other in both directions."""

    def mask(self, batch: Batch) -> Tensor:
        medium = batch.medium[:, :-1]
        return super().mask(batch) | medium[:, :, None] & medium[:, None, :]


class CrossBlock(Block):
    """A block with cross-attention between its two halves, and a narrower feed-forward half."""

    def __init__(self, config: BlockConfig):
        super().__init__(config)
        self.cross_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.cross = type(self.attention)(config)


class EncoderDecoder(nn.Module):
    """Half of the blocks encode the given ids, the other half generate the caption."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.decoder = decoder = Decoder(config)  # embedding, norm and the encoder blocks
        half = config.depth // 2
        narrower = config.mlp_dim - 4 * config.width // 3  # cross-attention has 4 D^2 parameters, an MLP 3 D per hidden unit
        block = BlockConfig(config.width, config.heads, config.kv_heads, config.head_dim, narrower, causal=True)
        self.writers = nn.ModuleList(CrossBlock(block) for _ in range(half))
        decoder.blocks = decoder.blocks[:half]
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        initialise(self.writers, config.depth)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As in `Causal`."""
        decoder, config = self.decoder, self.decoder.config
        length = batch.ids.shape[1]
        place = torch.arange(length, device=batch.ids.device)

        def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
            return rotary_embedding(positions, config.head_dim, config.rope_theta)

        # 1. Encode the given ids except the last.
        given = int(batch.begins.max()) - 1
        seen = place[:given] < batch.begins[:, None] - 1                                    # (B, S)
        read, turned = decoder.embed(batch.ids[:, :given]), angles(place[:given].expand(len(seen), -1))
        mask = seen[:, None, :].expand(-1, given, -1)
        for block in decoder.blocks:
            read = masked(block, read, turned, mask)
            read = read + block.feed_forward(block.feed_forward_norm(read))
        read = decoder.norm(read)
        # 2. Decode from the last given id on.
        longest = int(batch.trained.sum(1).max())
        places = (batch.begins[:, None] - 1 + place[:longest]).clamp_max(length - 2)        # (B, T)
        ids, targets = batch.ids.gather(1, places), batch.ids.gather(1, places + 1)
        wanted = batch.trained.gather(1, places + 1) & (place[:longest] < batch.trained.sum(1)[:, None])
        x, turned_here, causal = decoder.embed(ids), angles(places), causal_mask(longest, ids.device).expand(len(ids), -1, -1)
        mask = seen[:, None, :].expand(-1, longest, -1)
        for block in self.writers:
            x = masked(block, x, turned_here, causal)
            query = block.cross.heads(block.cross_norm(x), turned_here).query
            _, key, value = block.cross.heads(read, turned)
            x = x + block.cross.out(attend(query, key, value, mask))
            x = x + block.feed_forward(block.feed_forward_norm(x))
        return self.norm(x)[wanted], targets[wanted]


VARIANTS: dict[str, type[nn.Module]] = {"causal": Causal, "prefix": Prefix, "encoder-decoder": EncoderDecoder}


@lru_cache(2)
def captions(folder: Path, held_out: bool, limit: int | None) -> Captions:
    return Captions(folder, held_out, limit)


def loss_of(model: nn.Module, batch: Batch):
    hidden, targets = model(batch)
    return next_token_loss(model.decoder.embedding, hidden, targets, len(targets), None, 1e-5), targets, hidden


@torch.inference_mode()
def check(model: nn.Module, data: Captions, device: str) -> dict[str, dict[str, float]]:
    """On held-out images and notes: nats per piece, and the share of captions that are right to the end."""
    found = {}
    for kind in sorted(set(data.kinds)):
        chosen = np.flatnonzero(np.array(data.kinds) == kind)
        losses, right = [], []
        for some in np.array_split(chosen, -(-len(chosen) // 128)):
            batch = data.batch(some).to(device)
            loss, targets, hidden = loss_of(model, batch)
            losses.append(loss.loss)
            best = model.decoder.logits(hidden, model.decoder.output_matrix(plain=True)).argmax(-1) == targets
            rows = torch.repeat_interleave(torch.arange(len(some), device=device), batch.trained.sum(1))
            wrong = torch.zeros(len(some), device=device).index_add_(0, rows, (~best).float())
            right.append(wrong == 0)
        found[kind] = {"loss": round(torch.cat(losses).mean().item(), 4), "right": round(torch.cat(right).float().mean().item(), 4)}
    return found


def train(device: str, folder: Path, variant: str, seed: int, steps: int, limit: int | None) -> dict:
    """Train one variant -> its size, speed and held-out metrics."""
    data, held_out = captions(folder, False, limit), captions(folder, True, limit)
    torch.manual_seed(seed)
    model = VARIANTS[variant](data.decoder_config()).to(device)
    made = configure(model, RATES, steps)
    random, order, tokens, curve, busy = np.random.default_rng(seed), np.zeros(0, int), 0, {}, 0.0
    for step in range(steps):
        begin = time.perf_counter()
        if len(order) < BATCH:
            order = random.permutation(len(data.documents))
        chosen, order = order[:BATCH], order[BATCH:]
        batch = data.batch(chosen).to(device)
        loss, targets, _ = loss_of(model, batch)
        made["optimizer"].zero_grad()
        (loss.total / len(targets)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
        tokens += sum(len(data.documents[k][0]) - 1 for k in chosen)
        if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
            if device == "cuda":
                torch.cuda.synchronize()
            busy += time.perf_counter() - begin
            curve[step + 1] = check(model, held_out, device)
        else:
            busy += time.perf_counter() - begin
    return {"parameters": sum(p.numel() for p in model.parameters()), "tokens": tokens, "tokens_a_second": round(tokens / busy),
            "epochs": round(steps * BATCH / len(data.documents), 2), "held_out": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/scaling/data"), help="shards, which are made where they lack")
    parser.add_argument("--steps", type=int, default=1200, help=f"of {BATCH} documents")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=1, help="processes, on the GPU if there is one")
    parser.add_argument("--seconds", type=float, default=1e6, help="runs that are not finished by then are left out")
    parser.add_argument("--results", type=Path, default=RESULTS / "attention_variants.json", help="file of the figures")
    parser.add_argument("--short", action="store_true", help="three steps of few documents, which say nothing; writes no result")
    options = parser.parse_args()
    steps, seeds, limit = (3, 1, 64) if options.short else (options.steps, options.seeds, None)
    prepare(options.data)
    tasks = [Task(f"{variant}, seed {seed}", (options.data, variant, seed, steps, limit), steps * 0.3, seed)
             for seed in range(seeds) for variant in options.variants]
    result: dict = {"name": "attention_variants", "date": date.today().isoformat(), "steps": steps, "documents": BATCH, "found": {},
                    "shape": {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "mlp_dim": MLP_DIM}}
    with tempfile.TemporaryDirectory() as logs:
        for done in side_by_side(train, tasks, slots(options.jobs, 0), options.seconds, Path(logs)):
            result["found"][done.name] = done.found | {"device": done.device, "seconds": round(done.seconds, 1)}
            last = list(done.found["held_out"].values())[-1]
            told = ", ".join(f"{kind} {value['loss']:.3f} nats, {value['right']:.3f} right" for kind, value in last.items())
            print(f"{done.name}: {done.found['parameters']:,} parameters, {done.found['tokens_a_second']:,} tokens/s beside others, "
                  f"{told}", flush=True)
            if not options.short:
                options.results.write_text(json.dumps(result | {"machine": machine(), "versions": versions()}, indent=1) + "\n",
                                           encoding="utf-8")


if __name__ == "__main__":
    main()
