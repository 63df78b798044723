"""Matrices laid out for oneDNN beforehand, for products with many rows: those of prompts and of a batch.

torch's own product (MKL) in float32 lays a matrix out anew in each call. GFLOP/s of one core of an AMD EPYC, 384 -> 2048, plain
and packed: 31 and 58 with 16 rows, 78 and 102 with 1,024; with one row the plain one is faster. What a layer does with a product
next is done to it while it is in the cache of the processor.

Shapes: N rows, I inputs, O outputs.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 16          # that the layout is chosen for; it is as good for more
TYPES = {torch.float32: (), torch.bfloat16: ("avx512_bf16",)}  # and what a processor must have for them to be fast
LARGEST = 2 ** 30  # bytes of the matrices of a decoder that are held a second time, at most


class PackedMatrix(NamedTuple):
    """A matrix (I, O) of float32 or bfloat16 as oneDNN lays it out: a copy."""

    blocks: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "PackedMatrix":
        """Of a matrix (I, O)."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(matrix.detach().T.contiguous(), ROWS))

    def product(self, x: Tensor) -> Tensor:
        """Numbers (N, I) of any type -> their product with the matrix (N, O), in the type of the matrix."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.blocks.dtype), self.blocks, None, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product."""
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, None, "swish", [], "")

    def product_times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times other numbers (N, O)."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.blocks, None, "mul")

    def product_plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus other numbers (N, O)."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.blocks, None, "add")


class PackedSwiGLU(NamedTuple):
    """The matrices of gates and values."""

    gate: PackedMatrix
    up: PackedMatrix

    @classmethod
    def of(cls, gate_up: Tensor) -> "PackedSwiGLU":
        """Of a matrix (I, 2 * O), gates first."""
        return cls(*map(PackedMatrix.of, gate_up.chunk(2, dim=1)))

    def __call__(self, x: Tensor) -> Tensor:
        """(N, I) -> silu(gate) * value (N, O)."""
        x = x.to(self.gate.blocks.dtype)
        return self.up.product_times(x, self.gate.silu(x))


@cache
def has_operators(dtype: torch.dtype = torch.float32) -> bool:
    """Whether torch has the operators of oneDNN that this needs, which it does not promise to keep, and the processor has
    instructions for numbers of this type: without, nothing is packed.
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
