"""Attention over documents of varying length that share the rows of a batch.

Shapes: B batch, T tokens, H heads, G key-value heads, K head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmtx.kernels import attend, pad_input, unpad_input


class Packing(NamedTuple):
    """Where the documents of a packed batch lie, so that attention runs on each document alone.

    Attention then needs no T x T mask: its cost grows with the documents, and nothing can leak between them. Documents are
    grouped by similar length (within a factor of two), so that one long document does not make the short ones expensive.
    """

    gather: Tensor                       # (slots,) indices into the B*T flattened tokens: document after document, group
                                         # after group, each padded with index 0 to the longest of its group
    scatter: Tensor                      # (B*T,) the slot of each token
    groups: tuple[tuple[int, int], ...]  # (documents, slots per document) of each group

    @classmethod
    def of(cls, documents: Tensor) -> "Packing":
        """Build it from document numbers (B, T): equal neighbours in a row belong to one document."""
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
    # The padding follows the tokens of a short document, so a causal mask hides it.
    sizes = [documents * longest for documents, longest in packing.groups]
    query, key, value = (pad_input(part.flatten(0, 1), packing.gather, packing.scatter).split(sizes)
                         for part in (query, key, value))                            # (slots, H | G, K), by group
    outputs = [attend(q.unflatten(0, group), k.unflatten(0, group), v.unflatten(0, group), causal=True).flatten(0, 1)
               for group, q, k, v in zip(packing.groups, query, key, value, strict=True)]
    return unpad_input(torch.cat(outputs), packing.scatter)
