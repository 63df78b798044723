"""The decoder with which a training begins: a finished model, or a new one, with encoders that may have been trained elsewhere."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mmtx.config import AnyEncoderConfig, DecoderConfig, EncoderConfig, MobileNetConfig
from mmtx.errors import InputError
from mmtx.hub import find_model
from mmtx.modality.audio import AudioTokenizer
from mmtx.modality.autoencoder import Codec
from mmtx.modality.base import MediaTokenizer, Tokenizer, media_tokenizer
from mmtx.modality.encoder import build_encoder
from mmtx.modality.pretrained_encoder import (
    MEDIA,
    PretrainedEncoder,
    beside_patches,
    is_encoder,
    read_audio_encoder,
    read_image_encoder,
)
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
    audio_encoder: str | None
    continuous_inputs: bool
    train_encoder: bool
    load_in_4bit: bool
    mup_base_width: int | None
    finished: Path | None = None  # `init_from` if it comes from `restore`: all must be the same

    def check_folders(self) -> None:
        """Raise InputError for a folder without a model."""
        readers: dict[str, Callable[[str], object]] = {
            "init_from": read_model, "encoders_from": read_model, "image_encoder": partial(find_encoder, kind="image"),
            "audio_encoder": partial(find_encoder, kind="audio")}
        for name, read in readers.items():
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
        self.encoders_from = self.image_encoder = self.audio_encoder = None

    def build(self, config: DecoderConfig, tokenizers: Mapping[str, Tokenizer], vocabulary: Vocabulary,
              announce: Callable[[str], None]) -> Decoder:
        """The decoder, whose configuration also has its features and encoders; `announce` is told of an encoder that is replaced."""
        codecs = {kind: media_tokenizer(tokenizers, kind) for kind, tokenizer in tokenizers.items() if tokenizer.levels}
        before = None if self.init_from is None else read_model(self.init_from)
        trained = self._trained_encoders(codecs, before) if self.train_encoder else {}
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
            decoder.encoders[kind].load_state_dict({**decoder.encoders[kind].state_dict(), **encoder.weights})
            if encoder.projection and (fitting := _repeated(encoder.projection, cast(nn.Linear, decoder.projections[kind]))):
                decoder.projections[kind].load_state_dict(fitting)
        return decoder

    @property
    def _given(self) -> dict[str, str]:
        """Folders of pretrained encoders by kind."""
        return {kind: folder for kind, folder in (("image", self.image_encoder), ("audio", self.audio_encoder)) if folder is not None}

    def _trained_encoders(self, codecs: Mapping[str, MediaTokenizer], before: ModelParts | None) -> dict[str, PretrainedEncoder]:
        """Pretrained encoders by kind: those of `encoders_from`, `image_encoder` and `audio_encoder`."""
        for kind in (kind for kind, codec in codecs.items() if codec.encoder_config is None):
            raise InputError(f"train_encoder: found a {kind} tokenizer without an encoder that trains, expected a codec of mmtx")
        found: dict[str, PretrainedEncoder] = {}
        for kind, folder in self._given.items():
            if kind not in codecs:
                raise InputError(f"{kind}_encoder: found one, expected none: there is no tokenizer of {MEDIA[kind]}")
            found[kind] = pretrained_encoder(folder, kind, codecs[kind], None if before is None else before.config.encoders.get(kind))
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
        new = {*self._given} if given["features"] else set()
        for kind in sorted(new):
            announce(f"{self._given[kind]} {'replaces' if kind == 'image' else 'joins'} the {kind} encoder of {where}")
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
        projected = decoder.projections["audio"] if "audio" in new and "audio" in decoder.projections else None
        blank = {*config.features} if "features" in added else new
        decoder.projections.update({kind: nn.Linear(config.features[kind], config.width) for kind in sorted(blank)})
        for kind in sorted(blank):
            initialise(decoder.projections[kind], config.depth)
        for kind in merged:
            before, after = decoder.projections[kind], nn.Linear(config.features[kind], config.width)
            after.load_state_dict(cast(dict, _repeated(before.state_dict(), after)))
            decoder.projections[kind] = after
        fresh = {*config.encoders} if "encoders" in added else new
        heard = decoder.encoders["audio"] if "audio" in new and "audio" in decoder.encoders else None
        decoder.encoders.update({kind: build_encoder(config.encoders[kind]) for kind in sorted(fresh)})
        _copy_encoders(decoder, tokenizers, sorted(fresh))
        if "audio" in new:
            _keep_patches(decoder, model.config, heard, cast("nn.Linear | None", projected))
        return decoder


def _repeated(projection: Mapping[str, Tensor], layer: nn.Linear) -> dict[str, Tensor] | None:
    """The weights of a projection for a layer whose input is several features side by side: their mean is projected. None: no fit."""
    (rows, columns), times = projection["weight"].shape, layer.in_features // projection["weight"].shape[1]
    if (rows, columns * times) != (layer.out_features, layer.in_features):
        return None
    return {"weight": projection["weight"].repeat(1, times) / times, "bias": projection["bias"]}


def _keep_patches(decoder: Decoder, before: DecoderConfig, encoder: nn.Module | None, projection: nn.Linear | None) -> None:
    """Give a decoder, whose sounds now go through another network as well, what it has learned to hear without that.

    Projections of the new features begin at 0, so that at first nothing changes.
    """
    config = decoder.config.encoders["audio"]
    if not isinstance(config, MobileNetConfig) or projection is None:
        return
    old_width = config.patches.width
    if encoder is not None:
        old = before.encoders["audio"]
        if _patches_of(old) != config.patches:
            return
        old_width = old.width
        patches = cast(nn.Module, encoder.patches if isinstance(old, MobileNetConfig) else encoder)
        cast(nn.Module, decoder.encoders["audio"].patches).load_state_dict(patches.state_dict())
    layer = cast(nn.Linear, decoder.projections["audio"])
    times = layer.in_features // config.width
    known = _repeated(projection.state_dict(), nn.Linear(times * old_width, layer.out_features, device="meta"))
    if known is not None:
        with torch.no_grad():
            weight = layer.weight.zero_().view(layer.out_features, times, config.width)
            weight[..., :config.patches.width] = known["weight"].view(len(weight), times, old_width)[..., :config.patches.width]
            layer.bias.copy_(known["bias"])


def _patches_of(config: AnyEncoderConfig | None) -> EncoderConfig | None:
    """Sizes of the patch encoder that an encoder of sounds is or contains."""
    config = config.patches if isinstance(config, MobileNetConfig) else config
    return config if isinstance(config, EncoderConfig) else None


def _encoder_configs(codecs: Mapping[str, MediaTokenizer], trained: Mapping[str, PretrainedEncoder],
                     before: ModelParts | None) -> dict[str, AnyEncoderConfig]:
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
        codec, config, encoder = cast(Codec, tokenizers[kind]), decoder.config.encoders[kind], decoder.encoders[kind]
        if isinstance(config, MobileNetConfig):
            config, encoder = config.patches, cast(nn.Module, encoder.patches)
        if config == codec.encoder_config:
            weights = codec.network.state_dict()
            encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})


def pretrained_encoder(folder: str, kind: str, codec: MediaTokenizer, before: AnyEncoderConfig | None = None) -> PretrainedEncoder:
    """Read the encoder of pictures or sounds in a folder. Raises InputError if there is none that takes the codec's patches.

    One of sounds stands beside an encoder of patches: that of the model `before`, or else the codec's.
    """
    found, patches = find_encoder(folder, kind), codec.encoder_config
    there = None if isinstance(found, Path) else found.config.encoders.get(kind)
    if not isinstance(found, Path) and not (isinstance(there, MobileNetConfig) and there.patch != patches.patch):
        return encoders_of(found, {kind: codec}, f"{kind}_encoder")[kind]
    if kind == "image":
        return read_image_encoder(cast(Path, found), patches.patch)
    if not isinstance(codec, AudioTokenizer):
        raise InputError("audio_encoder: found one, expected none: tokenizers.audio does not make spectrograms")
    own = _patches_of(before)
    own = own if own is not None and own.patch == patches.patch else patches
    if isinstance(found, Path):
        return read_audio_encoder(found, own, codec.config)
    # A model of another audio tokenizer: its network hears the spectrograms of this one, too.
    config = beside_patches(cast(MobileNetConfig, there), own, codec.config, found.folder)
    encoder = load_module(lambda: Decoder(found.config, build_encoder), found.folder / WEIGHTS).encoders[kind]
    return PretrainedEncoder(config, {name: weight for name, weight in encoder.state_dict().items() if name.startswith("network.")})


def find_encoder(folder: str, kind: str) -> Path | ModelParts:
    """The folder of an encoder alone, or else the model in it. Raises InputError if it holds neither."""
    path = find_model(folder)
    if is_encoder(path):
        return path
    try:
        return read_model(path)
    except InputError as error:
        raise InputError(f"{kind}_encoder: {error}; or an encoder of {MEDIA[kind]} alone") from None


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
