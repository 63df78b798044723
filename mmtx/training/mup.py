"""muP: learning rates that are tuned at one width and transfer to others (https://arxiv.org/abs/2203.03466).

With w = width / base, the matrices of blocks start smaller by sqrt(w), AdamW trains them at 1 / w of its rate, and Muon at
1 / sqrt(w) of its own: the largest singular value of AdamW's step grows with w, and that of Muon's, as scaled here, with sqrt(w).
muP multiplies logits by 1 / w. Here the gain of the final norm, a factor of all logits, starts at 1 / w instead, and trains at 1 / w
of its rate, so neither finished models nor engines have to know of muP.
"""

import torch
from torch import nn

from mmtx.model import Decoder


@torch.no_grad()
def rescale(decoder: Decoder, base: int) -> None:
    """Rescale the initial weights of a new decoder as muP requires."""
    ratio = base / decoder.config.width
    for block in decoder.blocks:
        for parameter in block.parameters():
            if parameter.dim() > 1:
                parameter.mul_(ratio ** 0.5)
    decoder.norm.weight.mul_(ratio)


def scaled(decoder: Decoder) -> list[nn.Parameter]:
    """The parameters that do not train at the rates of the base width."""
    return [*(p for block in decoder.blocks for p in block.parameters() if p.dim() > 1), decoder.norm.weight]
