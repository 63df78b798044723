"""Interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999): an n-gram model as the baseline for text.

    P(w | h) = max(c(h w) - D, 0) / c(h) + b(h) P(w | h'),   b(h) = what the discount D leaves over

h' is h without its first id. Counts are occurrences for the longest n-grams, and the number of distinct preceding ids for shorter
ones; below the unigrams all ids are equally likely. D = n1 / (n1 + 2 n2) for each order, from the numbers of n-grams that occur once
and twice. The probability of n-grams that are pruned goes to b(h), so that probabilities still sum to 1.

Shapes: N positions, n order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Order(NamedTuple):
    """The n-grams of one length: sorted codes with the probability terms of each."""

    grams: np.ndarray     # int64, n ids as the digits of one number
    discounted: np.ndarray  # float64, (c - D) / c(h) for each
    contexts: np.ndarray  # int64, n - 1 ids
    left_over: np.ndarray  # float64, b(h) for each


class KneserNey:
    """Probabilities of ids given up to `order` - 1 previous ids. Documents are padded with begin ids, which are never predicted,
    and end with the id `size`, which is."""

    def __init__(self, documents: Sequence[Sequence[int]], size: int, order: int = 5, numbers: int | None = None):
        """Count n-grams in documents of ids below `size`. With `numbers`, the rarest n-grams are pruned, longer ones first among
        equals, until at most that many probabilities and back-off weights are left; unigrams are always kept."""
        self.size, self.order, self.base = size, order, size + 2
        if self.base**order >= 2**63:
            raise ValueError(f"order: found {order} for {size} ids, whose n-grams do not fit into 63 bits")
        codes, counts = np.unique(self._grams(documents, order), return_counts=True)
        tables = [(codes, counts)]
        for n in range(order - 1, 0, -1):  # continuation counts: how many different ids precede it
            codes, counts = np.unique(codes % self.base**n, return_counts=True)
            tables.insert(0, (codes, counts))
        least = self._least(tables, numbers)
        self.orders = [self._discount(codes, counts, cut) for (codes, counts), cut in zip(tables, least, strict=True)]

    @property
    def numbers(self) -> int:
        """Number of probabilities and back-off weights in the model."""
        return sum(len(order.grams) + len(order.contexts) for order in self.orders)

    def probabilities(self, document: Sequence[int]) -> np.ndarray:
        """Ids (N,) -> float64 (N + 1,): probability of each id and of the end, given those before it."""
        grams = self._grams([document], self.order)
        p = np.full(len(grams), 1 / (self.size + 1))
        for n, order in enumerate(self.orders, 1):
            gram = grams % self.base**n
            left = _look_up(order.contexts, order.left_over, gram // self.base, 1.0)
            p = _look_up(order.grams, order.discounted, gram, 0.0) + left * p
        return p

    def bits_per_byte(self, documents: Sequence[Sequence[int]], texts: Sequence[str]) -> float:
        """Bits of all ids, including ends, per byte of the texts in UTF-8."""
        bits = -sum(np.log2(self.probabilities(document)).sum() for document in documents)
        return float(bits / sum(len(text.encode()) for text in texts))

    def _grams(self, documents: Sequence[Sequence[int]], n: int) -> np.ndarray:
        """The n-grams that end at each id and at the end of each document, each as one number."""
        begin, end, found = self.size + 1, self.size, []
        for document in documents:
            ids = np.array([*[begin] * (n - 1), *document, end], np.int64)
            windows = np.lib.stride_tricks.sliding_window_view(ids, n)
            found.append(windows @ self.base ** np.arange(n - 1, -1, -1, dtype=np.int64))
        return np.concatenate(found)

    def _least(self, tables: Sequence[tuple[np.ndarray, np.ndarray]], numbers: int | None) -> list[int]:
        """Minimum count of the n-grams to keep, per order."""
        least = [1] * self.order
        while numbers is not None and sum(self._kept(*table, cut) for table, cut in zip(tables, least)) > numbers:
            longest = max(range(1, self.order), key=lambda n: (-least[n], n), default=0)
            if not longest or least[longest] > max(tables[longest][1]):
                break
            least[longest] += 1
        return least

    def _kept(self, codes: np.ndarray, counts: np.ndarray, cut: int) -> int:
        codes = codes[counts >= cut]
        return len(codes) + len(np.unique(codes // self.base))

    def _discount(self, codes: np.ndarray, counts: np.ndarray, cut: int) -> Order:
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        discount = once / (once + 2 * twice) if once else 0.0
        contexts, index = np.unique(codes // self.base, return_inverse=True)
        kept = counts >= cut
        discounted = (counts - discount) * kept / np.bincount(index, counts)[index]
        left_over = 1 - np.bincount(index, discounted)
        useful = np.bincount(index, kept) > 0  # a context without n-grams backs off entirely
        return Order(codes[kept], discounted[kept], contexts[useful], left_over[useful])


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, default: float) -> np.ndarray:
    if not len(keys):
        return np.full(len(wanted), default)
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], default)
