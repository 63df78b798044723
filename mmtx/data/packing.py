"""Documents to packed batches by index. The only place that shifts targets.

Shapes: N tokens of a batch (one row), M supervised tokens.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtx.data.tokens import TokenStore
from mmtx.errors import InputError
from mmtx.layers import Packing
from mmtx.sequence import code_follows
from mmtx.vocabulary import Vocabulary


class Batch(NamedTuple):
    """A row of packed documents, and what is to be learned from it."""

    ids: Tensor          # (1, N) int64, padded with <pad>
    positions: Tensor    # (1, N) place of each token in its document, from 0
    packing: Packing     # where the documents lie
    supervised: Tensor   # (M,) places in the N whose next id is a target; the first `plain` of them see no code next
    plain: int           # number of places behind which the grammar allows no code of a picture or sound
    targets: Tensor      # (M,) those next ids
    modality: Tensor     # (M,) modality of each target, an index into vocabulary.MODALITIES
    samples: Tensor      # (documents,) numbers of the samples, for error messages


class PackedBatches(torch.utils.data.Dataset):
    """Batch k, as a pure function of (seed, k, rank): epochs, order, views and packing included.

    Each epoch is a new permutation of all samples, each `repeats[i]` times. Documents are laid one behind the other
    until `tokens` are full. Ranks take turns: rank r of `world` gets every world-th batch.
    """

    def __init__(self, store: TokenStore, vocabulary: Vocabulary, tokens: int, *, repeats: Sequence[int] | None = None,
                 shuffle: bool = True, seed: int = 0, steps: int | None = None, rank: int = 0, world: int = 1):
        """`steps` is the length: the number of batches a rank can ask for, by default one epoch."""
        self.store, self.vocabulary, self.tokens = store, vocabulary, tokens
        self.shuffle, self.seed, self.rank, self.world = shuffle, seed, rank, world
        self.counts = np.ones(len(store), int) if repeats is None else np.asarray(repeats)
        self.members = np.repeat(np.arange(len(store)), self.counts)
        self.copies = np.concatenate([np.arange(count) for count in self.counts])  # which repeat a member is
        self.lengths = store.lengths() - 1
        if self.lengths.max() > tokens:
            raise InputError(f"tokens of a batch: found {tokens}, expected at least {self.lengths.max()}, "
                             "the longest document")
        self.plans: dict[int, list[list[tuple[int, int]]]] = {}  # of the epoch that was asked for last
        self.first = [0]  # number of the first batch of each epoch, as far as they are known
        self.steps = steps if steps is not None else -(-len(self.plan(0)) // world)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, k: int) -> Batch:
        if not 0 <= k < self.steps:
            raise IndexError(k)
        index = k * self.world + self.rank
        while index >= self.first[-1]:
            self.first.append(self.first[-1] + len(self.plan(len(self.first) - 1)))
        epoch = bisect_right(self.first, index) - 1
        return self._batch(self.plan(epoch)[index - self.first[epoch]])

    def plan(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The batches of an epoch: (sample, view) pairs of each."""
        if epoch not in self.plans:
            self.plans = {epoch: self._plan(epoch)}
        return self.plans[epoch]

    def _plan(self, epoch: int) -> list[list[tuple[int, int]]]:
        order = np.arange(len(self.members))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        # A sample goes through all its views before it repeats one; samples start at different views.
        views = (self.members * 7919 + epoch * self.counts[self.members] + self.copies) % self.store.views
        batches, room = [], 0
        for sample, view in zip(self.members[order].tolist(), views[order].tolist(), strict=True):
            length = self.lengths[sample, view]
            if length > room:
                batches.append([])
                room = self.tokens
            batches[-1].append((sample, view))
            room -= length
        return batches

    def _batch(self, members: list[tuple[int, int]]) -> Batch:
        ids = np.full(self.tokens, self.vocabulary.pad, np.int64)
        positions = np.zeros(self.tokens, np.int64)
        numbers = np.full(self.tokens, len(members), np.int64)
        supervised, targets = [], []
        place = 0
        for number, (sample, view) in enumerate(members):
            document, trained = self.store.document(sample, view)
            length = len(document) - 1
            ids[place:place + length] = document[:-1]
            positions[place:place + length] = np.arange(length)
            numbers[place:place + length] = number
            # Token i predicts token i + 1: here and nowhere else.
            chosen = np.flatnonzero(trained[1:])
            supervised.append(place + chosen)
            targets.append(document[1:][chosen])
            place += length
        # Padding is cut into documents no longer than the real ones, so that attention over it costs no more.
        longest = max(self.lengths[sample, view] for sample, view in members)
        numbers[place:] += np.arange(self.tokens - place) // longest
        supervised, targets = np.concatenate(supervised), np.concatenate(targets).astype(np.int64)
        coded = code_follows(ids, self.vocabulary)[supervised]
        order = np.argsort(coded, kind="stable")
        supervised, targets = supervised[order], targets[order]
        return Batch(
            torch.from_numpy(ids)[None],
            torch.from_numpy(positions)[None],
            Packing.of(torch.from_numpy(numbers)[None]),
            torch.from_numpy(supervised),
            int((~coded).sum()),
            torch.from_numpy(targets),
            torch.from_numpy(self.vocabulary.modality_of(targets).astype(np.int64)),
            torch.tensor([sample for sample, _ in members]),
        )
