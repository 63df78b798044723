"""Matrices in 8 bits, for products with few rows, which are bound by reading the weights.

Each output has a scale of its own, and codes are symmetric around 0: what gpt-fast and torchao call weight-only. Inputs are
rounded to bfloat16, sums are float32.

Shapes: N rows, I inputs, O outputs.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127
WHOLE = 64     # inputs must be a multiple: the operator reads whole vectors, even past the end


class Int8Matrix(NamedTuple):
    """A matrix (I, O) in 8 bits, as the right operand of a product."""

    codes: Tensor     # (O, I) int8
    scale: Tensor     # (O,) bfloat16: the weights of an output are about its codes times this

    @classmethod
    def of(cls, matrix: Tensor) -> "Int8Matrix":
        """Quantize a matrix (I, O)."""
        # The scale is rounded before the codes are computed, so that they compensate for it.
        scale = (matrix.T.abs().amax(1).float().clamp_min(1e-30) / LARGEST).bfloat16()
        codes = (matrix.T.float() / scale.float()[:, None]).round_().clamp_(-LARGEST, LARGEST)
        return cls(codes.to(torch.int8).contiguous(), scale)

    def product(self, x: Tensor) -> Tensor:
        """Inputs (N, I) of any dtype -> their product with the matrix (N, O) in bfloat16."""
        x = x.bfloat16()
        if self.codes.shape[1] % WHOLE == 0 and has_kernel():
            return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scale)
        return torch.mm(x, self.codes.T.bfloat16()).mul_(self.scale)


@cache
def has_kernel() -> bool:
    """Whether torch has the operator that multiplies by the codes directly, which is not part of its public API.

    Without it the codes are converted in each call, which is slow but equally correct.
    """
    codes = torch.zeros(2, WHOLE, dtype=torch.int8)
    codes[0, :3], codes[1, -2:] = torch.tensor([1, -2, 3]), torch.tensor([100, -LARGEST])
    x, scale = torch.ones(1, WHOLE, dtype=torch.bfloat16), torch.tensor([0.5, 2.0], dtype=torch.bfloat16)
    try:
        return torch.ops.aten._weight_int8pack_mm(x, codes, scale).tolist() == [[1.0, -54.0]]
    except (AttributeError, RuntimeError, TypeError):
        return False
