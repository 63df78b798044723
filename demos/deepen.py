"""Deepens a model without changing its answers: new blocks between the old ones add nothing until they are trained.

See Net2Net (Chen et al. 2016, https://arxiv.org/abs/1511.05641). The model that comes with mmtx began as such a model.

    python demos/deepen.py demos/starter --depth 6 --output runs/starter/deeper
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import mmtx
from mmtx.modality.encoder import build_encoder
from mmtx.model import Decoder


def deepen(folder: str | Path, depth: int) -> mmtx.Model:
    """The model in a folder, extended to `depth` blocks by new ones that are spread evenly among the old ones."""
    model = mmtx.load(folder, "cpu")
    old = model.decoder.config
    if depth <= old.depth:
        raise mmtx.InputError(f"--depth: found {depth}, expected more than the {old.depth} blocks of {folder}")
    # Old block i comes after its proportional share of the new blocks.
    places = [i + i * (depth - old.depth) // old.depth for i in range(old.depth)]
    heard = places[old.ctc_blocks - 1] + 1 if old.ctc_blocks else old.ctc_blocks  # CTC reads the output of the same old block
    decoder = Decoder(replace(old, depth=depth, ctc_blocks=heard), build_encoder)
    weights = {name: weight for name, weight in model.decoder.state_dict().items() if not name.startswith("blocks.")}
    for i, place in enumerate(places):
        weights |= {f"blocks.{place}.{name}": weight for name, weight in model.decoder.blocks[i].state_dict().items()}
    decoder.load_state_dict(weights, strict=False)
    for place in set(range(depth)) - set(places):
        for writes in (decoder.blocks[place].attention.out, decoder.blocks[place].feed_forward.down):
            nn.init.zeros_(writes.weight)
    return mmtx.Model(decoder, model.vocabulary, model.tokenizers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a deeper model that answers as a given one.")
    parser.add_argument("model", help="model folder")
    parser.add_argument("--depth", required=True, type=int, help="number of blocks")
    parser.add_argument("--seed", type=int, default=0, help="of the new blocks' weights")
    parser.add_argument("--output", required=True, type=Path, help="a new folder")
    options = parser.parse_args()
    try:
        if options.output.exists():
            raise mmtx.InputError(f"{options.output}: exists, expected a new folder")
        torch.manual_seed(options.seed)
        deepen(options.model, options.depth).save(options.output)
    except mmtx.InputError as error:
        sys.exit(f"deepen.py: error: {error}")


if __name__ == "__main__":
    main()
