"""Batches: which media and prompts are computed together, and how many batches at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from mmtx.ambient import MOST_THREADS, in_threads

BATCH = 32  # most media encoded together, and most prompts answered together
# A batch never holds more than this, except for a single medium or prompt that is larger: memory depends on the longest of
# many, not on their number. On a CPU up to MOST_THREADS batches run at a time.
BATCH_TOKENS = 16_384   # of prompts, padding included
BATCH_VALUES = 2 ** 21  # values of media as their tokenizer reads them: 131 s of sound, or 170 pictures of 64 pixels a side
SHORT = 64              # length of a prompt in tokens up to which padding costs less than another batch


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of prompts, batched by similar length, within BATCH and BATCH_TOKENS.

    At most half of a batch is padding, unless its shortest prompt has fewer than SHORT tokens.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[number]
        fits = batches and len(batches[-1]) < BATCH and (len(batches[-1]) + 1) * length <= BATCH_TOKENS
        if not fits or length > 2 * max(SHORT, lengths[batches[-1][0]]):
            batches.append([])
        batches[-1].append(number)
    return batches


def in_order(indices: Sequence[int]) -> list[Sequence[int]]:
    """Batches of at most BATCH indices, in their order."""
    return [indices[first:first + BATCH] for first in range(0, len(indices), BATCH)]


def run_batches(run: Callable[[Sequence[int]], Sequence[Any]], batches: Sequence[Sequence[int]],
                device: torch.device) -> Iterator[tuple[int, Any]]:
    """Run batches of indices on a device -> each index with its result.

    On a CPU several batches run at a time, in one thread each. Torch would instead split each operation among as many
    threads: operations are too small for that, and reading media would not run in parallel at all.
    """
    threads = min(torch.get_num_threads(), MOST_THREADS, len(batches)) if device.type == "cpu" else 1
    results = map(run, batches) if threads < 2 else in_threads(run, batches, threads)
    for batch, items in zip(batches, results, strict=True):
        yield from zip(batch, items, strict=True)


def run_each(run: Callable[[Any], Any], items: Sequence[Any], device: torch.device) -> list[Any]:
    """The result of each item, as batches of one."""
    alone = [[number] for number in range(len(items))]
    return [result for _, result in run_batches(lambda chosen: [run(items[number]) for number in chosen], alone, device)]


def run_by_values(run: Callable[[list[Any]], Sequence[Any]], items: Iterable[Any], values: Callable[[Any], int]) -> list[Any]:
    """The results of items in batches of about BATCH_VALUES values; each batch is dropped before the next is read."""
    results: list[Any] = []
    held: list[Any] = []
    for item in items:
        held.append(item)
        if sum(map(values, held)) >= BATCH_VALUES:
            results += run(held)
            held.clear()
    return results + [*run(held)] if held else results
