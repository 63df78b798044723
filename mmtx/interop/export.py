"""Export of a model to other inference engines: a folder of transformers (also read by vLLM and others), or GGUF for llama.cpp."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import safetensors.torch

from mmtx.atomic_folder import replace_folder
from mmtx.errors import InputError
from mmtx.files import user_path
from mmtx.interop.families import write_settings, write_weights
from mmtx.interop.gguf_files import CONTROL, NORMAL, UNUSED, USER_DEFINED, write_gguf
from mmtx.json_files import write_json
from mmtx.modality.pretrained_text import TEMPLATE, TOKENIZER, PretrainedText
from mmtx.modality.text import BYTE, SPACE, UNKNOWN, TextTokenizer
from mmtx.pipeline import Model
from mmtx.saved_folder import CONFIG

MAX_SEQ_LEN = 8192  # context length in tokens, from which engines allocate memory
TAGS = ("{{ '<bos>' }}{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
        "{{ message['content'] }}{{ '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")


def export(model: Model, to: str, output: str | Path, max_seq_len: int = MAX_SEQ_LEN) -> list[str]:
    """Write a model for an engine -> what the engine cannot do with it, one sentence each.

    Args:
        model: any model; ids composed of digits get rows of their own.
        to: "transformers", a folder, or "gguf", a file in float32.
        output: a new folder or file.
        max_seq_len: context length in tokens, from which engines allocate memory.

    Raises:
        InputError: an output that exists, or a decoder or text tokenizer that the format cannot express.
    """
    if to not in ("transformers", "gguf"):
        raise InputError(f"--to: found {to!r}, expected transformers or gguf")
    output = user_path(output)
    if os.path.exists(output):  # also False for names that are not valid
        raise InputError(f"{output}: exists, expected a new {'folder' if to == 'transformers' else 'file'}")
    text, v = model.tokenizers["text"], model.vocabulary
    template = text.chat_template if isinstance(text, PretrainedText) and v.chat_format is not None else TAGS
    content = text_content(model)
    if to == "transformers":
        replace_folder(output, _files(model, content, template, max_seq_len))
    else:
        part = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            pieces = pieces_of(model, content)
            scores = None if isinstance(text, PretrainedText) else [
                cast(TextTokenizer, text)._model.get_score(i) if i < text.size else 0.0 for i in range(v.size)]
            specials = {"eos": v.end, "bos": begin_of(model), "pad": v.pad}
            write_gguf(part, model.decoder.config, v.size, write_weights(model.decoder, gguf=True), pieces, scores, content,
                       specials, template, max_seq_len)
            os.replace(part, output)
        except OSError as error:
            raise InputError(f"{output}: cannot be written ({error.strerror})") from None
        finally:
            with suppress(OSError):
                part.unlink()
    return limitations(model)


def limitations(model: Model) -> list[str]:
    """What an engine that processes only ids cannot do with a model, one sentence each."""
    kinds = list(model.decoder.config.features)
    return [f"{' and '.join(kinds)} given to this model enter as continuous features, which no engine computes: it answers text and "
            "writes codes; one that reads media too takes a model trained with continuous_inputs: false"] if kinds else []


def name_of(model: Model, ident: int) -> str:
    """A unique name for an id that is not a piece of text."""
    name = model.vocabulary.name(ident)
    return name if name.startswith("<") else f"<{name}>"


def begin_of(model: Model) -> int:
    """The id that a chat template calls bos_token: that of the pretrained model, if it has one, else <bos>."""
    text = model.tokenizers["text"]
    known = text.id(text.specials["bos_token"]) if isinstance(text, PretrainedText) and "bos_token" in text.specials else None
    return model.vocabulary.bos if known is None else known


def text_content(model: Model) -> dict[str, Any]:
    """The content of tokenizer.json, with names for all ids."""
    text, size = model.tokenizers["text"], model.vocabulary.size
    content = json.loads(text.content) if isinstance(text, PretrainedText) else _of_sentencepiece(cast(TextTokenizer, text))
    known = {*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])}
    content["added_tokens"] = [*content["added_tokens"], *(
        {"id": ident, "content": name_of(model, ident), "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True} for ident in range(size) if ident not in known)]
    return content


def _of_sentencepiece(text: TextTokenizer) -> dict[str, Any]:
    """The pieces and merges in the form of tokenizer.json. Pieces that are merged earlier have higher scores."""
    vocabulary = {text.piece(ident): ident for ident in range(text.size)}
    normal = {piece: ident for piece, ident in vocabulary.items() if not text._model.is_byte(ident)
              and not text._model.is_unknown(ident) and not text._model.is_control(ident)}
    merges = [(text._model.get_score(ident), [piece[:at], piece[at:]]) for piece, ident in normal.items()
              for at in range(1, len(piece)) if piece[:at] in normal and piece[at:] in normal]
    merges.sort(key=lambda merge: -merge[0])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": replaced,
            "pre_tokenizer": None, "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                      "vocab": vocabulary, "merges": [merge for _, merge in merges]}}


def pieces_of(model: Model, content: dict[str, Any]) -> list[tuple[str, int]]:
    """The text and the GGUF type of every id."""
    text = model.tokenizers["text"]
    pieces = [("", UNUSED)] * model.vocabulary.size
    for piece, ident in content["model"]["vocab"].items():
        kind = NORMAL
        if isinstance(text, TextTokenizer):
            kind = BYTE if text._model.is_byte(ident) else UNKNOWN if text._model.is_unknown(ident) else NORMAL
        pieces[ident] = piece, kind
    for token in content["added_tokens"]:
        pieces[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return pieces


def _files(model: Model, content: dict[str, Any], template: str, max_seq_len: int) -> Iterator[tuple[str, bytes]]:
    v, text = model.vocabulary, cast(TextTokenizer | PretrainedText, model.tokenizers["text"])
    name = lambda ident: text.piece(ident) if ident < text.size else name_of(model, ident)
    yield "model.safetensors", safetensors.torch.save(dict(write_weights(model.decoder)), {"format": "pt"})
    bos = begin_of(model)
    ids = {"bos_token_id": bos, "eos_token_id": v.end, "pad_token_id": v.pad}
    yield CONFIG, write_json({**write_settings(model.decoder.config, max_seq_len), **ids})
    yield "generation_config.json", write_json({**ids, "do_sample": False})
    yield TOKENIZER, json.dumps(content, ensure_ascii=False).encode()
    yield "tokenizer_config.json", write_json({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": name(bos), "eos_token": name(v.end), "pad_token": name(v.pad),
        "clean_up_tokenization_spaces": False, "model_max_length": max_seq_len})
    yield TEMPLATE, template.encode()
    yield "vocabulary.json", v.to_json()
