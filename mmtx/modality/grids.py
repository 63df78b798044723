"""The concatenated grids of patches of a batch, of which those of equal size share a pass through a network.

Shapes: B batch, h rows and w columns of a grid of patches, P numbers in a patch, D width.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor


def starts_by_size(grids: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """(rows, columns) -> index of the first patch of each grid of that size, among all patches of the concatenated grids."""
    starts: dict[tuple[int, int], list[int]] = defaultdict(list)
    for (rows, columns), first in zip(grids, accumulate((rows * columns for rows, columns in grids), initial=0)):
        starts[rows, columns].append(first)
    return starts


def by_size(patches: Tensor, grids: Sequence[tuple[int, int]], network: Callable[[Tensor], Tensor], at_once: int) -> Tensor:
    """Patches (n, P) of grids, row by row -> features (n, D) by `network`, which maps (B, h, w, P) to (B, h, w, D).

    A pass has at most `at_once` patches, or one grid.
    """
    order, parts = [], []
    for (rows, columns), firsts in starts_by_size(grids).items():
        places = torch.tensor(firsts)[:, None] + torch.arange(rows * columns)
        chosen = patches[places.to(patches.device, non_blocking=True)].unflatten(1, (rows, columns))
        parts += [network(some).flatten(0, 2) for some in chosen.split(max(1, at_once // (rows * columns)))]
        order.append(places.flatten())
    return torch.cat(parts)[torch.cat(order).argsort().to(patches.device, non_blocking=True)]
