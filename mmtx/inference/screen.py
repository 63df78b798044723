"""The best row of an output matrix without reading all of it: scores in 8 bits, and a bound of their error.

Shapes: B batch, D width, R rows of the output, n pairs of a hidden state and a row.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FEW_ROWS = 4096   # output matrices up to here are read as a whole
FEW = 512         # rows that a hidden state of a batch may leave in the mean: where there are more, all are read
SLACK = 1e-5      # what float32 rounds away in a score, as a share of the longest that it could be


class Screen(NamedTuple):
    """The first rows of an output matrix in 8 bits, and the error that this makes: says which few can score best."""

    packed: Tensor        # (R, D) of int8, as oneDNN lays it out
    scale: Tensor         # (R,) a row is about its codes times this
    zero: Tensor          # (R,) of zeros
    length: np.ndarray    # (R,) of what a row is about
    error: np.ndarray     # (R,) length of what it lacks, and SLACK of its own length
    most: tuple[float, float]  # the largest of `error` and of `length`

    @staticmethod
    def pays() -> bool:
        """Whether the processor has instructions for products of 8 bits (VNNI): with others, reading all is as fast."""
        return has_instructions("avx512_vnni", "avx_vnni") and has_operators()

    @classmethod
    def of(cls, rows: Tensor) -> "Screen":
        """Of a matrix (R, D)."""
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        codes = (rows / scale).round_()
        near = codes * scale
        length = torch.linalg.vector_norm(near, dim=1)
        error = torch.linalg.vector_norm(near.sub_(rows), dim=1) + SLACK * length
        packed = torch.ops.onednn.qlinear_prepack(codes.to(torch.int8), [1, rows.shape[1]])
        return cls(packed, scale[:, 0], torch.zeros(len(rows), dtype=torch.long), length.numpy(), error.numpy(),
                   (float(error.max()), float(length.max())))

    def scores(self, hidden: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
        """About what each row scores (R,) for a hidden state (D,), and the lengths of that and of what 7 bits lack of it.

        With w a row, v what is here of it, h the hidden state and g what 7 bits keep of that, the score w h differs from
        v g by no more than |w - v| |h| + |v| |h - g|.
        """
        # 7 bits, from 0 on: where oneDNN keeps to AVX2, it adds two products in 16 bits, which two of 255 and 127 do not fit.
        scale = float(max(hidden.max(), -hidden.min(), 1e-30)) / 63
        codes = np.rint(hidden / scale)
        lack = hidden - codes * scale
        given = torch.from_numpy((codes + 64).astype(np.uint8))[None]
        scores = torch.ops.onednn.qlinear_pointwise(
            given, scale, 64, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], "")[0].numpy()
        return scores, (math.sqrt(hidden.dot(hidden)), math.sqrt(lack.dot(lack)))

    def bound(self, rows: Any, lengths: tuple[float, float]) -> Any:
        """How far from the truth what `scores` gives of some rows may be."""
        return self.error[rows] * lengths[0] + self.length[rows] * lengths[1]

    def candidates(self, hidden: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
        """Which rows can score best among those whose `forbidden` (R,) is 0 and not -inf."""
        scores, lengths = self.scores(hidden)
        scores += forbidden
        best = scores.argmax()
        least = scores[best] - self.bound(best, lengths)
        # First with a bound that is that of no row, but takes no pass over them.
        few = np.flatnonzero(scores >= least - self.most[0] * lengths[0] - self.most[1] * lengths[1])
        return few[scores[few] + self.bound(few, lengths) >= least]

    def best(self, rows: Tensor, hidden: Tensor, forbidden: np.ndarray) -> Tensor | None:
        """The best of the rows (R, D) for each hidden state (B, D) among those whose `forbidden` (B, R) is 0 and not -inf, (B,).

        None where hidden states are not finite, or leave so many rows that all may as well be read.
        """
        hidden = hidden.float()
        # All is in units of what a code of a hidden state stands for, so that no pass over the scores is needed for that.
        scale = hidden.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(63)
        codes = (hidden / scale).round_()
        lengths = torch.stack([torch.linalg.vector_norm(each, dim=1) for each in (hidden, hidden - codes * scale)], 1).div_(scale)
        if not lengths.isfinite().all():
            return None
        scores = torch.ops.onednn.qlinear_pointwise(
            codes.add_(64).to(torch.uint8), 1.0, 64, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], "")
        # NumPy goes over them up to twenty times as fast as torch, which looks for places one number at a time.
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
    """Whether the processor has any of these, as torch calls them."""
    return any(map(torch.cpu.get_capabilities().get, names))


@cache
def has_operators() -> bool:
    """Whether torch has the operators of oneDNN that a screen needs, which it does not promise to keep: without them all is read."""
    if not torch.backends.mkldnn.is_available():
        return False
    rows, hidden = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 0.5, 6.0]]), np.array([1.0, 2.0, -1.0], np.float32)
    try:
        screen = Screen.of(rows)
        scores, lengths = screen.scores(hidden)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((np.abs(scores - rows.numpy() @ hidden) <= screen.bound(slice(None), lengths)).all())
