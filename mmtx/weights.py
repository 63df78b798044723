"""Weights in safetensors files: compared with the network that they are for, before anything of either is allocated."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmtx.errors import InputError
from mmtx.files import CONFIG, open_regular, parse_json
from mmtx.schema import shown

M = TypeVar("M", bound=nn.Module)

MOST_HEADER = 16 * 2**20  # bytes
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
         "U8": 1, "BOOL": 1}
TABLES = {torch.zeros, torch.full, torch.arange}  # what networks make tables of, beside weights
FACTORIES = TABLES | {torch.empty, torch.ones, torch.rand, torch.randn}
MOST_TABLE = 2**26  # numbers
DRAWS = {Tensor.normal_, Tensor.uniform_}
FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
DIGEST = "sha256"  # name of its entry in the header's metadata; files of other programs and of earlier versions have none
PICKLES = ("pytorch_model.bin", "model.bin", "model.pt", "model.pth", "model.ckpt")


class Place(NamedTuple):
    """A tensor of a file: its type, its shape, and the bytes that it takes, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a safetensors file says about itself; `data` is where its tensors begin."""

    tensors: dict[str, Place]
    metadata: dict[str, str]
    data: int


def read_header(file: Any, size: int, where: str | Path) -> Header:
    """The header of an open safetensors file of `size` bytes. Raises InputError unless its tensors fill the file."""
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= min(MOST_HEADER, size - 8):
        raise InputError(f"{where}: not a safetensors file (found {size} bytes, and a header of {length}); weights of "
                         "other formats, such as pickles, are not read")
    values = parse_json(file.read(length), where)
    metadata = values.pop("__metadata__", {}) if isinstance(values, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InputError(f"{where}: not a safetensors file (its header is no object of tensors)")
    tensors = {name: _place(name, value, where) for name, value in values.items()}
    end = 0
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != end or place.stop - place.start != math.prod(place.shape) * SIZES[place.dtype]:
            raise InputError(f"{where}: tensor {shown(name)} {place.dtype} {shown(str(place.shape))} lies at bytes "
                             f"{place.start} to {place.stop}, expected it at {end} and of that size")
        end = place.stop
    if 8 + length + end != size:
        raise InputError(f"{where}: found {size} bytes, expected {8 + length + end}")
    return Header(tensors, metadata, 8 + length)


def _place(name: str, value: Any, where: str | Path) -> Place:
    try:
        (start, stop), shape, dtype = value["data_offsets"], value["shape"], value["dtype"]
        if set(value) == {"data_offsets", "shape", "dtype"} and dtype in SIZES and len(shape) <= 8 and all(
                type(number) is int and 0 <= number < 2**48 for number in (start, stop, *shape)):
            return Place(dtype, tuple(shape), start, stop)
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f"{where}: tensor {shown(name)} is not described as a safetensors file does")


def load_module(build: Callable[[], M], path: Path) -> M:
    """What `build` makes, with the weights of a file. Raises InputError that names the file and the tensor."""
    for name in PICKLES:
        if not path.exists() and (path.parent / name).exists():
            raise InputError(f"{path}: no such file; found {name}, a pickle, which is code and is not read")
    try:
        with open(open_regular(path), "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            header = read_header(file, size, path)
            with _Reading(header, path):
                module = build()
            _compare(header.tensors, module.state_dict(), path)
            file.seek(0)
            data = file.read(size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if (expected := header.metadata.get(DIGEST)) is not None:
        view = memoryview(data)[header.data:]
        parts = ((name, place.dtype, place.shape, view[place.start:place.stop])
                 for name, place in sorted(header.tensors.items()))
        if _digest(parts) != expected:
            raise InputError(f"{path}: its checksum does not fit: it has changed since it was written")
    try:
        weights = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({str(error)[:100]})") from None
    for name, tensor in weights.items():
        tensor = weights[name] = tensor.float() if tensor.is_floating_point() else tensor
        # Of finite values the sum may still overflow.
        if tensor.is_floating_point() and not (math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())):
            raise InputError(f"{path}: tensor {shown(name)} holds values that are not finite")
    module.load_state_dict(weights)
    return module


def _compare(found: Mapping[str, Place], expected: Mapping[str, Tensor], path: Path) -> None:
    for name in sorted({*found, *expected}):
        if name not in found or name not in expected:
            told = "no tensor" if name not in found else "a tensor"
            raise InputError(f"{path}: does not fit {CONFIG}: found {told} {shown(name)}, expected "
                             f"{'one' if name in expected else 'none'}")
        dtype, shape, tensor = found[name].dtype, found[name].shape, expected[name]
        fits = dtype in FLOATS if tensor.is_floating_point() else dtype == DTYPES.get(tensor.dtype)
        if shape != tuple(tensor.shape) or not fits:
            raise InputError(f"{path}: does not fit {CONFIG}: tensor {shown(name)} is {dtype} {shown(str(shape))}, "
                             f"expected {'floats' if fits else tensor.dtype} {tuple(tensor.shape)}")


def to_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """A safetensors file with a digest of its tensors, by which damage of their values is known."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    parts = ((name, DTYPES[tensor.dtype], tuple(tensor.shape), tensor.view(-1).view(torch.uint8).numpy())
             for name, tensor in sorted(weights.items()))
    return safetensors.torch.save(weights, {DIGEST: _digest(parts)})


def _digest(parts: Iterable[tuple[str, str, tuple[int, ...], Any]]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors in the order of their names."""
    digest = hashlib.sha256()
    for name, dtype, shape, data in parts:
        digest.update(f"{name} {dtype} {shape}".encode())
        digest.update(data)
    return digest.hexdigest()


class _Reading(TorchFunctionMode):
    """Makes a network whose values are read: none are drawn, and no more is allocated than a file has, but small tables.

    A configuration of absurd sizes is refused before its first tensor that is too many, or too large, is there.
    """

    def __init__(self, header: Header, path: Path):
        self.path = path
        self.tensors, self.numbers = len(header.tensors), sum(math.prod(place.shape) for place in header.tensors.values())
        self.calls, self.room = 16 * self.tensors + 1024, 2 * self.numbers + 2**20

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return arguments[0] if arguments else options["tensor"]
        if function in DRAWS:
            # Not left as it is: torch's truncated normal draws until all values are within its bounds.
            return arguments[0].zero_()
        if function in FACTORIES:
            self._count(function, options.get("size", arguments))
        return function(*arguments, **options)

    def _count(self, function: Callable, sizes: Any) -> None:
        sizes = sizes[0] if sizes and isinstance(sizes[0], tuple | list) else sizes
        sizes = [abs(size) for size in sizes if isinstance(size, int)]
        size = max(sizes, default=1) if function is torch.arange else math.prod(sizes)
        self.calls -= 1
        if function not in TABLES:
            self.room -= size
        if self.calls < 0 or self.room < 0 or size > self.room + MOST_TABLE:
            raise InputError(f"{self.path}: does not fit {CONFIG}: found {self.tensors} tensors of {self.numbers} numbers, "
                             "expected more")
