"""Bytes, files and arrays to the tensors that the tokenizers take.

Pictures become uint8 (C=3, H, W), sounds float32 (S,) mono at a given rate, peak 0.7. Headers are checked
against limits before anything is decoded: a PNG of 20 kB can unfold to 800 MB.
"""

import io
import math
import os
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image, ImageOps
from torchaudio.functional import resample

from mmtx.data.sample import kind_of, sniff
from mmtx.data.storage import FileSource, display
from mmtx.errors import InputError

__all__ = ["kind_of", "load_audio", "load_image", "sniff"]

MAX_PIXELS = 64_000_000
MAX_SECONDS = 600
MAX_CHANNELS = 8
MAX_VALUES = MAX_SECONDS * 48_000 * 2  # samples times channels: 230 MB as float32
RATES = (1_000, 192_000)  # Hz, the source rates that are believed
PEAK = 0.7
SILENCE = 1e-4  # peak (-80 dB, three steps of 16 bit) up to which a sound is left alone: raised, it is noise
# Image formats whose decoders read pixels only; Pillow's others include PostScript.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
BLOCK = 65_536  # frames


def load_image(data: Any, name: str | None = None) -> torch.Tensor:
    """Return a picture as uint8 (C=3, H, W), upright, transparency laid on white; an animation's first frame.

    `data` is one of: encoded bytes; a path or URL; a PIL image; a numpy array (H, W) or (H, W, 1|3|4);
    a tensor (H, W) or (1|3|4, H, W). Arrays are uint8, or floats in [0, 1]. `name` is what errors call it.
    Raises InputError for anything that is not a whole picture of at most MAX_PIXELS.
    """
    name = name or _name(data, "image")
    if isinstance(data, (np.ndarray, torch.Tensor)):
        data = Image.fromarray(_pixels(data, name))
    encoded = None if isinstance(data, Image.Image) else _bytes(data, name)
    try:
        picture = data if encoded is None else Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)
        width, height = picture.size
        if not 0 < width * height <= MAX_PIXELS:
            raise InputError(f"{name}: {width} x {height} pixels, expected 1 to {MAX_PIXELS} in all")
        pixels = np.array(_rgb(ImageOps.exif_transpose(picture), name))  # (H, W, C)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (C, H, W)
    except InputError:
        raise
    except Exception as error:  # on damaged files Pillow raises anything from SyntaxError to struct.error
        reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({error})"
        raise InputError(
            f"{name}: not a whole picture that can be decoded{reason}, expected {', '.join(IMAGE_FORMATS)}"
        ) from None


def _rgb(picture: Image.Image, name: str) -> Image.Image:
    """Any mode to 8-bit RGB. Pillow itself clips 16-bit grey to white and drops transparency to black."""
    if picture.mode.startswith("I"):  # "I;16" and its byte orders; "I" is how some tools pass 16 bit
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise InputError(f"{name}: pixels from {values.min()} to {values.max()}, expected 8 or 16 bit")
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif picture.mode == "F":
        picture = Image.fromarray(_pixels(np.asarray(picture), name))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _pixels(data: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """Array or tensor to uint8 (H, W) or (H, W, 3|4)."""
    array, layout = _array(data), "(H, W) or (H, W, 1|3|4)"
    if isinstance(data, torch.Tensor):
        layout = "(H, W) or (1|3|4, H, W)"
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        raise InputError(f"{name}: {type(data).__name__} of shape {tuple(data.shape)}, expected {layout}")
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also true for NaN
            raise InputError(f"{name}: values from {low:g} to {high:g}, expected floats from 0 to 1")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"{name}: {type(data).__name__} of {data.dtype}, expected uint8 or floats in [0, 1]")
    return np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def load_audio(data: Any, rate: int, name: str | None = None, source_rate: int | None = None) -> torch.Tensor:
    """Return a sound as float32 (S,) at `rate` Hz, peak 0.7: the louder channel, resampled; silence stays.

    `data` is one of: encoded bytes; a path or URL; a numpy array (S,) or (S, C), as soundfile reads; a tensor
    (S,) or (C, S), as torchaudio reads. Arrays hold int16, int32 or floats at `source_rate` (default `rate`).
    Raises InputError for anything that is not a finite sound of at most MAX_SECONDS.
    """
    name = name or _name(data, "sound")
    if isinstance(data, (np.ndarray, torch.Tensor)):
        samples, source_rate = _waveform(data, name), rate if source_rate is None else source_rate
        _check_header(len(samples), source_rate, samples.shape[1], name)
    else:
        samples, source_rate = _decode_audio(_bytes(data, name), name)
    if not np.isfinite(samples).all():
        raise InputError(f"{name}: NaN or infinite samples, expected a finite sound")
    # Some recordings carry the voice on one channel only, where a mean would halve it.
    loudest = np.square(samples, dtype=np.float64).mean(axis=0).argmax()
    mono = torch.from_numpy(np.ascontiguousarray(samples[:, loudest]))
    if source_rate != rate:
        # The filter grows as rate / gcd: 44101 to 16000 Hz would take 3 GB. Usual rates are multiples of 25.
        mono = resample(mono, round(source_rate / 25) * 25, rate)
    peak = mono.abs().max()
    return mono * (PEAK / peak) if peak > SILENCE else mono


def _decode_audio(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Encoded bytes to float32 (S, C) and their rate."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file.frames, file.samplerate, file.channels, name)
            blocks, read = [], 0
            # Block by block: memory follows what is really there, whatever the header says.
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block)
                read += len(block)
                _check_header(read, file.samplerate, file.channels, name)
            if not blocks:
                raise InputError(f"{name}: no samples of {file.frames} are there: the file is cut short")
            return np.concatenate(blocks), file.samplerate
    except soundfile.SoundFileError:
        raise InputError(f"{name}: no sound that can be decoded, expected wav, flac, ogg or mp3") from None


def _check_header(frames: int, rate: int, channels: int, name: str) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f"{name}: {rate} Hz, expected {RATES[0]} to {RATES[1]}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise InputError(f"{name}: {channels} channels, expected 1 to {MAX_CHANNELS}")
    if frames <= 0:
        raise InputError(f"{name}: no samples in it, expected a sound")
    if frames > MAX_SECONDS * rate or frames * channels > MAX_VALUES:
        raise InputError(
            f"{name}: {math.ceil(frames / rate)} seconds of {channels} channels at {rate} Hz, "
            f"expected at most {MAX_SECONDS} seconds and {MAX_VALUES} values"
        )


def _waveform(data: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """Array or tensor to float32 (S, C)."""
    array, layout = _array(data), "(S,) or (S, C)"
    if isinstance(data, torch.Tensor):
        layout = "(S,) or (C, S)"
        array = array.T if array.ndim == 2 else array
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] > MAX_CHANNELS):
        raise InputError(f"{name}: {type(data).__name__} of shape {tuple(data.shape)}, expected {layout}")
    if array.dtype in (np.int16, np.int32):
        array = array / float(2 ** (array.dtype.itemsize * 8 - 1))
    elif array.dtype.kind != "f":
        raise InputError(f"{name}: {type(data).__name__} of {data.dtype}, expected int16, int32 or floats")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        return (array[:, None] if array.ndim == 1 else array).astype(np.float32)


def _array(data: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu()
        return (data.float() if data.dtype == torch.bfloat16 else data).numpy()
    return data


def _bytes(data: Any, name: str) -> bytes:
    if isinstance(data, (str, os.PathLike)):
        data = FileSource(os.fspath(data)).read()
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise InputError(f"{name}: found {type(data).__name__}, expected bytes, a path, an image or an array")
    if not len(data):
        raise InputError(f"{name}: the file is empty")
    return bytes(data)


def _name(data: Any, default: str) -> str:
    return display(os.fspath(data)) if isinstance(data, (str, os.PathLike)) else default
