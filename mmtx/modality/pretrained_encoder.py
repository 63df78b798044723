"""Pretrained encoders of pictures and sounds in folders of their own, with which the training of a decoder may begin."""

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from mmtx.config import AnyEncoderConfig, EfficientNetConfig, EfficientNetShape, EncoderConfig, MobileNetConfig, MobileNetShape
from mmtx.errors import InputError
from mmtx.json_files import read_json
from mmtx.modality.audio import AudioConfig
from mmtx.modality.efficientnet import EfficientNetEncoder
from mmtx.modality.mobilenet import MobileNet
from mmtx.saved_folder import CONFIG
from mmtx.schema import build
from mmtx.weights import load_module

T = TypeVar("T")

KINDS = {"image": "efficientnet", "audio": "mobilenet"}
MEDIA = {"image": "pictures", "audio": "sounds"}  # in words
SLACK = 1.1  # by how much the bands that a MobileNet was trained on may exceed those of the tokenizer's spectrograms


class PretrainedEncoder(NamedTuple):
    """A pretrained encoder: its sizes, its weights or some of them, and the projection that a decoder learned for it, if any."""

    config: AnyEncoderConfig
    weights: dict[str, Tensor]
    projection: dict[str, Tensor] | None = None


def is_encoder(folder: Path) -> bool:
    """Whether a folder's config.json is that of an encoder alone, not of a model."""
    values = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return isinstance(values, dict) and values.get("kind") in KINDS.values()


def read_image_encoder(folder: Path, patch: int) -> PretrainedEncoder:
    """The EfficientNet in a folder, for patches of `patch` numbers. Raises InputError."""
    shape = _read_shape(folder, "image", EfficientNetShape)
    try:
        config = EfficientNetConfig(shape.stem, shape.stages, patch)
    except InputError as error:
        raise InputError(f"image_encoder: {folder / CONFIG} does not fit tokenizers.image: {error}") from None
    # Built by `load_module`, so that no more is allocated than the file has.
    encoder = load_module(lambda: EfficientNetEncoder(config), folder / "model.safetensors")
    return PretrainedEncoder(config, encoder.state_dict())


def read_audio_encoder(folder: Path, patches: EncoderConfig, audio: AudioConfig) -> PretrainedEncoder:
    """The MobileNet in a folder, to stand beside an encoder of the patches of an audio tokenizer. Raises InputError."""
    config = beside_patches(_read_shape(folder, "audio", MobileNetShape), patches, audio, folder / CONFIG)
    network = load_module(lambda: MobileNet(config), folder / "model.safetensors")
    return PretrainedEncoder(config, {f"network.{name}": weight for name, weight in network.state_dict().items()})


def beside_patches(shape: MobileNetShape, patches: EncoderConfig, audio: AudioConfig, where: Path) -> MobileNetConfig:
    """Sizes of a MobileNet and an encoder of the patches of an audio tokenizer. Raises InputError if its spectrograms do not fit."""
    if audio.low > SLACK * shape.low or audio.high < shape.high / SLACK:
        raise InputError(f"audio_encoder: {where}: found bands of {shape.low:g} to {shape.high:g} Hz, expected no more "
                         f"than the spectrograms of tokenizers.audio have, {audio.low:g} to {audio.high:g} Hz")
    own = {each.name: getattr(shape, each.name) for each in fields(MobileNetShape)}
    return MobileNetConfig(**own, patches=patches, patch_frames=audio.patch_frames, patch_mels=audio.patch_mels,
                           from_low=audio.low, from_high=audio.high)


def _read_shape(folder: Path, kind: str, shape: type[T]) -> T:
    path = folder / CONFIG
    values: Any = read_json(path)
    if not isinstance(values, dict) or values.get("kind") != KINDS[kind]:
        raise InputError(f'{path}: found no "kind": "{KINDS[kind]}", expected the folder of a pretrained encoder of {MEDIA[kind]}')
    return build(shape, {name: value for name, value in values.items() if name != "kind"}, path)
