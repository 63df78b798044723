"""Attention of one query per row over the keys and values of a cache.

On one or two CPU threads it uses NumPy's products, one query at a time. GB/s of keys and values read on one core of an AMD
EPYC by NumPy and by torch's attention: 20 and 10 for 16 rows of 6 heads and 75 tokens, 28 and 16 for one row of 1,500 tokens.
In bfloat16 torch reads 3.

Shapes: B batch, T tokens, H heads, G key-value heads, K head width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

THREADS = 2  # torch threads up to which NumPy's products are faster than torch's attention


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries (B, H, K) over keys and values (B, G, T, K), with an additive mask (B, 1, 1, T) -> (B, H * K)."""
    exact, keys, values = (each.to(cache_dtype(query)) for each in (query, keys, values))
    if query.device.type != "cpu" or torch.get_num_threads() > THREADS:
        return decode_attention_torch(exact, keys, values, mask).to(query.dtype)
    grouped = (exact * query.shape[2] ** -0.5).unflatten(1, (keys.shape[1], -1)).numpy()[:, :, :, None]
    found = np.empty_like(grouped)
    added = None if mask is None else mask.numpy()[:, :, None]
    decode_attention_numpy(grouped, keys.numpy()[:, :, None], values.numpy()[:, :, None], found, added)
    return torch.from_numpy(found).flatten(1).to(query.dtype)


def decode_attention_torch(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """`decode_attention` in one operation, for a GPU or a compiler."""
    # The queries of a group share keys and values, so the group takes the place of the query tokens.
    grouped = query.unflatten(1, (keys.shape[1], -1))                                          # (B, G, H / G, K)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1)


def decode_attention_numpy(query: np.ndarray, keys: np.ndarray, values: np.ndarray, out: np.ndarray,
                           mask: np.ndarray | None = None) -> None:
    """`decode_attention` in NumPy, with results in `out`.

    Scaled queries (..., G, H / G, 1, K), keys and values (..., G, 1, T, K), additive mask (..., 1, 1, 1, T), `out` like the queries.
    """
    scores = np.matmul(query, keys.swapaxes(-1, -2))                                           # (..., G, H / G, 1, T)
    if mask is not None:
        scores += mask
    scores -= np.maximum.reduce(scores, -1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= np.add.reduce(scores, -1, keepdims=True)
    np.matmul(scores, values, out=out)


def cache_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which a cache stores what is computed in that of `like`: on a CPU float32 or wider."""
    return torch.promote_types(like.dtype, torch.float32) if like.device.type == "cpu" else like.dtype
