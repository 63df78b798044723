"""The decoder with which a training begins: a finished model, or a new one, with encoders that may have been trained elsewhere."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from mmtx.config import DecoderConfig, EfficientNetConfig, EncoderConfig
from mmtx.errors import InputError
from mmtx.hub import find_model
from mmtx.modality.autoencoder import Codec
from mmtx.modality.base import MediaTokenizer, Tokenizer, media_tokenizer
from mmtx.modality.efficientnet import PretrainedEncoder, is_encoder, read_encoder
from mmtx.modality.encoder import build_encoder
from mmtx.model import Decoder, initialise
from mmtx.model_folder import WEIGHTS, ModelParts, read_model
from mmtx.training.memory import releasing_memory
from mmtx.training.mup import rescale
from mmtx.training.quantize import quantize_layer
from mmtx.vocabulary import Vocabulary
from mmtx.weights import load_module


@dataclass
class InitialDecoder:
    """Options of `DecoderModule` that determine the decoder before its first step."""

    init_from: str | Path | None
    encoders_from: str | None
    image_encoder: str | None
    continuous_inputs: bool
    train_encoder: bool
    load_in_4bit: bool
    mup_base_width: int | None
    finished: Path | None = None  # `init_from` if it comes from `restore`: all must be the same

    def check_folders(self) -> None:
        """Raise InputError for a folder without a model."""
        for name, read in (("init_from", read_model), ("encoders_from", read_model), ("image_encoder", find_image_encoder)):
            try:
                if (folder := getattr(self, name)) is not None:
                    read(folder)
            except InputError as error:
                if self.finished:
                    raise
                option = "" if str(error).startswith(name) else f"model.init_args.{name}: "
                raise InputError(f"{option}{error}; a resumed run needs it as well, since checkpoints lack its sizes") from None

    def restore(self, folder: Path) -> None:
        """Begin with the finished model in a folder; it must match the configuration and the tokenizers."""
        self.init_from = self.finished = folder
        self.encoders_from = self.image_encoder = None

    def build(self, config: DecoderConfig, tokenizers: Mapping[str, Tokenizer], vocabulary: Vocabulary,
              announce: Callable[[str], None]) -> Decoder:
        """The decoder, whose configuration also has its features and encoders; `announce` is told of an encoder that is replaced."""
        codecs = {kind: media_tokenizer(tokenizers, kind) for kind, tokenizer in tokenizers.items() if tokenizer.levels}
        before = None if self.init_from is None else read_model(self.init_from)
        trained = self._trained_encoders(codecs) if self.train_encoder else {}
        encoders = _encoder_configs(codecs, trained, before) if self.train_encoder else {}
        widths = {kind: math.prod(vocabulary.merge(kind)) * (encoders[kind].width if encoders else codec.feature_width)
                  for kind, codec in codecs.items()}
        config = replace(config, features=widths if self.continuous_inputs else {}, encoders=encoders)
        if before is None:
            decoder = Decoder(config, build_encoder)
            _copy_encoders(decoder, tokenizers, config.encoders)
            if self.mup_base_width is not None:
                rescale(decoder, self.mup_base_width)
        else:
            decoder = self._adopt(before, config, tokenizers, vocabulary, announce)
        for kind, encoder in trained.items():
            decoder.encoders[kind].load_state_dict(encoder.weights)
            if encoder.projection and (fitting := _repeated(encoder.projection, cast(nn.Linear, decoder.projections[kind]))):
                decoder.projections[kind].load_state_dict(fitting)
        return decoder

    def _trained_encoders(self, codecs: Mapping[str, MediaTokenizer]) -> dict[str, PretrainedEncoder]:
        """Pretrained encoders by kind: those of `encoders_from` and `image_encoder`."""
        for kind in (kind for kind, codec in codecs.items() if codec.encoder_config is None):
            raise InputError(f"train_encoder: found a {kind} tokenizer without an encoder that trains, expected a codec of mmtx")
        found: dict[str, PretrainedEncoder] = {}
        if self.image_encoder is not None:
            if "image" not in codecs:
                raise InputError("image_encoder: found one, expected none: there is no tokenizer of pictures")
            found["image"] = image_encoder_in(self.image_encoder, codecs["image"])
        others = {kind: codec for kind, codec in codecs.items() if kind not in found}
        if self.encoders_from is not None and others:
            found |= {kind: PretrainedEncoder(encoder.config, encoder.weights)
                      for kind, encoder in encoders_of(read_model(self.encoders_from), others, "encoders_from").items()}
        return found

    def _merges(self, kind: str, model: ModelParts, vocabulary: Vocabulary) -> bool:
        """Whether features of `kind` are merged from now on. Raises InputError if the model has merged others already."""
        before = model.vocabulary.merge(kind) if kind in model.vocabulary.kinds else (1, 1)
        now = vocabulary.merge(kind)
        if now != before and (self.finished or before != (1, 1)):
            raise InputError(f"{self.finished or 'init_from'}: found merge_size {list(before)} of {kind}, expected {list(now)}")
        return now != before

    def _adopt(self, model: ModelParts, config: DecoderConfig, tokenizers: Mapping[str, Tokenizer], vocabulary: Vocabulary,
               announce: Callable[[str], None]) -> Decoder:
        """The decoder of a finished model, in the precision of the run; with `load_in_4bit`, each layer is quantized once read."""
        where = self.finished or "init_from"
        given, wanted = asdict(model.config), asdict(config)
        new = {"image"} if self.image_encoder is not None and given["features"] else set()
        if new:
            announce(f"{self.image_encoder} replaces the image encoder of {where}")
        # A model of codes alone may be given projections of features, and one without encoders may be given the codecs', which made
        # the features that it has learnt to read.
        added = {name for name in ("features", "encoders") if wanted[name] and not given[name] and self.finished is None}
        free = added if self.finished else {*added, "ctc_blocks"}  # which has no weights
        merged = set() if added else {kind for kind in wanted["features"] if self._merges(kind, model, vocabulary)} - new
        for name, value in wanted.items():
            if name in ("features", "encoders") and name not in free:
                others = {*given[name], *value} - new - (merged if name == "features" else set())
                alike = all(given[name].get(kind) == value.get(kind) for kind in others)
            else:
                alike = given[name] == value or name in free
            if not alike:
                raise InputError(f"{where}: found {name} {given[name]}, expected {value}")
        same = self.finished or added == {"encoders"}
        for kind, tokenizer in tokenizers.items() if same else [("text", tokenizers["text"])]:
            found, expected = model.tokenizers[kind].fingerprint[:12], tokenizer.fingerprint[:12]
            if found != expected:
                raise InputError(f"{where}: found {'an' if kind[0] in 'aeiou' else 'a'} {kind} tokenizer of fingerprint {found}, "
                                 f"expected {expected}, tokenizers.{kind}")
        with releasing_memory():
            decoder = load_module(lambda: Decoder(model.config, build_encoder), model.folder / WEIGHTS,
                                  quantize_layer if self.load_in_4bit else None)
        decoder.config = config
        blank = {*config.features} if "features" in added else new
        decoder.projections.update({kind: nn.Linear(config.features[kind], config.width) for kind in sorted(blank)})
        for kind in sorted(blank):
            initialise(decoder.projections[kind], config.depth)
        for kind in merged:
            before, after = decoder.projections[kind], nn.Linear(config.features[kind], config.width)
            after.load_state_dict(cast(dict, _repeated(before.state_dict(), after)))
            decoder.projections[kind] = after
        fresh = {*config.encoders} if "encoders" in added else new
        decoder.encoders.update({kind: build_encoder(config.encoders[kind]) for kind in sorted(fresh)})
        _copy_encoders(decoder, tokenizers, sorted(fresh))
        return decoder


def _repeated(projection: Mapping[str, Tensor], layer: nn.Linear) -> dict[str, Tensor] | None:
    """The weights of a projection for a layer whose input is several features side by side: their mean is projected. None: no fit."""
    (rows, columns), times = projection["weight"].shape, layer.in_features // projection["weight"].shape[1]
    if (rows, columns * times) != (layer.out_features, layer.in_features):
        return None
    return {"weight": projection["weight"].repeat(1, times) / times, "bias": projection["bias"]}


def _encoder_configs(codecs: Mapping[str, MediaTokenizer], trained: Mapping[str, PretrainedEncoder],
                     before: ModelParts | None) -> dict[str, EncoderConfig | EfficientNetConfig]:
    """Configurations of all encoders: pretrained ones, else those of the model in `init_from`, else the codecs'."""
    made = {} if before is None else before.config.encoders
    found = {}
    for kind, codec in codecs.items():
        own = made[kind] if kind in made and made[kind].patch == codec.encoder_config.patch else codec.encoder_config
        found[kind] = trained[kind].config if kind in trained else own
    return found


def _copy_encoders(decoder: Decoder, tokenizers: Mapping[str, Tokenizer], kinds: Iterable[str]) -> None:
    """Initialise encoders from the codecs' if their configurations are equal; the others keep their random weights."""
    for kind in kinds:
        codec = cast(Codec, tokenizers[kind])
        if decoder.config.encoders[kind] == codec.encoder_config:
            weights, encoder = codec.network.state_dict(), decoder.encoders[kind]
            encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})


def image_encoder_in(folder: str, codec: MediaTokenizer) -> PretrainedEncoder:
    """Read the image encoder in a folder. Raises InputError if there is none that takes the codec's patches."""
    found = find_image_encoder(folder)
    if isinstance(found, Path):
        return read_encoder(found, codec.encoder_config.patch)
    return encoders_of(found, {"image": codec}, "image_encoder")["image"]


def find_image_encoder(folder: str) -> Path | ModelParts:
    """The folder of an image encoder alone, or else the model in it. Raises InputError if it holds neither."""
    path = find_model(folder)
    if is_encoder(path):
        return path
    try:
        return read_model(path)
    except InputError as error:
        raise InputError(f"image_encoder: {error}; or an encoder of pictures alone") from None


def encoders_of(model: ModelParts, codecs: Mapping[str, MediaTokenizer], option: str) -> dict[str, PretrainedEncoder]:
    """The encoders of a finished model for the patches of these codecs. Raises InputError that names `option` if one is missing."""
    for kind, codec in codecs.items():
        config, expected = model.config.encoders.get(kind), codec.encoder_config.patch
        if config is None or config.patch != expected:
            found = f"an encoder for patches of {config.patch} numbers" if config else "no encoder"
            raise InputError(f"{option}: {model.folder}: found {found} for {kind}, expected one for patches of {expected} numbers, "
                             f"as tokenizers.{kind} makes them")
    decoder = load_module(lambda: Decoder(model.config, build_encoder), model.folder / WEIGHTS)
    return {kind: PretrainedEncoder(model.config.encoders[kind], decoder.encoders[kind].state_dict(),
                                    decoder.projections[kind].state_dict()) for kind in codecs}
