"""Finite scalar quantization: the codebook is a grid, so there is nothing to learn and nothing to collapse.

Mentzer et al., https://arxiv.org/abs/2309.15505. Each of the d numbers of a latent is bounded and rounded to one of
L_i levels; a code is the mixed-radix number of the d digits. The bound is the scaled sigmoid of iFSQ
(https://arxiv.org/abs/2601.17124), which turns a normal distribution into nearly uniform digits.
"""

import math

import torch
from torch import Tensor, nn

from mmtx.errors import InputError


class FSQ(nn.Module):
    """Quantizer with `levels` steps on each of its d dimensions; `size` is their product."""

    level: Tensor  # (d,) the levels
    step: Tensor   # (d,) place value of each digit in a code

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        if not levels or any(level < 2 for level in levels):
            raise InputError(f"levels: found {tuple(levels)}, expected at least one number, each 2 or more")
        self.levels = tuple(levels)
        self.size = math.prod(levels)
        steps = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("level", torch.tensor(self.levels), persistent=False)
        self.register_buffer("step", torch.tensor(steps), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (..., d), any range -> quantized latents (..., d) in [-1, 1], with straight-through gradients."""
        top = self.level - 1
        bounded = torch.sigmoid(1.6 * latents.float()) * top
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded * 2 / top - 1

    def to_codes(self, quantized: Tensor) -> Tensor:
        """Quantized latents (..., d) -> codes (...) in [0, size)."""
        digits = ((quantized + 1) / 2 * (self.level - 1)).round().long()
        return (digits * self.step).sum(-1)

    def to_latents(self, codes: Tensor) -> Tensor:
        """Codes (...) -> quantized latents (..., d): the inverse of `to_codes`."""
        digits = codes[..., None] // self.step % self.level
        return digits * 2 / (self.level - 1) - 1
