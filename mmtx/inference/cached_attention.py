"""Attention of one query a row to the keys and values of a cache.

On one or two threads of a CPU it is NumPy's products, one query at a time. GB/s of keys and values on one core of an AMD EPYC,
NumPy and torch's attention: 16 rows of 6 heads and 75 tokens 20 and 10, one row of 1,500 tokens 28 and 16. In bfloat16 torch
reads 3.

Shapes: B batch, T tokens, H heads, G key-value heads, K head width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

THREADS = 2  # of torch's, up to which NumPy's products are faster than its attention


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Queries (B, H, K) over keys and values (B, G, T, K), mask (B, 1, 1, T) to be added, or none -> what they found (B, H * K)."""
    exact, keys, values = (each.to(kept(query)) for each in (query, keys, values))
    if query.device.type != "cpu" or torch.get_num_threads() > THREADS:
        return attend_in_torch(exact, keys, values, mask).to(query.dtype)
    grouped = (exact * query.shape[2] ** -0.5).unflatten(1, (keys.shape[1], -1)).numpy()[:, :, :, None]
    found = np.empty_like(grouped)
    added = None if mask is None else mask.numpy()[:, :, None]
    attend_arrays(grouped, keys.numpy()[:, :, None], values.numpy()[:, :, None], found, added)
    return torch.from_numpy(found).flatten(1).to(query.dtype)


def attend_in_torch(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The same in one operation, for a GPU or a compiler."""
    # The queries of a group share keys and values: they take the place of tokens.
    grouped = query.unflatten(1, (keys.shape[1], -1))                                          # (B, G, H / G, K)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1)


def attend_arrays(query: np.ndarray, keys: np.ndarray, values: np.ndarray, out: np.ndarray, mask: np.ndarray | None = None) -> None:
    """Scaled queries (..., G, H / G, 1, K) over keys and values (..., G, 1, T, K), mask (..., 1, 1, 1, T) to be added, or none ->
    what they found, in `out`, as the queries lie."""
    scores = np.matmul(query, keys.swapaxes(-1, -2))                                           # (..., G, H / G, 1, T)
    if mask is not None:
        scores += mask
    scores -= np.maximum.reduce(scores, -1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= np.add.reduce(scores, -1, keepdims=True)
    np.matmul(scores, values, out=out)


def kept(like: Tensor) -> torch.dtype:
    """The type in which a cache keeps what is computed in another: on a CPU float32 at least."""
    return torch.promote_types(like.dtype, torch.float32) if like.device.type == "cpu" else like.dtype
