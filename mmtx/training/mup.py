"""muP: learning rates that are set at one width and hold at others (https://arxiv.org/abs/2203.03466).

With w = width / base, the matrices of blocks begin smaller by sqrt(w), AdamW trains them at 1 / w of its rate, and Muon at
1 / sqrt(w) of its own, since the largest singular value of a step of AdamW grows with w and of Muon's, as it is scaled here, with
sqrt(w). Scores are to be multiplied by 1 / w: the last norm, whose gain is a factor of all of them, begins there, and its rate is as
much smaller. So nothing changes in a finished model and in engines.
"""

import torch
from torch import nn

from mmtx.model import Decoder


@torch.no_grad()
def rescale(decoder: Decoder, base: int) -> None:
    """Make what a new decoder begins with what muP has it begin with."""
    ratio = base / decoder.config.width
    for block in decoder.blocks:
        for parameter in block.parameters():
            if parameter.dim() > 1:
                parameter.mul_(ratio ** 0.5)
    decoder.norm.weight.mul_(ratio)


def scaled(decoder: Decoder) -> list[nn.Parameter]:
    """What does not train at the rates of the base."""
    return [*(p for block in decoder.blocks for p in block.parameters() if p.dim() > 1), decoder.norm.weight]
