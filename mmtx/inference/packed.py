"""Matrices packed for oneDNN in advance, for products with many rows: those of prompts and batches.

torch's own product in float32 (MKL) packs the matrix in each call. GFLOP/s of one core of an AMD EPYC, 384 -> 2048, plain and
packed: 31 and 58 with 16 rows, 78 and 102 with 1,024; with one row the plain product is faster. The elementwise operation that
follows a product in a layer is fused with it, while the result is in the CPU's cache.

Shapes: N rows, I inputs, O outputs.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 16          # for which the layout is chosen; it is as good for more
TYPES = {torch.float32: (), torch.bfloat16: ("avx512_bf16",)}  # and the CPU features without which they are slow
LARGEST = 2 ** 30  # most bytes of a decoder's matrices that are held a second time


class PackedMatrix(NamedTuple):
    """A copy of a matrix (I, O) in float32 or bfloat16, in oneDNN's layout."""

    blocks: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "PackedMatrix":
        """Pack a matrix (I, O)."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(matrix.detach().T.contiguous(), ROWS))

    def product(self, x: Tensor) -> Tensor:
        """Inputs (N, I) of any dtype -> their product with the matrix (N, O), in the dtype of the matrix."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.blocks.dtype), self.blocks, None, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product (N, O)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, None, "swish", [], "")

    def product_times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other` (N, O), elementwise."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.blocks, None, "mul")

    def product_plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus `other` (N, O)."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.blocks, None, "add")


class PackedSwiGLU(NamedTuple):
    """The packed matrices of the gates and values of SwiGLU."""

    gate: PackedMatrix
    up: PackedMatrix

    @classmethod
    def of(cls, gate_up: Tensor) -> "PackedSwiGLU":
        """Pack a matrix (I, 2 * O), gates first."""
        return cls(*map(PackedMatrix.of, gate_up.chunk(2, dim=1)))

    def __call__(self, x: Tensor) -> Tensor:
        """(N, I) -> silu(gate) * value (N, O)."""
        x = x.to(self.gate.blocks.dtype)
        return self.up.product_times(x, self.gate.silu(x))


@cache
def has_operators(dtype: torch.dtype = torch.float32) -> bool:
    """Whether torch has the oneDNN operators needed here, and the CPU the instructions for this dtype.

    The operators are not part of torch's public API. Without them, nothing is packed.
    """
    if not torch.backends.mkldnn.is_available() or dtype not in TYPES or not all(map(torch.cpu.get_capabilities().get, TYPES[dtype])):
        return False
    x, matrix, other = (torch.tensor(each, dtype=dtype) for each in ([[1.0, 2.0]], [[3.0, -1.0], [4.0, 0.5]], [[2.0, 3.0]]))
    product = x @ matrix
    expected = product, torch.nn.functional.silu(product), product * other, product + other
    try:
        packed = PackedMatrix.of(matrix)
        found = packed.product(x), packed.silu(x), packed.product_times(x, other), packed.product_plus(x, other)
        return all(a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=torch.finfo(dtype).eps, atol=1e-5)
                   for a, b in zip(found, expected, strict=True))
    except (AttributeError, RuntimeError, TypeError):
        return False
