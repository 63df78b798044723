"""How many bytes do WebP, AVIF, JPEG and JPEG XL need to match the quality of the image tokenizer?

    python benchmarks/classic_codecs.py
    python benchmarks/classic_codecs.py --limit 24 --no_write

Pictures of the unseen style at the tokenizer's own size. Ours costs the number of codes times the logarithm of the codebook size; a
classic codec's file is the smallest over all qualities with at least our PSNR (or SSIM) for the same picture. Headers are a large
part of files at 64 pixels: the second figure subtracts the file of a grey picture of that size. JPEG XL needs pillow-jxl-plugin.
Writes results/classic_codecs.json.
"""

import argparse
import contextlib
import io
import math
from datetime import date

import numpy as np
import torch
from image_quality import HELD_OUT, read
from measure import write_result
from PIL import Image
from torch import Tensor

from mmtx.modality.base import load_tokenizer
from mmtx.modality.image import to_float
from mmtx.training.codec import picture_quality

with contextlib.suppress(ImportError):
    import pillow_jxl  # noqa: F401

CLASSICS = {"WebP": {"format": "WEBP", "method": 6}, "AVIF": {"format": "AVIF", "speed": 4},
            "JPEG": {"format": "JPEG", "optimize": True}, "JPEG XL": {"format": "JXL"}}
QUALITIES = (1, 3, 6, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95)


def coded(picture: np.ndarray, quality: int, options: dict) -> tuple[int, Tensor]:
    """Size of the encoded file in bytes, and the decoded image."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, quality=quality, **options)
    with Image.open(file) as opened:
        found = np.array(opened.convert("RGB"))
    return file.getbuffer().nbytes, torch.from_numpy(found).permute(2, 0, 1)


def measured(picture: Tensor, other: Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in picture_quality(to_float(picture)[None], to_float(other)[None]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="tokenizers/image")
    parser.add_argument("--limit", type=int, default=96, help="pictures, default: 96")
    parser.add_argument("--no_write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(options.tokenizer)
    pictures = read(HELD_OUT["unseen style"], tokenizer, options.limit)
    bits = math.log2(tokenizer.size)
    codes = tokenizer.encode_batch(pictures)
    ours = [measured(picture, tokenizer.decode(code)) for picture, code in zip(pictures, codes, strict=True)]
    own = float(np.mean([code.size * bits / 8 for code in codes]))
    result = {"name": "classic_codecs", "date": date.today().isoformat(), "pictures": len(pictures), "bytes of codes": round(own, 1),
              **{name: round(float(np.mean([each[name] for each in ours])), 4) for name in ours[0]}, "classics": {}}
    print(f"ours: {own:.1f} bytes, " + ", ".join(f"{name} {result[name]:.4g}" for name in ours[0]), flush=True)
    grey = np.full((*pictures[0].shape[1:], 3), 128, np.uint8)
    for name, given in CLASSICS.items():
        try:
            header, _ = coded(grey, 1, given)
        except (KeyError, OSError):
            print(f"{name}: this Pillow does not write it")
            continue
        least: dict[str, list[int]] = {what: [] for what in ours[0]}
        for picture, wanted in zip(pictures, ours, strict=True):
            array = picture.permute(1, 2, 0).contiguous().numpy()
            tries = [(size, measured(picture, other)) for size, other in (coded(array, quality, given) for quality in QUALITIES)]
            for what in least:
                least[what].append(min([size for size, found in tries if found[what] >= wanted[what]], default=tries[-1][0]))
        means = {what: float(np.mean(sizes)) for what, sizes in least.items()}
        result["classics"][name] = {
            what: {"bytes": round(mean, 1), "times ours": round(mean / own, 2),
                   "without header": round(mean - header, 1), "times ours without header": round((mean - header) / own, 2)}
            for what, mean in means.items()}
        print(f"{name}: {result['classics'][name]}", flush=True)
    if not options.no_write:
        write_result(result)


if __name__ == "__main__":
    main()
