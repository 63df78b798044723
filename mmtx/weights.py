"""Weights in safetensors files, checked against their network before anything is allocated.

They are read and written in pieces, so that neither takes more memory than the network itself.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmtx.errors import InputError
from mmtx.files import open_regular
from mmtx.json_files import parse_json
from mmtx.saved_folder import CONFIG
from mmtx.schema import shown

M = TypeVar("M", bound=nn.Module)
Runs = Tensor | tuple[Tensor, ...]  # a tensor, or consecutive runs of its rows

MAX_HEADER_BYTES = 16 * 2**20  # bytes
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
         "U8": 1, "BOOL": 1}
TABLES = {torch.zeros, torch.full, torch.arange}  # with which networks make tables, as opposed to weights
FACTORIES = TABLES | {torch.empty, torch.ones, torch.rand, torch.randn}
MAX_TABLE_ELEMENTS = 2**26  # elements
RANDOM_INITIALIZERS = {Tensor.normal_, Tensor.uniform_}
FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
TYPES = {name: dtype for dtype, name in DTYPES.items()}
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "U8", "BOOL")  # of dtypes, in which safetensors writes tensors
PIECE = 2**24  # bytes read at a time
DIGEST = "sha256"  # its key in the header's metadata; files of other programs and of earlier versions have none
PICKLES = ("pytorch_model.bin", "model.bin", "model.pt", "model.pth", "model.ckpt")


class TensorInfo(NamedTuple):
    """A tensor in a file: its dtype, shape, and byte range, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """The header of a safetensors file; `data` is the offset at which its tensors begin."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data: int


def read_header(file: Any, size: int, where: str | Path) -> Header:
    """The header of an open safetensors file of `size` bytes. Raises InputError unless its tensors fill the file exactly."""
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise InputError(f"{where}: not a safetensors file (found {size} bytes, and a header of {length}); weights of "
                         "other formats, such as pickles, are not read")
    values = parse_json(file.read(length), where)
    metadata = values.pop("__metadata__", {}) if isinstance(values, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InputError(f"{where}: not a safetensors file (its header is not a JSON object of tensors)")
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


def _place(name: str, value: Any, where: str | Path) -> TensorInfo:
    try:
        (start, stop), shape, dtype = value["data_offsets"], value["shape"], value["dtype"]
        if set(value) == {"data_offsets", "shape", "dtype"} and dtype in SIZES and len(shape) <= 8 and all(
                type(number) is int and 0 <= number < 2**48 for number in (start, stop, *shape)):
            return TensorInfo(dtype, tuple(shape), start, stop)
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f"{where}: tensor {shown(name)} has an invalid entry in the header, expected dtype, shape and data_offsets")


def load_module(build: Callable[[], M], path: Path, loaded: Callable[[M, str], None] | None = None) -> M:
    """The module that `build` makes, with the weights of a file. Raises InputError that names the file and the tensor.

    Each weight is allocated only when its values are read, with the dtype that `build` gave it. `loaded(module, name)` is called
    after each weight, in the order of their names, and may replace it.
    """
    for name in PICKLES:
        if not path.exists() and (path.parent / name).exists():
            raise InputError(f"{path}: no such file; found {name}, a pickle, which can run code and is not read")
    try:
        with open(open_regular(path), "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            header = read_header(file, size, path)
            with _WithoutInitialization(header, path):
                module = build()
            expected: dict[str, Tensor] = module.state_dict(keep_vars=True)
            _compare(header.tensors, expected, path)
            return _fill(module, expected, file, header, path, loaded)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


@torch.no_grad()
def _fill(module: M, expected: dict[str, Tensor], file: Any, header: Header, path: Path,
          loaded: Callable[[M, str], None] | None) -> M:
    digest, odd = hashlib.sha256(), None
    names: dict[int, list[str]] = {}  # of each weight: third-party networks may share one under several names
    for name, tensor in expected.items():
        names.setdefault(id(tensor), []).append(name)
    for name, place in sorted(header.tensors.items()):
        tensor = expected[name]
        made = torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.data
        digest.update(_description(name, place.dtype, place.shape))
        file.seek(header.data + place.start)
        flat, first = made.view(-1), 0
        for data in _pieces(file, place.stop - place.start, path):
            digest.update(data)
            values = torch.frombuffer(data, dtype=TYPES[place.dtype])
            some = flat[first:first + len(values)].copy_(values)
            first += len(values)
            # The sum is the cheap test, but it may overflow for finite values.
            if odd is None and some.is_floating_point() and not (math.isfinite(some.sum()) or bool(some.isfinite().all())):
                odd = name
        if tensor.is_meta:
            kept = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
            for at in names[id(tensor)]:
                parent, _, last = at.rpartition(".")
                setattr(module.get_submodule(parent), last, kept)
        if loaded is not None:
            loaded(module, name)
    if header.metadata.get(DIGEST, found := digest.hexdigest()) != found:
        raise InputError(f"{path}: its checksum does not fit: it has changed since it was written")
    if odd is not None:
        raise InputError(f"{path}: tensor {shown(odd)} holds values that are not finite")
    return module


def _pieces(file: Any, size: int, path: Path) -> Iterator[memoryview]:
    """The next `size` bytes of a file in pieces, each in the same buffer as the one before."""
    room = memoryview(bytearray(min(size, PIECE)))
    while size:
        piece = room[:size]
        if (found := file.readinto(piece)) != len(piece):
            raise InputError(f"{path}: the file ends {size - found} bytes too early: it has changed since it was opened")
        size -= found
        yield piece


def _compare(found: Mapping[str, TensorInfo], expected: Mapping[str, Tensor], path: Path) -> None:
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


def weights_of(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a module by name, without what `torch.compile` adds to names."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in module.state_dict(prefix=prefix).items()}


def to_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """A safetensors file with a digest of its tensors, which reveals damaged values."""
    return b"".join(to_parts(weights))


def to_parts(weights: Mapping[str, Runs]) -> Iterator[Any]:
    """`to_bytes` in pieces. Looks up each tensor in `weights` twice, so that a mapping may make it on access."""
    digest, places = hashlib.sha256(), {}
    for name in sorted(weights):
        runs = _runs(weights[name])
        place = places[name] = _place_of(runs)
        digest.update(_description(name, place.dtype, place.shape))
        for run in runs:
            digest.update(_data(run))
        del runs
    return file_parts(weights, {DIGEST: digest.hexdigest()}, places)


def file_parts(weights: Mapping[str, Runs], metadata: Mapping[str, str],
               places: Mapping[str, TensorInfo] | None = None) -> Iterator[Any]:
    """A safetensors file in pieces, byte for byte what the library writes; `places` has dtypes and shapes, if known."""
    places = {name: _place_of(_runs(weights[name])) for name in weights} if places is None else places
    header: dict[str, Any] = {"__metadata__": metadata}
    order, start = sorted(places, key=lambda name: (ORDER.index(places[name].dtype), name)), 0
    for name in order:
        dtype, shape, _, size = places[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, start + size)}
        start += size
    described = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    described += b" " * (-len(described) % 8)
    yield len(described).to_bytes(8, "little")
    yield described
    for name in order:
        for run in _runs(weights[name]):
            yield _data(run)


def _runs(tensor: Runs) -> tuple[Tensor, ...]:
    return tensor if isinstance(tensor, tuple) else (tensor,)


def _place_of(runs: tuple[Tensor, ...]) -> TensorInfo:
    first, numbers = runs[0], sum(map(torch.numel, runs))
    shape = first.shape if len(runs) == 1 else (sum(map(len, runs)), *first.shape[1:])
    return TensorInfo(DTYPES[first.dtype], tuple(shape), 0, numbers * first.element_size())


def _data(tensor: Tensor) -> Any:
    """The bytes of a tensor as a NumPy array."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _description(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """What precedes a tensor's bytes in the digest of a file, a SHA-256 over all tensors in the order of their names."""
    return f"{name} {dtype} {shape}".encode()


class _WithoutInitialization(TorchFunctionMode):
    """Builds a network for weights that will be read: draws no values, and allocates only small tables.

    Raises InputError for a configuration far larger than the file, before it makes too many tensors or too large a one.
    """

    def __init__(self, header: Header, path: Path):
        self.path = path
        self.tensors, self.numbers = len(header.tensors), sum(math.prod(place.shape) for place in header.tensors.values())
        self.calls, self.room = 16 * self.tensors + 1024, 2 * self.numbers + 2**20

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return arguments[0] if arguments else options["tensor"]
        if function in RANDOM_INITIALIZERS:
            # Not left uninitialised: torch's truncated normal redraws until all values are within its bounds.
            return arguments[0].zero_()
        if function in FACTORIES:
            self._count(function, options.get("size", arguments))
        if function is torch.empty:
            options = {**options, "device": "meta"}
        return function(*arguments, **options)

    def _count(self, function: Callable, sizes: Any) -> None:
        sizes = sizes[0] if sizes and isinstance(sizes[0], tuple | list) else sizes
        sizes = [abs(size) for size in sizes if isinstance(size, int)]
        size = max(sizes, default=1) if function is torch.arange else math.prod(sizes)
        self.calls -= 1
        if function not in TABLES:
            self.room -= size
        if self.calls < 0 or self.room < 0 or size > self.room + MAX_TABLE_ELEMENTS:
            raise InputError(f"{self.path}: does not fit {CONFIG}: found {self.tensors} tensors of {self.numbers} numbers, "
                             "expected more")
