"""How good is an image tokenizer? PSNR, SSIM and use of codes on the starter's pictures, at 32 to 512 pixels per side.

    python benchmarks/image_quality.py tokenizers/image --output image_quality.json
    python benchmarks/image_quality.py tokenizers/image --short

Sizes other than the tokenizer's own: `ImageTokenizer.at(None)`, on single pictures of the unseen style resized to that
size (the larger, the smoother), and on sheets of such pictures side by side at 64 pixels each, whose detail is all
real. Pictures larger than a chunk are coded in windows. The cost of that is measured as the error within two pixels of
window boundaries, compared with that at all other patch edges, on randomly shifted sheets, so that edges do not coincide
with those of pictures. One thread.
"""

import argparse
import json
import math
import os
import platform
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm import tqdm

from mmtx.data.collection import DataSource, read_source
from mmtx.data.sample import Media
from mmtx.data.tokens import load_media
from mmtx.errors import InputError
from mmtx.modality.base import load_tokenizer
from mmtx.modality.image import ImageTokenizer, resize, to_float
from mmtx.shipped_files import find_shipped
from mmtx.training.codec import CodebookUsage, picture_quality

STARTER = "demos/data/starter"
HELD_OUT = {"unseen style": f"{STARTER}/images-test-unseen-style.tar.gz",
            "unseen emoji": f"{STARTER}/images-test-unseen-emoji.tar.gz"}
TRAINING = f"{STARTER}/images-train-*.tar.gz"
SIZES = ((32, 32), (48, 80), (64, 64), (128, 128), (256, 256), (512, 512), (96, 40), (40, 512), (504, 72), (232, 360))
PICTURES = 32  # per size
CELL = 64      # side in pixels of an image on a sheet
NEAR = 2       # pixels on either side that count as the edge
SHORT = 48     # images per set with --short


def read(path: str, tokenizer: ImageTokenizer, limit: int | None) -> list[Tensor]:
    """Images, uint8 (3, H, W), as the tokenizer reads them."""
    folder, name = find_shipped(STARTER), Path(path).name
    samples = read_source(DataSource([str(folder / name)], limit=limit))
    return [load_media(part, {"image": tokenizer}) for sample in tqdm(samples, desc=name, leave=False)
            for turn in sample.turns for part in turn.parts if isinstance(part, Media)]


def quality(tokenizer: ImageTokenizer, pictures: list[Tensor]) -> tuple[dict[str, float], list[np.ndarray]]:
    """Mean PSNR and SSIM of reconstructed images, and their codes."""
    codes = tokenizer.encode_batch(pictures)
    figures = [{name: float(value) for name, value in
                picture_quality(to_float(picture)[None], to_float(tokenizer.decode(item))[None]).items()}
               for picture, item in zip(pictures, codes, strict=True)]
    return {name: float(np.mean([figure[name] for figure in figures])) for name in figures[0]}, codes


def sheet(pictures: list[Tensor], height: int, width: int, generator: Generator) -> Tensor:
    """Random images side by side, randomly shifted, cut to a size."""
    rows, columns = -(-height // CELL), -(-width // CELL)
    chosen = torch.randint(len(pictures), (rows, columns), generator=generator).tolist()
    cells = torch.cat([torch.cat([resize(pictures[i], CELL, CELL) for i in row], 2) for row in chosen], 1)
    shift = torch.randint(CELL, (2,), generator=generator).tolist()
    return cells.roll(shift, (1, 2))[:, :height, :width]


def edges(tokenizer: ImageTokenizer, pictures: list[Tensor], outputs: list[Tensor]) -> dict[str, float] | None:
    """PSNR near edges between windows and between other patches, and the mean error, in grey levels, of the step across them."""
    patch = tokenizer.config.patch
    errors, steps = {"window": [], "patch": []}, {"window": [], "patch": []}
    for picture, output in zip(pictures, outputs, strict=True):
        for axis in (1, 2):
            a, b = (x.transpose(1, axis).float() for x in (picture, output))
            starts = {window.kept[0].start for window in tokenizer.windows(a.shape[1] // patch, 1)}
            for number in range(1, a.shape[1] // patch):
                kind, at = "window" if number in starts else "patch", number * patch
                band = slice(at - NEAR, at + NEAR)
                errors[kind].append(float((a[:, band] - b[:, band]).square().mean()))
                steps[kind].append(float(((a[:, at] - a[:, at - 1]) - (b[:, at] - b[:, at - 1])).abs().mean()))
    if not errors["window"]:
        return None
    return {**{f"psnr_db_{kind}_edges": 10 * math.log10(255 ** 2 / np.mean(values)) for kind, values in errors.items()},
            **{f"step_error_{kind}_edges": float(np.mean(values)) for kind, values in steps.items()}}


def measure(tokenizer: ImageTokenizer, limit: int | None) -> dict:
    figures = {"size": tokenizer.size, "bits_a_code": math.log2(tokenizer.size), "sets": {}}
    pictures = {}
    for name, path in HELD_OUT.items():
        pictures[name] = read(path, tokenizer, limit)
        found, codes = quality(tokenizer, pictures[name])
        figures["sets"][name] = {**found, "pictures": len(codes)}
    figures["codes_a_picture"] = codes[0].size
    found, codes = quality(tokenizer, read(TRAINING, tokenizer, limit))
    figures["sets"]["training"] = {**found, "pictures": len(codes)}
    counts = np.bincount(np.concatenate([item.ravel() for item in codes]), minlength=tokenizer.size)
    usage = CodebookUsage.of(torch.from_numpy(counts), tokenizer.levels)
    figures["usage_training"] = {"codes_used": 1 - usage.dead, "perplexity": usage.perplexity,
                                 "bits_carried": math.log2(usage.perplexity)}
    free, generator, figures["sizes"] = tokenizer.at(None), Generator().manual_seed(0), []
    chosen = pictures["unseen style"][::max(1, len(pictures["unseen style"]) // PICTURES)][:PICTURES]
    for height, width in tqdm(SIZES if limit is None else SIZES[:4], desc="sizes", leave=False):
        singles = [resize(picture, height, width) for picture in chosen]
        sheets = [sheet(pictures["unseen style"], height, width, generator) for _ in chosen]
        row = {"height": height, "width": width, "single": quality(free, singles)[0]}
        row["sheet"], codes = quality(free, sheets)
        row["edges"] = edges(free, sheets, [free.decode(item) for item in codes])
        figures["sizes"].append(row)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="an image tokenizer")
    parser.add_argument("--short", action="store_true", help=f"{SHORT} pictures of each set, small sizes only")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(find_shipped(options.folder))
    if not isinstance(tokenizer, ImageTokenizer):
        raise InputError(f"{options.folder}: found a tokenizer of kind {tokenizer.kind!r}, expected 'image'")
    figures = measure(tokenizer, SHORT if options.short else None)
    print(f"{options.folder}, {platform.processor() or platform.machine()}, torch {torch.__version__}")
    print(f"{figures['codes_a_picture']} codes a picture of {figures['bits_a_code']:.1f} bits")
    for name, row in figures["sets"].items():
        print(f"{name:14} PSNR {row['psnr_db']:5.2f} dB  SSIM {row['ssim']:.3f}  ({row['pictures']} pictures)")
    usage = figures["usage_training"]
    print(f"codes used, training pictures: {usage['codes_used']:.3f} of {figures['size']}, "
          f"perplexity {usage['perplexity']:.0f}")
    print("height x width   single: PSNR  SSIM   sheet: PSNR  SSIM   PSNR at edges of windows, patches   step error")
    for row in figures["sizes"]:
        line = f"{row['height']:6} x {row['width']:<5}"
        for kind in ("single", "sheet"):
            line += f"         {row[kind]['psnr_db']:5.2f} {row[kind]['ssim']:.3f}"
        if found := row["edges"]:
            line += (f"             {found['psnr_db_window_edges']:5.2f}  {found['psnr_db_patch_edges']:5.2f}          "
                     f"{found['step_error_window_edges']:6.2f} {found['step_error_patch_edges']:5.2f}")
        print(line)
    if options.output:
        facts = {"tokenizer": options.folder, "fingerprint": tokenizer.fingerprint, "torch": torch.__version__}
        options.output.write_text(json.dumps({**facts, **figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
