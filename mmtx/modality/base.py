"""The contract that every tokenizer keeps: media to codes, codes to media, and a fingerprint.

Codes are local: they start at 0 in every modality. `mmtx.vocabulary` gives them their global ids.
"""

import hashlib
import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from mmtx.ambient import neutral
from mmtx.errors import InputError
from mmtx.files import CONFIG, put_back, read_json, replace_folder
from mmtx.schema import shown

CLASSES = {
    "text": ("mmtx.modality.text", "TextTokenizer"),
    "image": ("mmtx.modality.image", "ImageTokenizer"),
    "audio": ("mmtx.modality.audio", "AudioTokenizer"),
    "pretrained image": ("mmtx.modality.pretrained", "PretrainedImage"),
    "pretrained audio": ("mmtx.modality.pretrained", "PretrainedAudio"),
}


class Tokenizer(ABC):
    """Turns media of one kind into integer codes and back.

    | kind | media | codes |
    | --- | --- | --- |
    | text | str | list of int |
    | image | uint8 tensor (C=3, H, W) | int64 array (h, w), one code a patch |
    | audio | float tensor (S,) in [-1, 1] at `rate` | int64 array (t, bands), one code a spectrogram patch |
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of codes: every code lies in [0, size)."""

    @abstractmethod
    def encode(self, media: Any) -> Any:
        """Return the codes of one medium."""

    @abstractmethod
    def decode(self, codes: Any) -> Any:
        """Return the medium that `codes` stand for."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return everything that `save` writes: file name to content. Equal tokenizers give equal files."""

    @classmethod
    @abstractmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises InputError when a file is missing or damaged."""

    def code_files(self) -> dict[str, bytes]:
        """Return the part of `files` that codes depend on; by default all of it.

        What only makes media of codes may get better later, without an end to the models that use the codes.
        """
        return self.files()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over `code_files`: two tokenizers with the same fingerprint give the same codes."""
        digest = hashlib.sha256()
        for name, content in sorted(self.code_files().items()):
            digest.update(f"{name}:{len(content)}:".encode())
            digest.update(content)
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer to `folder`, which appears whole or not at all.

        Raises InputError when there is something that mmtx did not write, or no room.
        """
        replace_folder(folder, self.files().items())


@neutral()
def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a tokenizer of any kind; `config.json` in the folder names the kind."""
    folder = Path(folder)
    put_back(folder)
    kind = read_config(folder, *CLASSES)["kind"]
    module, name = CLASSES[kind]
    return getattr(importlib.import_module(module), name).from_folder(folder)


def read_config(folder: Path, *kinds: str) -> dict[str, Any]:
    """What config.json of a tokenizer of one of these kinds holds. Raises InputError for anything else."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG}: found {shown(config)}, expected the object that a tokenizer saves")
    if (kind := config.get("kind")) not in kinds:
        if "decoder" in config:
            raise InputError(f"{folder}: found a model, expected a tokenizer, as in {folder / 'text'}")
        raise InputError(f"{folder / CONFIG}: field 'kind' is {shown(kind)}, expected {' or '.join(map(repr, kinds))}")
    return config
