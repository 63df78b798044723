"""Bytes, files and arrays to the tensors that the tokenizers take.

Pictures become uint8 (C=3, H, W), sounds float32 (S,) mono at a given rate, peak 0.7. Headers are checked
against limits before anything is decoded: a PNG of 20 kB can decompress to 800 MB. Colours are taken as
stored: ICC profiles and gamma are not applied.
"""

import io
import math
import os
import threading
from collections.abc import Iterator
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, UnidentifiedImageError
from torchaudio.functional import phase_vocoder
from torchaudio.transforms import Resample

from mmtx.data.formats import IMAGE_FORMATS, format_of
from mmtx.data.pauses import SILENCE, quietest
from mmtx.data.picture_files import BITS, ORIENTATION, PHOTOMETRIC, PictureFile, check_size, orientation, picture_file
from mmtx.data.sound_files import (
    BLOCK,
    MAX_CHANNELS,
    MAX_SECONDS,
    MAX_START,
    MAX_VALUES,
    Blocks,
    check_sound,
    cut,
    file_blocks,
    of_one_layout,
    read_cut,
    read_sound,
    sound_blocks,
)
from mmtx.data.storage import MAX_BYTES, FileSource, display, open_binary
from mmtx.data.urls import is_url
from mmtx.errors import InputError
from mmtx.files import user_name

PEAK = 0.7
BAND = 2**20  # pixels
PIL_LOCK = threading.Lock()  # for PIL images of callers: threads that share one must not decode it at the same time
WINDOW_END = 60  # seconds at the end of a window of a long sound: where these are quietest, the next one begins
MOST_SPEED = 4  # largest factor by which a sound may be sped up or slowed down
MOST_SEMITONES = 24  # largest pitch shift, up or down
VOCODER_WINDOW = 0.064  # seconds
FILTERS = 16    # resampling filters kept, up to 5 MB each: making one takes as long as applying it
TURN = Image.Transpose
UPRIGHT = {  # EXIF orientation -> the transposition that makes a picture upright
    2: TURN.FLIP_LEFT_RIGHT,
    3: TURN.ROTATE_180,
    4: TURN.FLIP_TOP_BOTTOM,
    5: TURN.TRANSPOSE,
    6: TURN.ROTATE_270,
    7: TURN.TRANSVERSE,
    8: TURN.ROTATE_90,
}
NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16, torch.uint32,
           torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ImageFitter(Protocol):
    """A tokenizer of pictures."""

    def fit(self, picture: torch.Tensor) -> torch.Tensor: ...


class Sampled(Protocol):
    """A tokenizer of sounds."""

    @property
    def rate(self) -> int: ...


def read_image(tokenizer: ImageFitter, data: Any, name: str | None = None) -> torch.Tensor:
    """A picture, in any form that `load_image` takes, fitted to the size that a tokenizer reads, uint8 (3, H, W)."""
    return tokenizer.fit(load_image(data, name))


def read_audio(tokenizer: Sampled, data: Any, name: str | None = None, **options: Any) -> torch.Tensor:
    """A sound, in any form that `load_audio` takes, as samples (S,) at the tokenizer's rate; options are those of `load_audio`."""
    return load_audio(data, tokenizer.rate, name, **options)


def load_image(data: Any, name: str | None = None) -> torch.Tensor:
    """Return a picture as uint8 (C=3, H, W), upright, transparency over white; the first frame of several.

    `data` is one of: encoded bytes or an open file of them; a path or URL; a PIL image; a numpy array (H, W) or (H, W, 1|3|4);
    a tensor (H, W) or (1|3|4, H, W). Arrays are uint8, or floats in [0, 1]. 32-bit whole numbers of a PIL image or a TIFF are
    8 bits if none is above 255, else 16. `name` is used in error messages.
    Raises InputError for anything that is not a complete picture of at most 64 megapixels.
    """
    name = _name(data, name, "image")
    if isinstance(data, (np.ndarray, torch.Tensor)):
        return _tensor(Image.fromarray(_pixels(data, name)), name)
    if isinstance(data, Image.Image):
        with PIL_LOCK:
            picture = _decoded(data, None, name)
        return _tensor(picture, name)
    picture, file = _file(_bytes(data, name), name)
    return _tensor(_decoded(picture, file, name), name)


def image_size(data: bytes, name: str = "image") -> tuple[int, int]:
    """Width and height in pixels from the header of an encoded picture. Raises InputError as `load_image` does."""
    return _file(_bytes(data, name), name)[0].size


def _file(encoded: bytes, name: str) -> tuple[Image.Image, PictureFile]:
    """An encoded picture with its header read, and the bytes that its decoder gets."""
    format = format_of(encoded)
    if format not in IMAGE_FORMATS:
        raise InputError(f"{name}: not a whole picture that can be decoded, expected {', '.join(IMAGE_FORMATS)}")
    file = picture_file(encoded, format, name)
    return _opened(file.data, format, name), file


def _opened(data: bytes, format: str, name: str) -> Image.Image:
    """Open a picture, which reads only its header."""
    if format == "HEIC":
        try:
            from pillow_heif import HeifImageFile
        except ImportError:
            raise InputError(f'{name}: reading HEIC needs pillow-heif: pip install "mmtx[media]"') from None
    try:
        return HeifImageFile(io.BytesIO(data)) if format == "HEIC" else Image.open(io.BytesIO(data), formats=[format])
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: too many pixels ({_line(error)})") from None
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow raises anything from SyntaxError to struct.error
        raise _not_whole(name, error) from None


def _decoded(picture: Image.Image, file: PictureFile | None, name: str) -> Image.Image:
    """Decode the pixels of a picture and turn it upright."""
    check_size(*picture.size, name)
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:
        raise _not_whole(name, error) from None
    if file is None:  # the orientation of a picture that the caller opened
        try:
            found = picture.getexif().get(ORIENTATION, 1)
        except Exception:  # EXIF that Pillow cannot read
            found = 1
    else:
        found = orientation(file.exif or picture.info.get("exif") or b"", file.xmp or picture.info.get("xmp") or b"")
    picture = _sixteen_bit(picture)
    return picture.transpose(UPRIGHT[found]) if found in UPRIGHT else picture


def _sixteen_bit(picture: Image.Image) -> Image.Image:
    """A grey TIFF with 12 bits scaled to 16, and upright values where 0 is white; Pillow does the latter for 8 bits only."""
    tags = getattr(picture, "tag_v2", None)
    if tags is None or picture.mode != "I;16":
        return picture
    values = np.asarray(picture)
    if tags.get(BITS) == (12,):
        values = values << 4 | values >> 8
    return Image.fromarray(65_535 - values if tags.get(PHOTOMETRIC) == 0 else values)


def _not_whole(name: str, error: Exception) -> InputError:
    reason = "" if isinstance(error, UnidentifiedImageError) or not str(error) else f" ({_line(error)})"
    return InputError(f"{name}: not a whole picture that can be decoded{reason}, expected {', '.join(IMAGE_FORMATS)}")


def _tensor(picture: Image.Image, name: str) -> torch.Tensor:
    picture = _rgb(picture, name)
    width, height = picture.size
    pixels = torch.empty(3, height, width, dtype=torch.uint8)
    rows = max(1, BAND // width)  # at a time: converting a whole photograph would need two more copies
    for top in range(0, height, rows):
        band = picture if height <= rows else picture.crop((0, top, width, min(top + rows, height)))
        pixels[:, top:top + rows] = torch.from_numpy(np.array(band)).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
    return pixels


def _rgb(picture: Image.Image, name: str) -> Image.Image:
    """Convert any mode to 8-bit RGB. Pillow itself clips 16-bit grey to white and turns transparency black."""
    if picture.mode.startswith("I"):  # "I;16" and its byte orders; "I" holds 8 or 16 bits, as its values show
        values, transparent = np.asarray(picture), picture.info.get("transparency")
        if picture.mode == "I" and (values.min() < 0 or values.max() > 65_535):
            raise InputError(f"{name}: pixels from {values.min()} to {values.max()}, expected 8 or 16 bit")
        eight = picture.mode == "I" and picture.format != "PPM" and values.max() <= 255  # Pillow scales those of PPM to 16 bits
        grey = (values if eight else (values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        picture = Image.fromarray(grey)
    elif picture.mode == "F":
        picture = Image.fromarray(_pixels(np.asarray(picture), name))
    elif picture.mode == "LAB":
        picture = ImageCms.profileToProfile(
            picture, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    elif picture.mode == "La":  # premultiplied
        picture = picture.convert("LA")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _pixels(data: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """Array or tensor to uint8 (H, W) or (H, W, 3|4)."""
    array, layout, turn = _array(data, name), "(H, W) or (H, W, 1|3|4)", "transpose(1, 2, 0)"
    if isinstance(data, torch.Tensor):
        layout, turn = "(H, W) or (1|3|4, H, W)", "permute(2, 0, 1)"
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        other = array.shape[1 if isinstance(data, torch.Tensor) else 0] if array.ndim == 3 else 0
        hint = f" ({turn}?)" if other in (1, 3, 4) else " (a list of pictures?)" if array.ndim == 4 else ""
        raise InputError(f"{name}: {type(data).__name__} of shape {tuple(data.shape)}, expected {layout}{hint}")
    check_size(array.shape[1], array.shape[0], name)
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also true for NaN
            hint = " (divide by 255?)" if low >= 0 and 1 < high <= 255 else ""
            raise InputError(f"{name}: values from {low:g} to {high:g}, expected floats from 0 to 1{hint}")
        array = np.rint(array * np.float32(255)).astype(np.uint8)
    if array.dtype != np.uint8:
        hint = " (divide by 65535?)" if array.dtype == np.uint16 else ""
        raise InputError(f"{name}: {type(data).__name__} of {data.dtype}, expected uint8 or floats in [0, 1]{hint}")
    return np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


@lru_cache(FILTERS)
def _resample(rate: int, new_rate: int) -> Resample:
    return Resample(rate, new_rate, dtype=torch.float32)


def load_audio(
    data: Any,
    rate: int,
    name: str | None = None,
    source_rate: int | None = None,
    start: float = 0.0,
    seconds: float | None = None,
    speed: float = 1.0,
    semitones: float = 0.0,
) -> torch.Tensor:
    """Return a sound as float32 (S,) at `rate` Hz, peak 0.7: its loudest channel, resampled; silence is not scaled.

    `data` is one of: encoded bytes or an open file of them; a path or URL; a numpy array (S,) or (S, C), as soundfile reads; a tensor
    (S,) or (C, S), as torchaudio reads. Arrays hold int16, int32 or floats at `source_rate` (default `rate`).
    `start` and `seconds` select a piece, to which alone the limits then apply. `speed`, from 1/4 to 4, plays it faster, which
    raises its pitch: 2 ** (1 / 12) is a semitone up. `semitones`, from -24 to 24, shift its pitch and keep its length and
    loudness envelope.
    Raises InputError for anything that is not a finite sound of at most 600 s.
    """
    name = _name(data, name, "sound")
    for option, value in (("source_rate", source_rate), ("start", start), ("seconds", seconds), ("speed", speed),
                          ("semitones", semitones)):
        if value is not None and not isinstance(value, Real):
            raise InputError(f"{name}: {option} {_line(repr(value))}, expected a number")
    if not isinstance(rate, Integral) or rate < 1:
        raise InputError(f"{name}: rate {_line(repr(rate))}, expected a whole number of Hz")
    if not (0 <= start <= MAX_START and (seconds is None or 0 < seconds < math.inf)):  # also true for NaN
        raise InputError(f"{name}: found start={start} and seconds={seconds}, expected a start from 0 to {MAX_START} and "
                         "more than 0 seconds")
    if not 1 / MOST_SPEED <= speed <= MOST_SPEED:
        raise InputError(f"{name}: speed {speed:g}, expected {1 / MOST_SPEED} to {MOST_SPEED}")
    if not -MOST_SEMITONES <= semitones <= MOST_SEMITONES:
        raise InputError(f"{name}: {semitones:g} semitones, expected {-MOST_SEMITONES} to {MOST_SEMITONES}")
    if isinstance(data, (np.ndarray, torch.Tensor)):
        samples, source_rate = _waveform(data, name), rate if source_rate is None else source_rate
        check_sound(1 if start or seconds else len(samples), source_rate, samples.shape[1], name)
        first, last = cut(len(samples), source_rate, name, start, seconds)
        samples = samples[first:last]
        check_sound(len(samples), source_rate, samples.shape[1], name)
    else:
        cut_out = cut_of_file(data, name, start, seconds) if isinstance(data, (str, os.PathLike)) else None
        samples, source_rate = cut_out or read_sound(_bytes(data, name), name, start, seconds)
    if not np.isfinite(samples).all():
        raise InputError(f"{name}: NaN or infinite samples, expected a finite sound")
    # Some recordings carry the voice on one channel only, where a mean would halve it.
    loudest = np.argmax([np.square(samples[:, c], dtype=np.float64).mean() for c in range(samples.shape[1])])
    mono = torch.from_numpy(np.ascontiguousarray(samples[:, loudest]))
    del samples
    # The filter grows with rate / gcd: 44101 to 16000 Hz would take 3 GB. Usual rates are multiples of 25.
    if source_rate * speed != rate:
        mono = _resample(round(source_rate * speed / 25) * 25, rate)(mono)
    if semitones:
        mono = _shift_pitch(mono, rate, 2 ** (semitones / 12))
    peak = mono.abs().max()
    return mono * (PEAK / peak) if peak > SILENCE else mono


def cut_of_file(path: str | os.PathLike, name: str, start: float, seconds: float | None) -> tuple[np.ndarray, int] | None:
    """Samples (S, C) and rate of a cut of a local file; None for a whole sound, and where `read_cut` has none."""
    path = user_name(path)
    if is_url(path) or not start and seconds is None:
        return None
    with open_binary(path, seek=True) as file:
        return read_cut(file, name, start, seconds)


def load_windows(data: Any, rate: int, name: str | None = None,
                 source_rate: int | None = None) -> Iterator[tuple[float, torch.Tensor]]:
    """A sound of any length -> its windows, of at most 600 s, as `load_audio` returns them, each with its beginning in seconds.

    It may be the sound of a video. A window ends in a pause if there is one in its last minute. Files are decoded, and WAV, FLAC and
    MP4 files read, window by window.
    """
    name = _name(data, name, "sound")
    for start, samples, found_rate in _windows(_blocks(data, rate if source_rate is None else source_rate, name), name):
        yield start / found_rate, load_audio(samples, rate, name, found_rate)


def _blocks(data: Any, source_rate: int, name: str) -> Blocks:
    """The blocks of a sound of any length, in any form that `load_audio` takes."""
    if isinstance(data, (np.ndarray, torch.Tensor)):
        samples = _waveform(data, name)
        yield from ((source_rate, first, samples[first:first + BLOCK]) for first in range(0, len(samples), BLOCK))
        return
    if isinstance(data, (str, os.PathLike)) and not is_url(path := user_name(data)):
        with open_binary(path, seek=True) as file:
            if (blocks := file_blocks(file, name, video=True)) is not None:
                yield from blocks
                return
    yield from sound_blocks(_bytes(data, name), name, video=True)


def _windows(blocks: Blocks, name: str) -> Iterator[tuple[int, np.ndarray, int]]:
    """The windows of a sound: the place of the first frame, float32 (S, C), and the rate."""
    held: list[np.ndarray] = []
    start, count, rate = 0, 0, 0
    for rate, _, block in of_one_layout(blocks, name):
        check_sound(1, rate, channels := block.shape[1], name)
        held.append(block)
        count += len(block)
        while count > (most := min(round(MAX_SECONDS * rate), MAX_VALUES // channels)):
            samples = np.concatenate(held)
            power = np.square(samples[max(0, most - round(WINDOW_END * rate)):most]).mean(1)
            end = most - len(power) + quietest(torch.from_numpy(power), rate, 0)
            yield start, samples[:end], rate
            held, start, count = [samples[end:].copy()], start + end, count - end
    yield start, np.concatenate(held), rate


def _shift_pitch(sound: torch.Tensor, rate: int, factor: float) -> torch.Tensor:
    """Shift the pitch of a sound (S,) by `factor`, keeping its length: a phase vocoder stretches it, then it is played faster.

    Flanagan and Golden 1966, https://doi.org/10.1002/j.1538-7305.1966.tb01706.x
    """
    played = round(rate * factor / 25) * 25
    window = torch.hann_window(max(4, round(VOCODER_WINDOW * rate) // 4 * 4))
    size, hop = len(window), len(window) // 4
    padded = F.pad(sound, (0, max(0, size - len(sound))))
    frames = torch.stft(padded, size, hop, window=window, pad_mode="constant", return_complex=True)
    advance = torch.linspace(0, math.pi * hop, size // 2 + 1)[:, None]
    stretched = phase_vocoder(frames, rate / played, advance)
    shifted = _resample(played, rate)(torch.istft(stretched, size, hop, window=window, length=round(len(padded) * played / rate)))
    return F.pad(shifted, (0, max(0, len(sound) - len(shifted))))[:len(sound)]


def _waveform(data: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """Array or tensor to float32 (S, C)."""
    array, layout = _array(data, name), "(S,) or (S, C)"
    if isinstance(data, torch.Tensor):
        layout = "(S,) or (C, S)"
        array = array.T if array.ndim == 2 else array
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] > MAX_CHANNELS):
        hint = " (its transpose, .T?)" if array.ndim == 2 and 0 < array.shape[0] <= MAX_CHANNELS else ""
        raise InputError(f"{name}: {type(data).__name__} of shape {tuple(data.shape)}, expected {layout}{hint}")
    if array.dtype in (np.int16, np.int32):
        array = array / float(2 ** (array.dtype.itemsize * 8 - 1))
    elif array.dtype.kind != "f":
        raise InputError(f"{name}: {type(data).__name__} of {data.dtype}, expected int16, int32 or floats")
    with np.errstate(over="ignore"):  # values too large for float32 become infinite, and are refused as such
        return (array[:, None] if array.ndim == 1 else array).astype(np.float32)


def _array(data: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """A plain array in native byte order. Raises InputError for masked arrays, and tensors that are not dense or hold no values."""
    if isinstance(data, torch.Tensor):
        sort = ("nested" if data.is_nested else "sparse" if data.layout != torch.strided else
                "quantized" if data.is_quantized else "meta" if data.is_meta else None)
        if sort or data.dtype not in NUMBERS:
            found = f"{sort} tensor" if sort else "tensor"
            raise InputError(f"{name}: a {found} of {data.dtype}, expected a dense one of real numbers")
        data = data.detach().resolve_neg().cpu()
        return (data.float() if data.dtype == torch.bfloat16 else data).numpy()
    if np.ma.is_masked(data):
        raise InputError(f"{name}: found an array with masked values, expected none")
    data = np.asarray(data)
    return data if data.dtype.isnative else data.astype(data.dtype.newbyteorder("="))


def _bytes(data: Any, name: str) -> bytes:
    if isinstance(data, (str, os.PathLike)):
        data = FileSource(user_name(data)).read()
    if hasattr(data, "read"):
        data = content_of(data, name)
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise InputError(f"{name}: found {type(data).__name__}, expected bytes, an open file, a path, an image or an array")
    if not len(data):
        raise InputError(f"{name}: the file is empty")
    return bytes(data)


def content_of(file: Any, name: str) -> bytes:
    """All bytes of an open file, from its beginning as PIL reads it. Raises InputError if it cannot be read, or holds text."""
    try:
        if file.seekable():
            file.seek(0)
        data = file.read(MAX_BYTES + 1)
    except (AttributeError, OSError, TypeError, ValueError) as error:  # no file, closed, or opened for writing
        raise InputError(f"{name}: {type(file).__name__} cannot be read ({_line(error)})") from None
    if not isinstance(data, bytes):
        raise InputError(f"{name}: found an open file that holds text, expected one opened in binary mode")
    if len(data) > MAX_BYTES:
        raise InputError(f"{name}: more than {MAX_BYTES} bytes, expected at most {MAX_BYTES}")
    return data


def _name(data: Any, name: str | None, default: str) -> str:
    """The name of the input in error messages, on one line."""
    return _line(name or (display(os.fspath(data)) if isinstance(data, (str, os.PathLike)) else default), 150)


def _line(text: Any, most: int = 60) -> str:
    """Foreign text for a message: control characters escaped, the middle of a long one left out."""
    text = str(text)
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
