"""Attention over documents of many lengths that share the rows of a batch.

Shapes: B batch, T tokens, H heads, G key-value heads, K head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmtx.kernels import attend, pad_input, unpad_input


class Packing(NamedTuple):
    """Where the documents of a packed batch lie, so that attention runs on each document alone.

    Attention then needs no mask of T x T: its cost grows with the documents, and a leak is impossible. Documents go
    in groups of similar length (a factor of two), so that one long document does not make the short ones dear.
    """

    gather: Tensor                       # (slots,) indices into the B*T flat tokens: documents of one length after another,
                                         # the shorter ones of a group padded with 0
    scatter: Tensor                      # (B*T,) the slot of each token
    groups: tuple[tuple[int, int], ...]  # documents and slots of each, for each group

    @classmethod
    def of(cls, documents: Tensor) -> "Packing":
        """Build it from document numbers (B, T): equal neighbours in a row belong together."""
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        first = starts.flatten().nonzero().squeeze(1)                      # (documents,)
        length = torch.diff(first, append=first.new_tensor([documents.numel()]))
        group = length.double().log2().ceil()
        scatter = torch.empty(documents.numel(), dtype=torch.long, device=documents.device)
        gathers, groups, base = [], [], 0
        for number in group.unique():
            begin, size = first[group == number], length[group == number]
            offset = torch.arange(int(size.max()), device=documents.device)
            real = offset < size[:, None]                                  # (documents, longest)
            tokens = begin[:, None] + offset
            slots = base + torch.arange(real.numel(), device=documents.device).view_as(real)
            scatter[tokens[real]] = slots[real]
            gathers.append(torch.where(real, tokens, 0).flatten())
            groups.append((real.shape[0], real.shape[1]))
            base += real.numel()
        return cls(torch.cat(gathers), scatter, tuple(groups))


def attend_documents(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """Causal attention within each document: queries (B, T, H, K) over keys and values (B, T, G, K) -> (B*T, H, K)."""
    # Causal attention never looks right, so the padding behind a short document is never seen.
    sizes = [documents * longest for documents, longest in packing.groups]
    query, key, value = (pad_input(part.flatten(0, 1), packing.gather, packing.scatter).split(sizes)
                         for part in (query, key, value))                            # (slots, H | G, K), by group
    outputs = [attend(q.unflatten(0, group), k.unflatten(0, group), v.unflatten(0, group), causal=True).flatten(0, 1)
               for group, q, k, v in zip(packing.groups, query, key, value, strict=True)]
    return unpad_input(torch.cat(outputs), packing.scatter)
