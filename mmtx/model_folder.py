"""The folder of a model: configuration, weights, vocabulary and tokenizers, which must fit together."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mmtx.config import OPTIONAL, DecoderConfig
from mmtx.errors import InputError
from mmtx.files import Content
from mmtx.hub import find_model
from mmtx.json_files import read_json, write_json
from mmtx.modality.base import Tokenizer, load_tokenizer, media_tokenizer
from mmtx.modality.registry import MODALITIES, unknown
from mmtx.saved_folder import CONFIG
from mmtx.schema import build, shown
from mmtx.shipped_files import shipped
from mmtx.vocabulary import Vocabulary
from mmtx.weights import Runs, to_parts

FORMAT = 2
WEIGHTS = "model.safetensors"
DEFAULT_MODEL = "demos/starter"


class ModelParts(NamedTuple):
    """The contents of a model folder except the decoder's weights."""

    config: DecoderConfig
    vocabulary: Vocabulary
    tokenizers: dict[str, Tokenizer]
    folder: Path


def read_model(folder: str | Path | None) -> ModelParts:
    """Read everything in a model folder except the decoder's weights, and check that it fits together.

    None is the model that comes with mmtx. Raises InputError.
    """
    folder = shipped(DEFAULT_MODEL) if folder is None else find_model(folder)
    config = read_model_config(folder)
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    tokenizers = {kind: load_tokenizer(folder / kind) for kind in vocabulary.kinds}
    vocabulary.check(tokenizers)
    if config.vocabulary_size != vocabulary.size:
        raise InputError(f"{folder}: the decoder has {config.vocabulary_size} ids, but its vocabulary {vocabulary.size}")
    for part in config.composed:
        if (part.start, part.levels) not in [(entry.start, entry.levels) for entry in vocabulary.entries]:
            raise InputError(f"{folder}: the decoder composes ids from {part.start} on from other FSQ levels than its vocabulary has")
    for kind, width in config.features.items():
        if kind not in MODALITIES:
            raise unknown(kind, folder / CONFIG)
        encoder, merged = config.encoders.get(kind), math.prod(vocabulary.merge(kind)) if kind in vocabulary.kinds else 1
        found = encoder.width if encoder else getattr(tokenizers.get(kind), "feature_width", 0)
        if width != merged * found:
            many = "" if merged == 1 else f" for each of the {merged} that its vocabulary merges"
            raise InputError(f"{folder}: the decoder takes features of {kind} of width {width}, but its "
                             f"{'encoder' if encoder else 'tokenizer'} gives {found}{many}")
    for entry in vocabulary.entries:
        if entry.merge is not None and entry.kind not in config.features:
            raise InputError(f"{folder}: the vocabulary merges features of {entry.kind}, but the decoder takes none")
    for kind, encoder in config.encoders.items():
        if kind not in tokenizers:
            raise InputError(f"{folder}: the decoder has an encoder for {kind}, but its vocabulary has no {kind} ids")
        given = media_tokenizer(tokenizers, kind).encoder_config
        if encoder.patch != (found := given.patch if given else 0):
            raise InputError(f"{folder}: the decoder takes patches of {kind} of {encoder.patch} values, "
                             f"but its tokenizer gives {found}")
    return ModelParts(config, vocabulary, tokenizers, folder)


def read_model_config(folder: Path) -> DecoderConfig:
    """Read a model's config.json. Raises InputError that says what the folder is instead, or where a model is."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise InputError(f"{folder}: found a file, expected the folder of a model")
    for inner in ("model", "../model"):  # in a run, or next to its checkpoints
        if not path.exists() and (folder / inner / CONFIG).exists():
            raise InputError(f"{path}: no such file; did you mean {(folder / inner).resolve() if '..' in inner else folder / inner}?")
    values = read_json(path)
    if isinstance(values, dict) and "kind" in values and "decoder" not in values:
        raise InputError(f"{folder}: found a tokenizer, expected a model")
    if isinstance(values, dict) and "model_type" in values and "decoder" not in values:
        raise InputError(f"{folder}: found a model of transformers, expected one of mmtx, which mmtx convert makes of it")
    if not isinstance(values, dict) or type(values.get("format")) is not int or values["format"] != FORMAT:
        raise InputError(f"{path}: not a model of mmtx (expected \"format\": {FORMAT})")
    if values.keys() != {"format", "decoder"}:
        raise InputError(f"{path}: found the fields {shown(', '.join(values))}, expected decoder, format")
    return build(DecoderConfig, values["decoder"], path, "decoder", optional=OPTIONAL)


def model_files(config: DecoderConfig, weights: Mapping[str, Runs], vocabulary: Vocabulary,
                tokenizers: Mapping[str, Tokenizer]) -> Iterator[tuple[str, Content]]:
    """The files of a model folder, as names and contents."""
    yield WEIGHTS, to_parts(weights)
    yield CONFIG, write_json({"format": FORMAT, "decoder": config.to_dict()})
    yield "vocabulary.json", vocabulary.to_json()
    for kind, tokenizer in tokenizers.items():
        for name, content in tokenizer.files().items():
            yield f"{kind}/{name}", content
