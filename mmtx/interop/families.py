"""The families of pretrained language models: the decoder's options that give each, and the names of its tensors.

Shapes: D width, H heads, G key-value heads, K head width, R rows of an embedding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mmtx.config import DecoderConfig, RopeScaling
from mmtx.embedding import TokenEmbedding
from mmtx.errors import InputError
from mmtx.model import Decoder
from mmtx.schema import WHOLE, shown


@dataclass(frozen=True)
class Family:
    """One architecture; `name` is its `model_type` in transformers and its architecture in GGUF."""

    name: str
    architecture: str   # class in transformers
    qk_norm: bool
    qkv_bias: bool
    interleaved: bool   # GGUF stores query and key rows such that rotary pairs are adjacent


FAMILIES = {family.name: family for family in (
    Family("llama", "LlamaForCausalLM", qk_norm=False, qkv_bias=False, interleaved=True),
    Family("qwen2", "Qwen2ForCausalLM", qk_norm=False, qkv_bias=True, interleaved=False),
    Family("qwen3", "Qwen3ForCausalLM", qk_norm=True, qkv_bias=False, interleaved=False),
)}

# (name in the decoder, part of a fused projection, name in transformers, name in GGUF), outside of blocks and in each block
OUTSIDE = (("embedding", None, "model.embed_tokens", "token_embd"), ("norm", None, "model.norm", "output_norm"),
           ("output", None, "lm_head", "output"))
BLOCK = (
    ("attention_norm", None, "input_layernorm", "attn_norm"),
    ("attention.qkv", 0, "self_attn.q_proj", "attn_q"),
    ("attention.qkv", 1, "self_attn.k_proj", "attn_k"),
    ("attention.qkv", 2, "self_attn.v_proj", "attn_v"),
    ("attention.query_norm", None, "self_attn.q_norm", "attn_q_norm"),
    ("attention.key_norm", None, "self_attn.k_norm", "attn_k_norm"),
    ("attention.out", None, "self_attn.o_proj", "attn_output"),
    ("feed_forward_norm", None, "post_attention_layernorm", "ffn_norm"),
    ("feed_forward.gate_up", 0, "mlp.gate_proj", "ffn_gate"),
    ("feed_forward.gate_up", 1, "mlp.up_proj", "ffn_up"),
    ("feed_forward.down", None, "mlp.down_proj", "ffn_down"),
)


def family_named(name: Any, where: Any) -> Family:
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"{where}: found the family {shown(name)}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(config: DecoderConfig) -> Family:
    """The family that a decoder belongs to. Raises InputError if its options fit none."""
    for family in FAMILIES.values():
        if (family.qk_norm, family.qkv_bias) == (config.qk_norm, config.qkv_bias):
            return family
    raise InputError(f"decoder: found qk_norm={config.qk_norm} with qkv_bias={config.qkv_bias}, which no family of "
                     f"{', '.join(FAMILIES)} has")


# -- Configurations of transformers --------------------------------------------------------------------------


def read_settings(values: Mapping[str, Any], where: Any) -> DecoderConfig:
    """Read the config.json of transformers. Raises InputError if no decoder here implements it."""
    family = family_named(values.get("model_type"), where)

    def read(name: str, kind: type = int, default: Any = None, values: Mapping[str, Any] = values) -> Any:
        value = values.get(name, default)
        value = default if value is None else value
        if kind is float and type(value) is int and abs(value) < WHOLE:
            value = float(value)
        if type(value) is not kind:
            raise InputError(f"{where}: field {name!r} is {shown(value)}, expected {kind.__name__}")
        return value

    for name, fixed in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False), ("attention_bias", False),
                        ("quantization_config", None)):
        if values.get(name, fixed) != fixed:
            raise InputError(f"{where}: field {name!r} is {shown(values[name])}, expected {fixed!r}")
    width, heads = read("hidden_size"), read("num_attention_heads")
    if heads < 1:
        raise InputError(f"{where}: field 'num_attention_heads' is {heads}, expected 1 or more")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: field 'rope_parameters' is {shown(rope)}, expected an object")
    try:
        return DecoderConfig(
            vocabulary_size=read("vocab_size"), width=width, depth=read("num_hidden_layers"), heads=heads,
            kv_heads=read("num_key_value_heads", default=heads), head_dim=read("head_dim", default=width // heads),
            mlp_dim=read("intermediate_size"), rope_theta=read("rope_theta", float, read("rope_theta", float, 10_000.0), rope),
            norm_eps=read("rms_norm_eps", float, 1e-6), tied=read("tie_word_embeddings", bool, False),
            qk_norm=family.qk_norm, qkv_bias=family.qkv_bias, rope_scaling=_read_scaling(rope, where))
    except InputError as error:
        raise InputError(f"{error}" if str(error).startswith(str(where)) else f"{where}: {error}") from None


def _read_scaling(rope: Mapping[str, Any], where: Any) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind != "llama3" or not all(type(rope.get(name)) in (int, float) and abs(rope[name]) < WHOLE for name in names):
        raise InputError(f"{where}: found RoPE scaling {shown(kind)}, expected none or llama3 with {', '.join(names)}")
    factor, low, high, length = (rope[name] for name in names)
    return RopeScaling(float(factor), float(low), float(high), int(length))


def write_settings(config: DecoderConfig, max_seq_len: int) -> dict[str, Any]:
    """The content of config.json for transformers; `max_seq_len` is the context length in tokens."""
    family, scaling = family_of(config), config.rope_scaling
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_frequency,
                 "high_freq_factor": scaling.high_frequency, "original_max_position_embeddings": scaling.original_context}
    return {"architectures": [family.architecture], "model_type": family.name, "vocab_size": config.vocabulary_size,
            "hidden_size": config.width, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "intermediate_size": config.mlp_dim,
            "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied, "dtype": "float32",
            "max_position_embeddings": max_seq_len, "rope_theta": config.rope_theta, "rope_parameters": rope,
            **({"rope_scaling": rope} if scaling is not None else {})}


# -- Tensors -------------------------------------------------------------------------------------------------


def sizes_of(config: DecoderConfig, name: str) -> tuple[int, ...]:
    """Numbers of rows of the parts of a fused projection."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return (query, key, key) if name == "attention.qkv" else (config.mlp_dim, config.mlp_dim)


def names(config: DecoderConfig, gguf: bool) -> Iterator[tuple[str, int | None, str]]:
    """(name in the decoder, part of a fused projection, external name) of each tensor of a decoder with a plain vocabulary."""
    pick = 3 if gguf else 2
    for row in OUTSIDE:
        if row[0] != "output" or not config.tied:
            yield f"{row[0]}.weight", None, f"{row[pick]}.weight"
    for number in range(config.depth):
        elsewhere = f"blk.{number}" if gguf else f"model.layers.{number}"
        for row in BLOCK:
            if row[0].endswith(("query_norm", "key_norm")) and not config.qk_norm:
                continue
            for kind in ("weight", "bias") if row[0] == "attention.qkv" and config.qkv_bias else ("weight",):
                yield f"blocks.{number}.{row[0]}.{kind}", row[1], f"{elsewhere}.{row[pick]}.{kind}"


def read_weights(config: DecoderConfig, found: Mapping[str, Tensor], where: Any, gguf: bool = False) -> dict[str, Tensor]:
    """Tensors of a pretrained model -> the decoder's state dict. Raises InputError if one is missing or does not fit."""
    with torch.device("meta"):
        expected = Decoder(config).state_dict()
    parts: dict[str, list[Tensor]] = {}
    wanted = list(names(config, gguf))
    for ours, part, theirs in wanted:
        shape = list(expected[ours].shape)
        if part is not None:
            shape[0] = sizes_of(config, ours.split(".", 2)[2].rsplit(".", 1)[0])[part]
        if theirs not in found:
            raise InputError(f"{where}: found no tensor {theirs}, expected one of {tuple(shape)}")
        tensor = found[theirs]
        if list(tensor.shape) != shape:
            raise InputError(f"{where}: tensor {theirs} is {tuple(tensor.shape)}, expected {tuple(shape)}")
        if not tensor.is_floating_point():
            raise InputError(f"{where}: tensor {theirs} is {tensor.dtype}, expected floats")
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise InputError(f"{where}: tensor {theirs} holds values that are not finite")
        if gguf and family_of(config).interleaved and part in (0, 1) and "qkv" in ours:
            tensor = interleave(tensor, config.head_dim, back=True)
        parts.setdefault(ours, []).append(tensor)
    unknown = sorted(found.keys() - {theirs for *_, theirs in wanted}
                     - {"lm_head.weight", "output.weight", "rope_freqs.weight"})
    if unknown := [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]:
        raise InputError(f"{where}: found the tensor {shown(unknown[0])}, expected only those of {family_of(config).name}")
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in parts.items()}


def write_weights(decoder: Decoder, gguf: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a decoder by their external names, with composed rows written out."""
    config, state = decoder.config, decoder.state_dict()
    for ours, part, theirs in names(config, gguf):
        if ours in ("embedding.weight", "output.weight"):
            table = cast(TokenEmbedding, decoder.get_submodule(ours.split(".")[0]))
            yield theirs, table.matrix().detach().contiguous()
            continue
        tensor = state[ours]
        if part is not None:
            tensor = tensor.split(sizes_of(config, ours.split(".", 2)[2].rsplit(".", 1)[0]))[part]
        if gguf and family_of(config).interleaved and part in (0, 1) and "qkv" in ours:
            tensor = interleave(tensor, config.head_dim)
        yield theirs, tensor.contiguous()


def interleave(rows: Tensor, head_dim: int, back: bool = False) -> Tensor:
    """Rows (H * K, ...) of query or key heads: rotary pairs across the halves of a head -> adjacent pairs, or `back`."""
    heads = rows.unflatten(0, (-1, head_dim // 2, 2) if back else (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)
