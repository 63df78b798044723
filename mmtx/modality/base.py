"""The contract of all tokenizers: media to codes, codes to media, and a fingerprint.

Codes are local: they start at 0 in every modality. `mmtx.vocabulary` gives them their global ids.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mmtx.ambient import neutral
from mmtx.atomic_folder import put_back, replace_folder
from mmtx.errors import InputError
from mmtx.files import user_path
from mmtx.json_files import read_json
from mmtx.modality.registry import MODALITIES
from mmtx.saved_folder import CONFIG
from mmtx.schema import shown, typed


class Encoding(NamedTuple):
    """A medium as codes (h, w), and as encoder features (h, w, D) before the quantizer.

    A decoder with an encoder of its own gets patches (h, w, P) as features instead. Features are float16, as prepared shards
    store them, so that a decoder sees the same values from both; None if the tokenizer has none.
    """

    codes: np.ndarray
    features: Tensor | None


@dataclass(frozen=True)
class ChatFormat:
    """How a pretrained language model writes turns: ids of its text tokenizer that replace the tags of the stream."""

    begin: tuple[int, ...]      # before the first turn of a conversation: a system prompt, or nothing
    user: tuple[int, ...]       # in place of <user>
    assistant: tuple[int, ...]  # in place of <assistant>
    end: tuple[int, ...]        # in place of <end>: the id that ends an answer, then what precedes the next turn
    control: tuple[int, ...]    # ids of special tokens: not text, so never generated, except the one that ends an answer


class Tokenizer(ABC):
    """Turns media of one kind into integer codes and back.

    | kind | media | codes |
    | --- | --- | --- |
    | text | str | list of int |
    | image | uint8 tensor (C=3, H, W) | int64 array (h, w), one code per patch |
    | audio | float tensor (S,) in [-1, 1] at `rate` | int64 array (t, bands), one code per spectrogram patch |
    """

    kind: ClassVar[str]  # of a `Modality`
    levels: tuple[int, ...] | None = None  # of a quantizer: a code is the mixed-radix number of one digit per level; None: no digits
    bands: int | None = None  # codes per time step in the layout "steps"; None in other layouts
    decodes: bool = True  # False: its codes are input only, and `decode` refuses them
    feature_width: int = 0  # D of the features of an `Encoding`; 0 if there are none, as without `levels`
    chat_format: ChatFormat | None = None  # of a text tokenizer whose model has a chat format of its own

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of codes, each of which lies in [0, size)."""

    @abstractmethod
    def encode(self, media: Any) -> Any:
        """Return the codes of one medium. Raises InputError for anything else."""

    @abstractmethod
    def decode(self, codes: Any) -> Any:
        """Return the medium that `codes` stand for. Raises InputError on a code outside [0, size)."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return all files that `save` writes: file name -> content. Equal tokenizers give equal files.

        One is config.json, a JSON object whose field `kind` is a key of `Modality.tokenizers`. All names must be in
        `mmtx.saved_folder.WRITTEN`; otherwise saving again would refuse the folder as not written by mmtx.
        """

    @classmethod
    @abstractmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises InputError if a file is missing or damaged."""

    def code_files(self) -> dict[str, bytes]:
        """Return the files, or reduced versions of them, that codes depend on; by default all of `files`.

        The parts that only decode can then be improved without invalidating models that use the codes.
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
        """Write the tokenizer to `folder`, atomically.

        Raises InputError if the folder holds something that mmtx did not write, or if there is no room.
        """
        replace_folder(folder, self.files().items())


class MediaTokenizer(Tokenizer):
    """A tokenizer of media, whose codes are a grid (h, w): rows and columns, or time steps and `bands`.

    It takes a tensor, as `Modality.read` returns it; the decoded medium may be larger or smaller by part of a patch.
    """

    codes_per_second: float | None = None  # of media with a duration; None for others
    encoder_config: Any = None  # `EncoderConfig` of an encoder that a decoder may train along; None: there is none

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of its weights. Codes and features are returned on the CPU."""

    @abstractmethod
    def grid(self, medium: Tensor) -> tuple[int, int]:
        """Rows and columns of the codes of a medium, without encoding it."""

    @abstractmethod
    def embed_batch(self, media: Sequence[Tensor], patches: bool = False, codes: bool = True) -> list[Encoding]:
        """Media of any sizes -> codes and features of each, which up to rounding do not depend on the rest of the batch.

        With `patches` the features are the encoder's inputs (h, w, P), for a decoder that trains an encoder of its own. Such a
        decoder does not read the codes; without `codes` they may all be 0, which saves running the encoder here.
        """

    def as_grid(self, codes: Any) -> np.ndarray:
        """Codes to decode as an array (h, w), h and w at least 1. Raises InputError if they have another shape."""
        found = np.asarray(codes)
        if found.ndim != 2 or not found.size or self.bands not in (None, found.shape[1]):
            expected = "(h, w)" if self.bands is None else f"(t, {self.bands})"
            raise InputError(f"{self.kind} codes: found shape {found.shape}, expected {expected} with at least one code")
        return found

    @typed
    def encode_batch(self, media: Iterable[Tensor]) -> list[np.ndarray]:
        """Media of any sizes -> codes (h, w) of each."""
        return [encoding.codes for encoding in self.embed_batch([*media])]

    def encode(self, medium: Tensor) -> np.ndarray:
        """A medium of any size -> codes (h, w), int64."""
        return self.encode_batch([medium])[0]


def wrong_medium(kind: str, medium: Any, expected: str) -> InputError:
    """The error for a medium that is not a tensor as `expected`."""
    found = f"{medium.dtype} {tuple(medium.shape)}" if isinstance(medium, Tensor) else type(medium).__name__
    return InputError(f"{kind}: found {found}, expected {expected}, as mmtx.data.media.load_{kind} returns it")


def check_codes(codes: Any, allowed: range, what: str) -> None:
    """Raise InputError unless all codes, of any shape, are whole numbers in the range `allowed`."""
    found = np.asarray(codes)
    if found.size and found.dtype.kind not in "iuO":  # O: beyond 64 bits
        raise InputError(f"{what}: found {found.dtype}, expected whole numbers")
    if found.size and not allowed.start <= found.min() <= found.max() < allowed.stop:
        raise InputError(f"{what}: found {found.min()}..{found.max()}, expected {allowed.start}..{allowed.stop - 1}")


def media_tokenizer(tokenizers: Mapping[str, Tokenizer], kind: str) -> MediaTokenizer:
    """The tokenizer of a kind of media, any but text."""
    return cast(MediaTokenizer, tokenizers[kind])


@neutral()
@typed
def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a tokenizer of any kind; `config.json` in the folder names the kind."""
    folder = user_path(folder)
    put_back(folder)
    classes = {word: modality for modality in MODALITIES.values() for word in modality.tokenizers}
    word = read_config(folder, *classes)["kind"]
    found: type[Tokenizer] = classes[word].tokenizer(word)
    return found.from_folder(folder)


def read_config(folder: Path, *kinds: str) -> dict[str, Any]:
    """Read the config.json of a tokenizer of one of these kinds. Raises InputError for anything else."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG}: found {shown(config)}, expected the object that a tokenizer saves")
    if (kind := config.get("kind")) not in kinds:
        if "decoder" in config:
            raise InputError(f"{folder}: found a model, expected a tokenizer, as in {folder / 'text'}")
        further = ", or one that a --plugin FILE brings" if len(kinds) > 1 else ""
        raise InputError(f"{folder / CONFIG}: field 'kind' is {shown(kind)}, expected {' or '.join(map(repr, kinds))}{further}")
    return config
