"""The contract that every tokenizer keeps: media to codes, codes to media, and a fingerprint.

Codes are local: they start at 0 in every modality. `mmtx.vocabulary` gives them their global ids.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mmtx.ambient import neutral
from mmtx.errors import InputError
from mmtx.files import CONFIG, put_back, read_json, replace_folder
from mmtx.modality.registry import MODALITIES
from mmtx.schema import shown


class Encoding(NamedTuple):
    """A medium as codes (h, w), and as features (h, w, D): what the encoder made of each patch before the quantizer, or the
    patches themselves (h, w, P), for a decoder that has an encoder of its own.

    Features are float16, as prepared shards store them, so that a decoder sees the same wherever they come from; None where
    the tokenizer has none.
    """

    codes: np.ndarray
    features: Tensor | None


@dataclass(frozen=True)
class ChatFormat:
    """How a pretrained language model writes turns: ids of its text tokenizer in place of the tags of the stream."""

    begin: tuple[int, ...]      # before the first turn of a conversation: a system prompt, or nothing
    user: tuple[int, ...]       # in place of <user>
    assistant: tuple[int, ...]  # in place of <assistant>
    end: tuple[int, ...]        # in place of <end>: an id that ends an answer, and what then is written before the next turn
    control: tuple[int, ...]    # ids of special tokens: no text, so never generated, but the one that ends an answer


class Tokenizer(ABC):
    """Turns media of one kind into integer codes and back.

    | kind | media | codes |
    | --- | --- | --- |
    | text | str | list of int |
    | image | uint8 tensor (C=3, H, W) | int64 array (h, w), one code a patch |
    | audio | float tensor (S,) in [-1, 1] at `rate` | int64 array (t, bands), one code a spectrogram patch |
    """

    kind: ClassVar[str]  # of a `Modality`
    levels: tuple[int, ...] | None = None  # of a quantizer: code = mixed-radix number of one digit for each; None: no digits
    bands: int | None = None  # codes in one time step of the layout "steps"; None: the stream writes the size, or there is none
    decodes: bool = True  # False: its codes are input only, `decode` refuses them
    feature_width: int = 0  # D of the features of an `Encoding`; 0, as where there are no `levels`: it has none
    chat_format: ChatFormat | None = None  # of a text tokenizer whose model writes turns in a way of its own

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of codes: every code lies in [0, size)."""

    @abstractmethod
    def encode(self, media: Any) -> Any:
        """Return the codes of one medium. Raises InputError for what is no such medium."""

    @abstractmethod
    def decode(self, codes: Any) -> Any:
        """Return the medium that `codes` stand for. Raises InputError on a code outside [0, size)."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return everything that `save` writes: file name to content. Equal tokenizers give equal files.

        One is config.json, a JSON object whose field `kind` is a word of `Modality.tokenizers`. Names are those of
        `mmtx.files.WRITTEN`, or saving again would take the folder for somebody else's.
        """

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


class MediaTokenizer(Tokenizer):
    """A tokenizer of media, whose codes are a grid (h, w): rows and columns, or time steps and `bands`.

    What it takes is a tensor, as `Modality.read` gives it; what it makes may be larger or smaller by parts of a patch.
    """

    codes_per_second: float | None = None  # of media that last; None for the others
    encoder_config: Any = None  # an `EncoderConfig`: sizes of an encoder that a decoder may train along; None: there is none

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its weights are. Codes and features come back on the CPU."""

    @abstractmethod
    def grid(self, medium: Tensor) -> tuple[int, int]:
        """Rows and columns of the codes of a medium, without encoding it."""

    @abstractmethod
    def embed_batch(self, media: Sequence[Tensor], patches: bool = False, codes: bool = True) -> list[Encoding]:
        """Media of any sizes -> codes and features of each, the same for a medium whatever comes beside it, but for rounding.

        With `patches` the features are what the encoder reads: (h, w, P), for a decoder that trains an encoder of its own.
        Where it gets these in place of the codes, these may all be 0 without `codes`, which saves the encoder here.
        """

    def encode_batch(self, media: Sequence[Tensor]) -> list[np.ndarray]:
        """Media of any sizes -> codes (h, w) of each."""
        return [encoding.codes for encoding in self.embed_batch(media)]

    def encode(self, medium: Tensor) -> np.ndarray:
        """A medium of any size -> codes (h, w), int64."""
        return self.encode_batch([medium])[0]


def check_codes(codes: Any, allowed: range, what: str) -> None:
    """Raise InputError unless all codes, of any shape, lie in a range."""
    found = np.asarray(codes)
    if found.size and not allowed.start <= found.min() <= found.max() < allowed.stop:
        raise InputError(f"{what}: found {found.min()}..{found.max()}, expected {allowed.start}..{allowed.stop - 1}")


def media_tokenizer(tokenizers: Mapping[str, Tokenizer], kind: str) -> MediaTokenizer:
    """The tokenizer of a kind of media: all are of media but that of text."""
    return cast(MediaTokenizer, tokenizers[kind])


@neutral()
def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a tokenizer of any kind; `config.json` in the folder names the kind."""
    folder = Path(folder)
    put_back(folder)
    classes = {word: modality for modality in MODALITIES.values() for word in modality.tokenizers}
    word = read_config(folder, *classes)["kind"]
    found: type[Tokenizer] = classes[word].tokenizer(word)
    return found.from_folder(folder)


def read_config(folder: Path, *kinds: str) -> dict[str, Any]:
    """What config.json of a tokenizer of one of these kinds holds. Raises InputError for anything else."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG}: found {shown(config)}, expected the object that a tokenizer saves")
    if (kind := config.get("kind")) not in kinds:
        if "decoder" in config:
            raise InputError(f"{folder}: found a model, expected a tokenizer, as in {folder / 'text'}")
        further = ", or one that a --plugin FILE brings" if len(kinds) > 1 else ""
        raise InputError(f"{folder / CONFIG}: field 'kind' is {shown(kind)}, expected {' or '.join(map(repr, kinds))}{further}")
    return config
