"""GGUF files of language models, read and written with llama.cpp's package `gguf` (extra `interop`)."""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtx.config import DecoderConfig, RopeScaling
from mmtx.errors import InputError
from mmtx.extras import require
from mmtx.files import open_regular
from mmtx.interop.families import family_named, family_of
from mmtx.modality.pretrained_text import PretrainedText
from mmtx.model import rotary_frequencies
from mmtx.schema import shown, within

CONTROL, USER_DEFINED = 3, 4
NORMAL, UNUSED = 1, 5
# Pre-tokenizers by their names in GGUF: the pattern that splits text before pieces are merged.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {"smollm": None, "gpt-2": "", "qwen2": WORDS % "", "llama-bpe": WORDS % "{1,3}"}
LLAMA_3 = (RopeScaling(8.0), RopeScaling(32.0))  # GGUF stores only the divisors


def library() -> Any:
    return require("gguf", "interop", "GGUF")


def read_gguf(path: Path) -> tuple[DecoderConfig, dict[str, Tensor], PretrainedText]:
    """The sizes, tensors and text tokenizer of a file; tensors are dequantized to float32. Raises InputError."""
    gguf = library()
    os.close(open_regular(path))  # the library would wait forever for a pipe
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise InputError(f"{path}: not a GGUF file ({' '.join(str(error).split())[:80]})") from None

    def read(name: str, kind: type = int, default: Any = None) -> Any:
        if (value := fields.get(name, default)) is None:
            raise InputError(f"{path}: found no field {name}, expected one")
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            raise InputError(f"{path}: field {name} is {shown(value)}, expected {kind.__name__}")
        return value

    family = family_named(fields.get("general.architecture"), path)
    at, shapes = f"{family.name}.", {tensor.name: tensor.shape for tensor in reader.tensors}
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise InputError(f"{path}: found no tensor token_embd.weight of two dimensions, expected one")
    heads, width = read(at + "attention.head_count"), read(at + "embedding_length")
    within(f"{path}: field {at}attention.head_count", heads, 1, 2**12)
    head_dim = read(at + "attention.key_length", default=width // heads)
    if (turned := read(at + "rope.dimension_count", default=head_dim)) != head_dim:
        raise InputError(f"{path}: field {at}rope.dimension_count is {turned}, expected {head_dim}, all of a head")
    if (kind := fields.get(at + "rope.scaling.type")) not in (None, "none"):
        raise InputError(f"{path}: found RoPE scaling {shown(kind)}, expected none or that of Llama 3")
    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise InputError(f"{path}: tensor {tensor.name} is {tensor.tensor_type.name}, which cannot be read") from None
        tensors[tensor.name] = torch.from_numpy(np.array(values, np.float32))
    try:
        config = DecoderConfig(
            vocabulary_size=int(shapes["token_embd.weight"][1]), width=width, depth=read(at + "block_count"), heads=heads,
            kv_heads=read(at + "attention.head_count_kv", default=heads), head_dim=head_dim,
            mlp_dim=read(at + "feed_forward_length"), rope_theta=read(at + "rope.freq_base", float, 10_000.0),
            # Stored as float32; the intended number has few digits.
            norm_eps=float(f"{read(at + 'attention.layer_norm_rms_epsilon', float):.6g}"), tied="output.weight" not in shapes,
            qk_norm=family.qk_norm, qkv_bias=family.qkv_bias)
    except InputError as error:
        raise InputError(f"{error}" if str(error).startswith(str(path)) else f"{path}: {error}") from None
    if (found := tensors.get("rope_freqs.weight")) is not None:
        config = _scaled(config, found, path)
    return config, tensors, _read_tokenizer(fields, config.vocabulary_size, path)


def _scaled(config: DecoderConfig, found: Tensor, path: Path) -> DecoderConfig:
    for scaling in LLAMA_3:
        expected = scaling.divisors(rotary_frequencies(config.head_dim // 2, config.rope_theta))
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4):
            return replace(config, rope_scaling=scaling)
    raise InputError(f"{path}: tensor rope_freqs.weight is of no known RoPE scaling, expected that of Llama 3")


def _read_tokenizer(fields: Mapping[str, Any], size: int, path: Path) -> PretrainedText:
    model, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if model != "gpt2" or not isinstance(cut, str) or cut not in PRE_TOKENIZERS:
        raise InputError(f"{path}: found a text tokenizer {shown(model)} with {shown(cut)}, expected gpt2 with one of "
                         f"{', '.join(PRE_TOKENIZERS)}")
    def read(name: str, kind: type) -> list[Any]:
        found = fields.get(name)
        if not isinstance(found, list) or not all(type(item) is kind for item in found):
            raise InputError(f"{path}: field {name} is {shown(found)}, expected a list of {kind.__name__}")
        return found

    tokens, types = read("tokenizer.ggml.tokens", str), read("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise InputError(f"{path}: field tokenizer.ggml.token_type has {len(types)} values, expected {len(tokens)}, one a token")
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": kind == CONTROL} for i, (token, kind) in enumerate(zip(tokens, types))
             if kind in (CONTROL, USER_DEFINED)]
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": PRE_TOKENIZERS[cut] in (None, "")}
    before = {None: [{"type": "Digits", "individual_digits": True}], "": []}.get(PRE_TOKENIZERS[cut], [
        {"type": "Split", "pattern": {"Regex": PRE_TOKENIZERS[cut]}, "behavior": "Isolated", "invert": False}])
    merges = [merge.split(" ", 1) for merge in read("tokenizer.ggml.merges", str)]
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
               "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
               "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*before, whole]}, "post_processor": None,
               "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
               "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                         "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                         "ignore_merges": cut == "llama-bpe", "vocab": {token: i for i, token in enumerate(tokens)},
                         "merges": merges}}
    specials = {}
    for role in ("bos_token", "eos_token"):
        if (ident := fields.get(f"tokenizer.ggml.{role}_id")) is not None:
            if type(ident) is not int or not 0 <= ident < len(tokens):
                raise InputError(f"{path}: field tokenizer.ggml.{role}_id is {shown(ident)}, expected 0 to {len(tokens) - 1}")
            specials[role] = tokens[ident]
    template = fields.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise InputError(f"{path}: field tokenizer.chat_template is {shown(template)}, expected text")
    return PretrainedText(json.dumps(content, ensure_ascii=False), size, None, template, specials, path)


def write_gguf(path: Path, config: DecoderConfig, size: int, tensors: Iterable[tuple[str, Tensor]],
               pieces: list[tuple[str, int]], scores: list[float] | None, content: Mapping[str, Any],
               specials: Mapping[str, int], template: str, max_seq_len: int) -> None:
    """Write a file for llama.cpp.

    `pieces` are text and type of each of `size` ids, `content` is that of tokenizer.json; SentencePiece's pieces have `scores`.
    """
    gguf, family = library(), family_of(config)
    if config.rope_scaling is not None and family.name != "llama":
        raise InputError(f"gguf: found RoPE scaling in a decoder of {family.name}, expected none (llama.cpp has it for llama)")
    writer = gguf.GGUFWriter(path, family.name)
    writer.add_context_length(max_seq_len)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.depth)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2" if scores is None else "llama")
    writer.add_tokenizer_pre(pre_tokenizer_of(content) if scores is None else "default")
    writer.add_token_list([text for text, _ in pieces])
    writer.add_token_types([kind for _, kind in pieces])
    if scores is None:
        merges = content["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    else:
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(False)
    writer.add_add_bos_token(False)
    for role, ident in specials.items():
        getattr(writer, f"add_{role}_token_id")(ident)
    if template:
        writer.add_chat_template(template)
    if config.rope_scaling is not None:
        frequencies = rotary_frequencies(config.head_dim // 2, config.rope_theta)
        writer.add_tensor("rope_freqs.weight", config.rope_scaling.divisors(frequencies).numpy())
    for name, tensor in tensors:
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pre_tokenizer_of(content: Mapping[str, Any]) -> str:
    """The GGUF name of the pre-tokenizer in tokenizer.json. Raises InputError if it has none."""
    step = content.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    for name, cut in PRE_TOKENIZERS.items():
        first = steps[0]
        if cut is None and first.get("type") == "Digits" and first.get("individual_digits") and len(steps) == 2:
            return name
        if cut == "" and first.get("type") == "ByteLevel" and len(steps) == 1:
            return name
        if cut and first.get("type") == "Split" and first.get("pattern", {}).get("Regex") == cut:
            return name
    raise InputError(f"gguf: found a text tokenizer with another pre-tokenizer, expected one of {', '.join(PRE_TOKENIZERS)}")
