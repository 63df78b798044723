"""Averages the weights of models that were trained on from one another, which is often better than any one of them.

The model that comes with mmtx is such an average (model soups, Wortsman et al. 2022, https://arxiv.org/abs/2203.05482). If a
model got another encoder on the way, the encoder and its projection are averaged over the models that have that of the first.

    python demos/average.py runs/starter/captions/model runs/starter/captions-more/model --output runs/starter/mean
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import mmtx


def average(folders: Sequence[str]) -> mmtx.Model:
    """The first model, with weights averaged over the models that have them. Raises InputError if sizes or tokenizers differ."""
    models = [mmtx.load(folder, "cpu") for folder in folders]
    first = models[0]
    inputs = lambda model, kind: (model.decoder.config.encoders.get(kind), model.decoder.config.features.get(kind))
    blocks = [replace(model.decoder.config, encoders={}, features={}) for model in models]
    for folder, model, config in zip(folders, models, blocks, strict=True):
        if config != blocks[0] or model.vocabulary.to_json() != first.vocabulary.to_json():
            raise mmtx.InputError(f"{folder}: found another decoder or other tokenizers than in {folders[0]}, expected the same")
    weights = [model.decoder.state_dict() for model in models]
    with torch.no_grad():
        for name, weight in first.decoder.state_dict().items():
            module, kind, *_ = name.split(".")
            alike = [each[name] for model, each in zip(models, weights, strict=True)
                     if module not in ("encoders", "projections") or inputs(model, kind) == inputs(first, kind)]
            weight.copy_(torch.stack(alike).mean(0))
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the mean of the weights of models.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folders that went on from one another")
    parser.add_argument("--output", required=True, type=Path, help="a new folder")
    options = parser.parse_args()
    try:
        if options.output.exists():
            raise mmtx.InputError(f"{options.output}: exists, expected a new folder")
        average(options.models).save(options.output)
    except mmtx.InputError as error:
        sys.exit(f"average.py: error: {error}")


if __name__ == "__main__":
    main()
