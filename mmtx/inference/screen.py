"""The best row of an output matrix without reading all of it: logits from 8-bit weights, and a bound on their error.

Shapes: B batch, D width, R rows of the output, n pairs of a hidden state and a row.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FEW_ROWS = 4096   # output matrices of up to so many rows are read in full
FEW = 512         # candidates per hidden state of a batch, on average; if there are more, all rows are read
SLACK = 1e-5      # rounding error of a float32 logit, as a share of the largest that it could be


class Screen(NamedTuple):
    """The first rows of an output matrix in 8 bits, with error bounds, to find the few that can have the highest logit."""

    packed: Tensor        # (R, D) of int8, in oneDNN's layout
    scale: Tensor         # (R,) a row is about its codes times this
    zero: Tensor          # (R,) of zeros
    length: np.ndarray    # (R,) norm of each quantized row
    error: np.ndarray     # (R,) norm of its quantization error, plus SLACK times its own norm
    most: tuple[float, float]  # the largest of `error` and of `length`

    @staticmethod
    def pays() -> bool:
        """Whether the CPU has instructions for 8-bit products (VNNI); without them, reading all rows is as fast."""
        return has_instructions("avx512_vnni", "avx_vnni") and has_operators()

    @classmethod
    def of(cls, rows: Tensor) -> "Screen":
        """Quantize a matrix (R, D)."""
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        codes = (rows / scale).round_()
        near = codes * scale
        length = torch.linalg.vector_norm(near, dim=1)
        error = torch.linalg.vector_norm(near.sub_(rows), dim=1) + SLACK * length
        packed = torch.ops.onednn.qlinear_prepack(codes.to(torch.int8), [1, rows.shape[1]])
        return cls(packed, scale[:, 0], torch.zeros(len(rows), dtype=torch.long), length.numpy(), error.numpy(),
                   (float(error.max()), float(length.max())))

    def scores(self, hidden: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
        """Approximate logits (R,) for a hidden state (D,), and the norms of that state and of its quantization error.

        With w a row, v its quantized form, h the hidden state and g its quantized form in 7 bits, the logit w h differs from
        v g by at most |w - v| |h| + |v| |h - g|.
        """
        # 7 bits, unsigned: with AVX2 alone, oneDNN adds two products in 16 bits, which would overflow with 255 * 127.
        scale = float(max(hidden.max(), -hidden.min(), 1e-30)) / 63
        codes = np.rint(hidden / scale)
        lack = hidden - codes * scale
        given = torch.from_numpy((codes + 64).astype(np.uint8))[None]
        scores = torch.ops.onednn.qlinear_pointwise(
            given, scale, 64, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], "")[0].numpy()
        return scores, (math.sqrt(hidden.dot(hidden)), math.sqrt(lack.dot(lack)))

    def bound(self, rows: Any, lengths: tuple[float, float]) -> Any:
        """Bounds on the errors of `scores` for some rows."""
        return self.error[rows] * lengths[0] + self.length[rows] * lengths[1]

    def candidates(self, hidden: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
        """Indices of rows that can have the highest logit, among those whose `forbidden` (R,) is 0 and not -inf."""
        scores, lengths = self.scores(hidden)
        scores += forbidden
        best = scores.argmax()
        least = scores[best] - self.bound(best, lengths)
        # First with one looser bound for all rows, which takes no pass over them.
        few = np.flatnonzero(scores >= least - self.most[0] * lengths[0] - self.most[1] * lengths[1])
        return few[scores[few] + self.bound(few, lengths) >= least]

    def best(self, rows: Tensor, hidden: Tensor, forbidden: np.ndarray) -> Tensor | None:
        """The best of the rows (R, D) for each hidden state (B, D), among those whose `forbidden` (B, R) is 0 and not -inf, (B,).

        None if hidden states are not finite, or leave so many candidates that all rows may as well be read.
        """
        hidden = hidden.float()
        # Everything is in units of a hidden state's quantization step, which saves scaling the scores.
        scale = hidden.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(63)
        codes = (hidden / scale).round_()
        lengths = torch.stack([torch.linalg.vector_norm(each, dim=1) for each in (hidden, hidden - codes * scale)], 1).div_(scale)
        if not lengths.isfinite().all():
            return None
        scores = torch.ops.onednn.qlinear_pointwise(
            codes.add_(64).to(torch.uint8), 1.0, 64, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], "")
        # NumPy is up to twenty times as fast here as torch, which searches one element at a time.
        numbers, bounds, states = scores.numpy(), np.stack([self.error, self.length]), np.arange(len(hidden))
        numbers += forbidden
        places = numbers.argmax(1)
        least = numbers[states, places] - (lengths.numpy() * bounds[:, places].T).sum(1)
        scores.addmm_(lengths, torch.from_numpy(bounds))
        state, row = np.divmod(np.flatnonzero(numbers >= least[:, None]), len(rows))               # (n,), those of a state together
        if len(row) > FEW * len(hidden):
            return None
        exact = (rows[torch.from_numpy(row)] * hidden[torch.from_numpy(state)]).sum(1).numpy()
        counts = np.bincount(state, minlength=len(hidden))
        first = counts.cumsum() - counts
        table = np.full((len(hidden), counts.max()), -np.inf, np.float32)
        table[state, np.arange(len(row)) - first[state]] = exact
        return torch.from_numpy(row[first + table.argmax(1)])


@cache
def has_instructions(*names: str) -> bool:
    """Whether the CPU has any of these instruction sets, by torch's names for them."""
    return any(map(torch.cpu.get_capabilities().get, names))


@cache
def has_operators() -> bool:
    """Whether torch has the oneDNN operators of a screen, which are not public API; without them, all rows are read."""
    if not torch.backends.mkldnn.is_available():
        return False
    rows, hidden = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 0.5, 6.0]]), np.array([1.0, 2.0, -1.0], np.float32)
    try:
        screen = Screen.of(rows)
        scores, lengths = screen.scores(hidden)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((np.abs(scores - rows.numpy() @ hidden) <= screen.bound(slice(None), lengths)).all())
