"""Media as inputs and outputs of the API: pictures, sounds, and objects marked as one or the other.

Shapes: C channels, H height, W width, S samples.
"""

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from PIL import Image as PILImage

from mmtx.data.formats import AUDIO_FORMATS, IMAGE_FORMATS
from mmtx.data.media import PIL_LOCK, Sampled, content_of
from mmtx.data.sample import Media as SampleMedia
from mmtx.data.sample import kind_of, sniff, suffix
from mmtx.data.sound_files import MAX_CHANNELS, RATES
from mmtx.data.storage import display, open_binary
from mmtx.document import MediaPart
from mmtx.errors import InputError
from mmtx.files import user_name, user_path, write_whole
from mmtx.modality.base import Tokenizer
from mmtx.modality.registry import MODALITIES, media_kinds
from mmtx.schema import typed

MIN_SOUND_ASPECT = 32   # times as long as wide: not a picture
WRITE_CHUNK = 2 ** 16   # samples passed to libsndfile at a time: its Vorbis encoder crashes on some millions


class BaseMedium:
    """An object marked as a medium of some kind. Media are equal if their data are, arrays by their values."""

    kind: str
    data: Any

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, BaseMedium) and type(self) is type(other) and self.kind == other.kind
                and self.options() == other.options() and _same(self.data, other.data))

    def __hash__(self) -> int:
        # Arrays have no hash, since they may change, and tensors one of their identity.
        return hash((self.kind, self.data if isinstance(self.data, (str, bytes, Path)) else type(self.data)))

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `Modality.read`."""
        return {}


@typed
@dataclass(frozen=True, eq=False)
class Medium(BaseMedium):
    """Marks a path, a URL, or any object that the modality reads, as a medium of the given kind."""

    kind: str
    data: Any

    def __post_init__(self):
        if self.kind not in media_kinds():
            raise InputError(f"kind: found {self.kind!r:.40}, expected one of {', '.join(media_kinds())}")


@dataclass(frozen=True, eq=False)
class Image(BaseMedium):
    """Marks an object as a picture: a path, URL, bytes, open file, PIL image, uint8 or float array (H, W, C) or tensor (C, H, W)."""

    data: Any
    kind: ClassVar[str] = "image"  # type: ignore[misc]  # one for all, where a `Medium` has its own


@dataclass(frozen=True, eq=False)
class Audio(BaseMedium):
    """Marks an object as a sound: a path, URL, bytes, open file, or samples (S,) or (S, C) at `rate` Hz (None: the model's rate)."""

    data: Any
    rate: int | None = None
    kind: ClassVar[str] = "audio"  # type: ignore[misc]  # one for all, where a `Medium` has its own

    def options(self) -> dict[str, Any]:
        return {"source_rate": self.rate}

    def __post_init__(self):
        if self.rate is not None and not (isinstance(self.rate, Real) and math.isfinite(self.rate)):
            raise InputError(f"rate: found {self.rate!r:.100}, expected a number of Hz")


@dataclass(frozen=True, eq=False)
class ReadMedium(BaseMedium):
    """A medium decoded and resized for its tokenizer, but not encoded yet; `Model.read_medium` returns it."""

    kind: str
    data: torch.Tensor
    grid: tuple[int, int]  # rows and columns of its codes

    @property
    def blank(self) -> MediaPart:
        """A part as long as its own, for the length of its stream without encoding it."""
        return MediaPart.blank(self.kind, self.grid)


def _same(data: Any, other: Any) -> bool:
    """Whether the data of two media are equal: not if that cannot be told."""
    if data is other or type(data) is not type(other):
        return data is other
    if isinstance(data, np.ndarray):
        return data.dtype == other.dtype and np.array_equal(data, other)
    if isinstance(data, torch.Tensor):
        return (data.dtype, data.device) == (other.dtype, other.device) and torch.equal(data, other)
    try:
        return bool(data == other)
    except (ValueError, RuntimeError):  # of arrays inside
        return False


class Sound(NamedTuple):
    """A generated sound: float samples (S,) in [-1, 1] and their rate in Hz. Sounds are equal if all of their samples are."""

    samples: np.ndarray
    rate: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sound) and self.rate == other.rate and _same(self.samples, other.samples)

    def __ne__(self, other: object) -> bool:  # that of a tuple would compare the arrays
        return not self == other

    def __hash__(self) -> int:
        return hash((len(self.samples), self.rate))

    def save(self, path: str | Path) -> None:
        """Write it atomically to a file, whose extension chooses the format.

        Formats are .wav, .flac, .ogg, .mp3, .aiff, .au, .caf, .w64, and others that libsndfile writes. Samples outside [-1, 1] are
        clipped. Raises InputError if the file cannot be written, or samples or rate are invalid.
        """
        import soundfile

        if not isinstance(path, (str, os.PathLike)):
            raise InputError(f"path: found {type(path).__name__}, expected the name of a file")
        form, samples, file = suffix(os.fspath(path)), np.asarray(self.samples), io.BytesIO()
        if form[1:].upper() not in soundfile.available_formats().keys() - {"SD2"}:  # it leaves "._" in the current folder
            raise InputError(f"{path}: found the extension {form!r}, expected .wav, .flac, .ogg, .mp3, .aiff, .au, .caf or .w64")
        if not (isinstance(self.rate, Integral) and RATES[0] <= self.rate <= RATES[1]):
            raise InputError(f"rate: found {self.rate!r:.100}, expected a whole number of Hz from {RATES[0]} to {RATES[1]}")
        if samples.dtype.kind not in "fi" or samples.ndim not in (1, 2):
            raise InputError(f"samples: found {samples.dtype} of shape {samples.shape}, expected numbers (S,)")
        channels = samples.shape[1] if samples.ndim == 2 else 1
        if not 0 < channels <= MAX_CHANNELS:
            raise InputError(f"samples: found {channels} channels in shape {samples.shape}, expected numbers (S,) or (S, C)")
        if samples.dtype.kind == "f":
            if not np.isfinite(samples).all():  # of which LAME ends the process, too
                raise InputError("samples: found NaN or infinite ones, expected finite numbers")
            samples = samples.clip(-1, 1)  # as PCM is anyway; LAME ends the process if samples are far too loud
        try:
            with soundfile.SoundFile(file, "w", int(self.rate), channels, format=form[1:]) as sink:
                for first in range(0, len(samples), WRITE_CHUNK):
                    sink.write(samples[first:first + WRITE_CHUNK])
            write_whole(Path(os.path.realpath(user_path(path))), file.getvalue())  # a link stays a link
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # soundfile's errors differ in where they keep the reason
            reason = getattr(error, "strerror", None) or getattr(error, "error_string", None) or error
            raise InputError(f"{path}: cannot be written ({reason})") from None


Media = str | PILImage.Image | Sound | Any  # Any: what further modalities show


def as_medium(item: Any) -> BaseMedium:
    """Mark an object by its type, shape or content, unless it is marked already. Raises InputError if that is unclear."""
    if isinstance(item, BaseMedium):
        return item
    if isinstance(item, SampleMedia):
        return Medium(item.kind, item)
    if isinstance(item, Sound):
        return Audio(item.samples, item.rate)
    if isinstance(item, PILImage.Image):
        return Image(item)
    if isinstance(item, (np.ndarray, torch.Tensor)):
        if could_be_sound(item):
            raise InputError(f"{type(item).__name__} of shape {tuple(item.shape)}, which may be a sound or a picture; expected "
                             "it in mmtx.Audio(...) or mmtx.Image(...)")
        return Audio(item) if item.ndim == 1 else Image(item)
    if is_waveform(item):
        return Audio(*item)
    if isinstance(item, Mapping):
        return _decoded(item)
    if hasattr(item, "get_all_samples"):
        return _all_samples(item)
    if isinstance(item, (bytes, bytearray, memoryview)) or hasattr(item, "read"):
        data = content_of(item, "file") if hasattr(item, "read") else bytes(item)
        if (kind := sniff(data)) is None:
            raise InputError(f"found {len(data)} bytes of neither a picture nor a sound that can be read, expected {_formats()}")
        return Medium(kind, data)
    if isinstance(item, (str, Path)):
        name = user_name(item)
        with open_binary(name) as file:
            kind = kind_of(name, file.read(64))
        if kind is None:
            raise InputError(f"{display(name)}: found neither a picture nor a sound that can be read, expected {_formats()}")
        return Medium(kind, name)
    raise InputError(f"found {type(item).__name__}, expected a path, bytes, an open file, a PIL image, an array, a tensor, "
                     "mmtx.Image or mmtx.Audio")


def is_waveform(item: Any) -> bool:
    """Whether it is a sound with its rate, as torchaudio.load and soundfile.read return it."""
    return (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], (np.ndarray, torch.Tensor))
            and isinstance(item[1], Integral))


def _decoded(cell: Mapping[str, Any]) -> BaseMedium:
    """A cell of a column of media in a Hugging Face dataset: samples with their rate, or the bytes of a file.

    A path beside them, which belongs to the machine that made the dataset, is not opened.
    """
    if {"array", "sampling_rate"} <= cell.keys():
        return Audio(np.asarray(cell["array"]), cell["sampling_rate"])
    if isinstance(given := cell.get("bytes"), bytes):
        return as_medium(given)
    raise InputError(f"found an object with {', '.join(map(repr, cell)) or 'nothing'}, expected one with 'array' and "
                     "'sampling_rate', or with 'bytes'; a file is given as pathlib.Path(...)")


def _all_samples(decoder: Any) -> Audio:
    """The sound behind an `AudioDecoder` of torchcodec, which is what Hugging Face datasets hold since version 4."""
    try:
        samples = decoder.get_all_samples()
    except (OSError, RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"found {type(decoder).__name__} of a sound that cannot be decoded ({why:.200})") from None
    return Audio(samples.data, samples.sample_rate)


def _formats() -> str:
    further = tuple(name for kind in media_kinds()[2:] for name in MODALITIES[kind].extensions)
    return ", ".join(IMAGE_FORMATS + AUDIO_FORMATS + further)


def could_be_sound(item: np.ndarray | torch.Tensor) -> bool:
    """Whether an array of 2 or 3 dimensions is too thin for a picture, but may be a sound with channels.

    torchaudio reads sounds as (C, S), soundfile as (S, C).
    """
    if item.ndim not in (2, 3) or getattr(item, "is_nested", False):
        return False
    coloured = item.ndim == 3 and item.shape[0 if isinstance(item, torch.Tensor) else 2] in (3, 4)
    if coloured and item.dtype in (np.uint8, torch.uint8):
        return False
    *_, short, long = sorted(item.shape)
    return 0 < short <= MAX_CHANNELS and long >= MIN_SOUND_ASPECT * short


def check_open(picture: PILImage.Image) -> None:
    """Raise InputError if a PIL image's file was closed before its pixels were read."""
    with PIL_LOCK:
        if getattr(picture, "fp", None) is None:  # all pixels are read, or no more can be
            try:
                picture.load()
            except (ValueError, AttributeError, AssertionError):  # which of them depends on the format
                raise InputError("found a PIL image that was closed before its pixels were read, expected an open one") from None


def to_pil(tokenizer: Tokenizer, codes: np.ndarray) -> PILImage.Image:
    """Codes (h, w) as a picture."""
    return PILImage.fromarray(tokenizer.decode(codes).permute(1, 2, 0).numpy())


def to_sound(tokenizer: Tokenizer, codes: np.ndarray) -> Sound:
    """Codes (t, bands) as a sound."""
    return Sound(tokenizer.decode(codes).numpy(), cast(Sampled, tokenizer).rate)


def to_array(tokenizer: Tokenizer, codes: np.ndarray) -> np.ndarray:
    """Codes of any kind as the array that they decode to."""
    return np.asarray(tokenizer.decode(codes))
