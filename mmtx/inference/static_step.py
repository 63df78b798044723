"""A decode step as a function of tensors of fixed shapes, to be captured or compiled as a whole.

Shapes: B batch, T tokens, D width, H heads, G key-value heads, C capacity, K head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtx.config import DecoderConfig
from mmtx.inference.cache import CacheTensors, KVCache
from mmtx.inference.cached_attention import decode_attention_torch
from mmtx.inference.weights import Layer, Norm, Weights
from mmtx.model import Decoder


def static_step(config: DecoderConfig, layers: tuple[Layer, ...], norm: Norm, x: Tensor, cache: CacheTensors) -> Tensor:
    """Inputs of one more token per row (B, D) -> its final hidden states (B, D). Updates the cache in place."""
    cos, sin = (each.index_select(0, cache.positions)[:, None] for each in (cache.cos, cache.sin))
    cache.seen.index_fill_(1, cache.slot, True)
    mask = torch.zeros_like(cache.seen, dtype=x.dtype).masked_fill(~cache.seen, -torch.inf)[:, None, None]
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        query, key, value = layer.heads(x, cos, sin, config)
        keys.index_copy_(2, cache.slot, key[:, :, None])
        values.index_copy_(2, cache.slot, value[:, :, None])
        x = layer.output(x, decode_attention_torch(query, keys, values, mask))
    cache.slot.add_(1)
    cache.positions.add_(1)
    return norm.fused(x)


def static_prompts(config: DecoderConfig, layers: tuple[Layer, ...], norm: Norm, x: Tensor, lengths: Tensor,
                   cache: CacheTensors) -> Tensor:
    """Inputs of prompts (B, T, D) of `lengths` (B,), padded on the right -> the final hidden state of each (B, D).

    Their keys and values go to the first slots of the cache, whose other tensors must be set already.
    """
    batch, length, _ = x.shape
    cos, sin = (each[:length].repeat(batch, 1)[:, None] for each in (cache.cos, cache.sin))           # (B*T, 1, K)
    x = x.flatten(0, 1)
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        query, key, value = (each.unflatten(0, (batch, length)).transpose(1, 2) for each in layer.heads(x, cos, sin, config))
        keys[:, :, :length], values[:, :, :length] = key, value
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
        x = layer.output(x, y.transpose(1, 2).flatten(2).flatten(0, 1))
    return norm.fused(x.unflatten(0, (batch, length))[torch.arange(batch, device=x.device), lengths - 1])


def torch_step(decoder: Decoder, weights: Weights, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """`static_step` of a cache as a function of ids (B,)."""
    tensors = cache.tensors()
    return lambda ids: static_step(weights.config, weights.layers, weights.norm, decoder.embedding(ids), tensors)


def compiled_step(decoder: Decoder, weights: Weights, cache: KVCache, backend: str = "inductor") -> Callable[[Tensor], Tensor]:
    """`torch_step` through torch.compile, which takes a minute per shape."""
    tensors = cache.tensors()
    options: dict | None = {"coordinate_descent_tuning": True} if backend == "inductor" else None
    run = torch.compile(static_step, fullgraph=True, dynamic=False, backend=backend, options=options)
    return lambda ids: run(weights.config, weights.layers, weights.norm, decoder.embedding(ids), tensors)
