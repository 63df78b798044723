"""A pretrained language model as the start of an mmtx model: special tokens and codes of media extend its vocabulary."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mmtx.config import CodeRange, DecoderConfig
from mmtx.errors import InputError
from mmtx.files import open_regular, read_text
from mmtx.hub import find_model
from mmtx.interop.chat import chat_format_of
from mmtx.interop.families import read_settings, read_weights
from mmtx.interop.gguf_files import read_gguf
from mmtx.json_files import read_json
from mmtx.modality.base import Tokenizer, load_tokenizer
from mmtx.modality.pretrained_text import TEMPLATE, TOKENIZER, PretrainedText, read_specials
from mmtx.modality.registry import media_kinds
from mmtx.modality.text import MOST_BYTES
from mmtx.model import Decoder
from mmtx.pipeline import Model
from mmtx.saved_folder import CONFIG
from mmtx.schema import shown
from mmtx.shipped_files import find_shipped
from mmtx.vocabulary import Vocabulary
from mmtx.weights import PICKLES

INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"
NOISE = 0.1  # of new rows around the mean of the text rows, in standard deviations of these


def convert(source: str | Path, media: Mapping[str, str | Path] | None = None, seed: int = 0) -> Model:
    """Make a model with ids for media from a pretrained language model.

    Args:
        source: a folder of transformers, a GGUF file, or the name of a model on the Hugging Face hub ("user/model").
        media: folders of tokenizers by kind, "image" and "audio".
        seed: for the noise in the rows of new ids.

    Raises:
        InputError: an unsupported family, a tokenizer that does not fit, tensors that are missing or have other shapes, or a model
            that `export` wrote, whose codes would become pieces of text.
    """
    path = find_model(source)
    gguf = path.suffix == ".gguf"
    if not gguf and path.is_file():
        raise InputError(f"{path}: found a file, expected a folder of transformers, or a file whose name ends in .gguf")
    if not gguf and (path / TOKENIZER).is_file():
        _refuse_own(read_text(path / TOKENIZER, MOST_BYTES), path)
    config, found, text = read_gguf(path) if gguf else read_folder(path)
    _refuse_own(text.content, path)
    text = PretrainedText(text.content, text.size, chat_format_of(text, path), text.chat_template, text.specials, path)
    state = read_weights(config, found, path, gguf)
    tokenizers: dict[str, Tokenizer] = {"text": text}
    for kind, folder in (media or {}).items():
        tokenizers[kind] = load_tokenizer(find_shipped(folder))
        if tokenizers[kind].kind != kind:
            raise InputError(f"--{kind}: {folder} holds a tokenizer for {tokenizers[kind].kind}")
    vocabulary = Vocabulary.build(tokenizers)
    return Model(grow(config, state, vocabulary, text, seed), vocabulary, tokenizers).to("cpu")


def _refuse_own(content: str, path: Path) -> None:
    """Raise InputError for the tokenizer.json of a model that `export` wrote, which names the codes of its media."""
    if own := [kind for kind in media_kinds() if f"<{kind}:0>" in content]:
        raise InputError(f"{path}: found a model that mmtx exported, with codes of {' and '.join(own)}, expected a pretrained one; "
                         "the folder that it was exported from is the model itself")


def read_folder(folder: Path) -> tuple[DecoderConfig, dict[str, Tensor], PretrainedText]:
    """The sizes, tensors and text tokenizer of a folder of transformers."""
    if not (folder / CONFIG).exists() and (folder / ADAPTER).exists():
        raise InputError(f"{folder}: found an adapter of peft, expected a whole model, as `merge_and_unload` makes it")
    values = read_json(folder / CONFIG)
    if not isinstance(values, dict):
        raise InputError(f"{folder / CONFIG}: found {shown(values)}, expected an object")
    if "decoder" in values and "model_type" not in values:
        raise InputError(f"{folder}: found a model of mmtx, expected one of transformers")
    config = read_settings(values, folder / CONFIG)
    names = ["model.safetensors"]
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        weights = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weights, dict) or not all(isinstance(n, str) and Path(n).name == n for n in weights.values()):
            raise InputError(f"{folder / INDEX}: expected a weight_map from tensors to files of the folder")
        names = sorted(set(weights.values()))
    found: dict[str, Tensor] = {}
    for name in names:
        if not os.path.lexists(folder / name) and (pickle := next((p for p in PICKLES if (folder / p).exists()), None)):
            raise InputError(f"{folder / name}: no such file; found {pickle}, a pickle, which is code and is not read")
        os.close(open_regular(folder / name))  # the library would wait forever for a pipe
        try:
            found |= safetensors.torch.load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / name}: not a safetensors file ({str(error)[:80]})") from None
    if config.tied and (output := found.get("lm_head.weight")) is not None:
        # As transformers loads it: training may untie them without a note in config.json.
        embedding = found.get("model.embed_tokens.weight", output)
        config = replace(config, tied=torch.equal(embedding.float(), output.float()))
    template = read_text(folder / TEMPLATE, MOST_BYTES) if (folder / TEMPLATE).exists() else ""
    if not template and (path := folder / "tokenizer_config.json").exists():
        said = read_json(path)
        template = said.get("chat_template") or "" if isinstance(said, dict) else ""
    if isinstance(template, list):  # of named templates, as transformers saved several before it had files for them
        template = next((each.get("template") for each in template if isinstance(each, dict) and each.get("name") == "default"), None)
    if not isinstance(template, str):
        raise InputError(f"{folder}: found no default among several chat templates, expected one, as {TEMPLATE}")
    content = read_text(folder / TOKENIZER, MOST_BYTES)
    text = PretrainedText(content, config.vocabulary_size, None, template, read_specials(folder), folder / TOKENIZER)
    return config, found, text


def grow(config: DecoderConfig, state: Mapping[str, Tensor], vocabulary: Vocabulary, text: PretrainedText,
         seed: int) -> Decoder:
    """The decoder with embedding rows for all ids of a vocabulary: text rows unchanged, new ones near the mean of these.

    A new id then is as likely as the mean of the others, and takes little probability from them. The digit rows of composed ids add
    up to that mean.
    """
    ranges = tuple(CodeRange(vocabulary.range(kind).start, levels) for kind in vocabulary.kinds
                   if (levels := vocabulary.levels(kind)))
    config = replace(config, vocabulary_size=vocabulary.size, composed=ranges)
    decoder = Decoder(config)
    generator, state = torch.Generator().manual_seed(seed), dict(state)
    ends = {vocabulary.eos: text.specials.get("eos_token"), vocabulary.bos: text.specials.get("bos_token")}
    for name in [name for name in ("embedding.weight", "output.weight") if name in state]:
        rows = state[name]
        mean, spread = rows.mean(0), rows.std(0)
        plain = config.plain_rows - len(rows)
        shares = torch.tensor([1.0] * plain + [1 / len(r.levels) for r in ranges for level in r.levels for _ in range(level)])
        noise = torch.randn(len(shares), config.width, generator=generator)
        new = shares[:, None] * mean + NOISE * spread * noise
        for ident, token in ends.items():
            if token is not None and (known := text.id(token)) is not None:
                new[ident - len(rows)] = rows[known]
        state[name] = torch.cat([rows, new])
    decoder.load_state_dict(state)
    return decoder.eval()
