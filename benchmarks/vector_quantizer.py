"""Is finite scalar quantization better than a classic vector quantizer at equal bits and equal time?

    python benchmarks/vector_quantizer.py --minutes 3

Trains the starter's image codec (configs/starter/image.yaml) with its own quantizer, and the same network with the
vector quantizer of vector-quantize-pytorch (extra `bench`), with the same number of codes. "vq" is a codebook of the
network's width with moving averages; "vq tuned" adds what keeps such a codebook in use: 8 dimensions per code, cosine
similarity, k-means initialisation, replacement of dead codes. Same batches, optimizer and schedule. Steps of all are
interleaved in one process on one thread; the next step is of the quantizer that has used the least CPU time.
"""

import argparse
import os
import time
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from image_quality import HELD_OUT, SHORT, TRAINING, read
from measure import require
from torch import Tensor, nn

from mmtx.data.augment import ImageAugmentation
from mmtx.data.tokens import seed_of
from mmtx.modality.autoencoder import NetworkConfig, PatchAutoencoder
from mmtx.modality.image import ImageConfig, ImageTokenizer, to_float
from mmtx.shipped_files import find_shipped
from mmtx.training.codec import picture_quality
from mmtx.training.fit_cli import TRAINER
from mmtx.training.optimizer import OptimizerConfig, configure

CONFIG = "configs/starter/image.yaml"
ALIVE = dict(use_cosine_sim=True, kmeans_init=True, threshold_ema_dead_code=2)


class Coder(nn.Module):
    """The network with a quantizer: grids of patches (B, h, w, P) -> reconstruction, codes and the quantizer's own loss."""

    def __init__(self, tokenizer: ImageTokenizer, dim: int | None = None, **options):
        """`dim` is the width of a vector quantizer's codes; by default the quantizer of the tokenizer is used."""
        super().__init__()
        self.network: PatchAutoencoder = tokenizer.network
        self.vector = None
        if dim is not None:
            from vector_quantize_pytorch import VectorQuantize

            width = self.network.to_latent.in_features
            self.vector = VectorQuantize(dim, tokenizer.size, decay=0.99, commitment_weight=0.25, **options)
            self.network.to_latent, self.network.from_latent = nn.Linear(width, dim), nn.Linear(dim, width)

    def forward(self, grid: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        network = self.network
        if self.vector is None:
            latents = network.encode(grid)
            return network.decode(latents), network.quantizer.to_codes(latents), 0.0
        latents = network.to_latent(network.features(grid))
        quantized, codes, loss = self.vector(latents.flatten(1, 2))
        return network.decode(quantized.view_as(latents)), codes, loss


class Run:
    """One variant and the processor time that it has used, in seconds."""

    def __init__(self, make, config: dict, values: ImageConfig):
        torch.manual_seed(config["seed_everything"])
        self.tokenizer = ImageTokenizer(values)
        self.coder = make(self.tokenizer).train()
        options = config["model"]["init_args"]["optimizer"]
        self.warmup = options["warmup_steps"]
        self.optimizer = configure(self.coder, OptimizerConfig(**options), max_steps=1)["optimizer"]
        self.clip, self.seconds, self.steps = TRAINER["gradient_clip_val"], 0.0, 0

    def step(self, grid: Tensor, budget: float) -> None:
        """One training step. The schedule follows time, since the variants make different numbers of steps."""
        start = time.process_time()
        factor = min((self.steps + 1) / self.warmup, max(0.0, 1 - self.seconds / budget))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        output, _, loss = self.coder(grid)
        error = output - grid
        self.optimizer.zero_grad()
        (error.square().mean() + 0.2 * error.abs().mean() + loss).backward()
        nn.utils.clip_grad_norm_(self.coder.parameters(), self.clip)
        self.optimizer.step()
        self.steps += 1
        self.seconds += time.process_time() - start

    @torch.no_grad()
    def figures(self, pictures: list[Tensor]) -> tuple[float, float]:
        """PSNR in dB and share of the codebook in use, on held-out images."""
        self.coder.eval()
        psnr, used = [], set()
        for first in range(0, len(pictures), 64):
            media = to_float(torch.stack(pictures[first:first + 64]))
            output, codes, _ = self.coder(self.tokenizer._to_grid(media))
            psnr.append(float(picture_quality(media, self.tokenizer._to_pixels(output))["psnr_db"]) * len(media))
            used |= set(codes.flatten().tolist())
        return sum(psnr) / len(pictures), len(used) / self.tokenizer.size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="processor time of each way")
    parser.add_argument("--short", action="store_true", help=f"{SHORT} pictures of each set")
    options = parser.parse_args()
    require("vector_quantize_pytorch", "'mmtx[bench]'")
    torch.set_num_threads(1)
    config = yaml.safe_load(find_shipped(CONFIG).read_text(encoding="utf-8"))
    values = dict(config["model"]["init_args"]["tokenizer"])
    values = ImageConfig(**{**values, "network": NetworkConfig(**values["network"])})
    runs = {"fsq": Run(Coder, config, values),
            "vq": Run(partial(Coder, dim=values.network.width), config, values),
            "vq tuned": Run(partial(Coder, dim=8, **ALIVE), config, values)}
    tokenizer, limit = runs["fsq"].tokenizer, SHORT if options.short else None
    training = read(TRAINING, tokenizer, limit)
    held_out = read(HELD_OUT["unseen style"], tokenizer, limit)
    augment, budget = ImageAugmentation(), 60 * options.minutes
    while (run := min(runs.values(), key=lambda run: run.seconds)).seconds < budget:
        generator = torch.Generator().manual_seed(seed_of(0, run.steps))
        chosen = torch.randint(len(training), (config["data"]["init_args"]["batch_size"],), generator=generator).tolist()
        batch = [augment(training[i], generator) if torch.rand((), generator=generator) < 0.5 else training[i]
                 for i in chosen]
        run.step(tokenizer._to_grid(to_float(torch.stack(batch))), budget)
    print(f"{options.minutes:g} minutes of one thread each, {tokenizer.size} codes, {len(held_out)} pictures of the "
          f"unseen style, torch {torch.__version__}")
    print(f"{'way':10} {'PSNR dB':>8} {'codes used':>11} {'steps':>6}")
    for name, run in runs.items():
        psnr, used = run.figures(held_out)
        print(f"{name:10} {psnr:8.2f} {used:11.3f} {run.steps:6}", flush=True)


if __name__ == "__main__":
    main()
