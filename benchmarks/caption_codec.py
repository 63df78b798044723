"""Are codes more informative if the codec also learns captions? Effects on reconstruction, naming and drawing.

    python benchmarks/caption_codec.py --minutes 4 --decoder_minutes 2 --out caption_codec.json

Trains the shipped image tokenizer further on its pictures, for --minutes on one core with each weight of an auxiliary loss: the
cross-entropy of the picture's name, among all names, which a small Transformer predicts from the quantized latents (B, h, w, d).
Its gradient reaches the encoder through the quantizer. Weight 0 is reconstruction alone, as in the tokenizer's own training. Then,
with each of the tokenizers and on the names of the quickstart, decoders as in benchmarks/specialists.py learn to name pictures from
codes alone and from features, and one as in benchmarks/one_model.py learns to draw.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from image_quality import HELD_OUT, SHORT, TRAINING, quality, read
from one_model import score, tasks_of
from one_model import train as train_decoder
from specialists import figures, options_of, ours
from torch import Tensor, nn

from mmtx.data.augment import ImageAugmentation
from mmtx.data.collection import DataSource, read_source
from mmtx.data.tokens import Augmentation
from mmtx.modality.base import load_tokenizer
from mmtx.modality.encoder import PatchEncoder
from mmtx.modality.image import ImageTokenizer, to_float
from mmtx.shipped_files import find_shipped
from mmtx.training.optimizer import OptimizerConfig, configure

WEIGHTS = (0.0, 0.002, 0.01)
BATCH = 32
RATES = OptimizerConfig(2e-3, 4e-3, warmup_steps=50)  # a third of those of configs/starter/image.yaml


class NameReader(nn.Module):
    """Latents of images (B, h, w, d) -> logits of names (B, names)."""

    def __init__(self, levels: int, names: int, width: int = 128):
        super().__init__()
        self.encoder = PatchEncoder(levels, width, 2, 2)
        self.out = nn.Linear(width, names)

    def forward(self, latents: Tensor) -> Tensor:
        return self.out(self.encoder.features(latents).mean((1, 2)))


def further(weight: float, pictures: list[Tensor], labels: Tensor, minutes: float) -> tuple[ImageTokenizer, int]:
    """The tokenizer after further training, and the number of steps."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(find_shipped("tokenizers/image")).train()
    reader, augment = NameReader(len(tokenizer.levels), int(labels.max()) + 1), ImageAugmentation()
    optimizer = configure(nn.ModuleList([tokenizer, reader]), RATES, max_steps=1)["optimizer"]
    generator, start, step = torch.Generator().manual_seed(0), time.process_time(), 0
    while (passed := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1, (step + 1) / RATES.warmup_steps) * (1 - passed)
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        media = [augment(pictures[i], generator) for i in chosen.tolist()]
        grid = tokenizer._to_grid(to_float(torch.stack(media)))
        latents = tokenizer.network.encode(grid)
        error = tokenizer.network.decode(latents) - grid
        loss = error.square().mean() + 0.2 * error.abs().mean()
        if weight:
            loss = loss + weight * F.cross_entropy(reader(latents), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*tokenizer.parameters(), *reader.parameters()], 1.0)
        optimizer.step()
        step += 1
    return tokenizer.eval(), step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart/decoder.yaml")
    parser.add_argument("--minutes", type=float, default=4.0, help="of a core for each tokenizer")
    parser.add_argument("--decoder_minutes", type=float, default=2.0, help="of a core for each decoder")
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0, help="of the decoders")
    parser.add_argument("--short", action="store_true", help="see that all run, on a few samples")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    few, limit = (8, SHORT) if options.short else (None, None)
    minutes, decoder_minutes = (0.02, 0.02) if options.short else (options.minutes, options.decoder_minutes)
    text, image = (load_tokenizer(find_shipped(f"tokenizers/{kind}")) for kind in ("text", "image"))
    names = [s.caption for s in read_source(DataSource([str(find_shipped("demos/data/starter") / Path(TRAINING).name)], limit=limit))]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    labels = torch.tensor([numbers[name] for name in names])
    pictures, held_out = read(TRAINING, image, limit), read(HELD_OUT["unseen style"], image, limit)
    augmentation = Augmentation(ImageAugmentation(**options_of(options.config)[1]["image_augmentation"]))
    tasks, results = tasks_of(options.config, few), {}
    naming = tasks["name pictures"]
    for weight in options.weights:
        tokenizer, steps = further(weight, pictures, labels, minutes)
        found = {**quality(tokenizer, held_out)[0], "steps": steps}
        tokenizers = {"text": text, "image": tokenizer}
        for way in ("codes", "features"):
            torch.manual_seed(options.seed)
            said, _, _ = ours(options.config, naming.train, naming.repeats, tokenizers, augmentation, naming.tests,
                              decoder_minutes, way)
            found[f"exact name, {way}"] = figures("pictures", said, [s.caption for s in naming.tests])["exact name"]
        torch.manual_seed(options.seed)
        drawer, _ = train_decoder(options.config, ["draw"], tasks, tokenizers, augmentation, decoder_minutes)
        found |= score("draw", drawer, tasks["draw"].tests)
        results[weight] = found
        print(f"weight {weight:g}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"minutes": minutes, "decoder_minutes": decoder_minutes, "seed": options.seed,
                                           "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
