"""Widely used pretrained codecs, loaded with transformers (extra `pretrained`), as tokenizers.

Shapes: S samples, T time steps, h rows and w columns of codes.

A folder that `save` writes holds a copy of the weights, so that a model does not depend on where they came from. The codes
have no levels, so a decoder learns one embedding row for each, and there are no continuous features.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtx.errors import InputError
from mmtx.extras import require
from mmtx.json_files import read_json, write_json
from mmtx.modality.audio import check_waveform
from mmtx.modality.base import Encoding, MediaTokenizer, check_codes, read_config
from mmtx.modality.image import ImageConfig, ImageTokenizer
from mmtx.saved_folder import CONFIG
from mmtx.schema import build as check_settings
from mmtx.schema import shown
from mmtx.weights import load_module

AUDIO = {"encodec": "EncodecModel", "dac": "DacModel", "mimi": "MimiModel"}
IMAGE = {"chameleon_vqgan": "ChameleonVQVAE", "emu3_vqgan": "Emu3VQVAE"}
# Defaults of transformers' image processors without a preprocessor_config.json: (rescale_factor, mean, std).
PIXELS = {
    "chameleon_vqgan": (0.0078, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    "emu3_vqgan": (1 / 255, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
}


@dataclass(frozen=True)
class AudioSettings:
    """`codebooks`: number of the codec's codebooks that are used."""

    codebooks: int


@dataclass(frozen=True)
class ImageSettings:
    """`side` and `fit` as in `ImageConfig`; the network's inputs are (pixel * `scale` - `mean`) / `std`."""

    side: int | None
    fit: Literal["pad", "crop", "resize"]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        if len(self.mean) != 3 or len(self.std) != 3 or min(abs(number) for number in (self.scale, *self.std)) < 1e-9:
            raise InputError("scale, mean, std: expected three means, three standard deviations, and a scale and std other than 0")


class Pretrained(MediaTokenizer, nn.Module):
    """Base class of the adapters. `settings` is the content of config.json, verbatim: the fingerprint depends on it."""

    Settings: type  # schema of config.json, except for the network
    models: dict[str, str]  # model_type of the configuration -> class in transformers
    network: Any  # a model of transformers, each with an interface of its own

    def __init__(self, network: Any, settings: dict[str, Any]):
        super().__init__()
        self.network, self.settings = network.eval().requires_grad_(False), settings

    @classmethod
    def wrap(cls, network: Any, **settings: Any) -> Self:
        """An adapter for a transformers model in memory. `settings` as in `from_pretrained`."""
        values = {name: value for name, value in network.config.to_dict().items()
                  if name not in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")}
        return cls(network.float(), {"kind": f"pretrained {cls.kind}", "network": values, **settings})

    @classmethod
    def load(cls, folder: Path) -> Any:
        """Load the codec in a folder of transformers: on its own, or as the part `vq_config` of a larger model."""
        transformers = require_transformers()
        values = read_json(folder / CONFIG)
        values = values.get("vq_config", values) if isinstance(values, dict) else None
        kind = values.get("model_type") if isinstance(values, dict) else None
        if not isinstance(kind, str) or kind not in cls.models:
            raise InputError(f"{folder / CONFIG}: field 'model_type' is {shown(kind)}, expected one of {', '.join(cls.models)}")
        name = cls.models[kind]
        try:
            if (folder / "model.safetensors.index.json").exists() or "vq_config" in read_json(folder / CONFIG):
                network = build(transformers, name, values)
                network.load_state_dict(part(folder, "vqmodel."))
                return network
            return getattr(transformers, name).from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{folder}: not a whole {name} ({' '.join(str(error).split())[:150]})") from None

    @classmethod
    def from_folder(cls, folder: Path) -> "Pretrained":
        transformers, folder = require_transformers(), Path(folder)
        settings, where = read_config(folder, f"pretrained {cls.kind}"), folder / CONFIG
        check_settings(cls.Settings, {name: value for name, value in settings.items() if name not in ("kind", "network")}, where)
        values = settings.get("network")
        if not isinstance(values, dict) or not isinstance(values.get("model_type"), str) or values["model_type"] not in cls.models:
            raise InputError(f"{where}: field 'network' does not name a codec of {', '.join(cls.models)}")

        def make() -> nn.Module:
            try:
                return build(transformers, cls.models[values["model_type"]], values)
            except InputError:
                raise
            except Exception as error:  # the library may raise anything for invalid values
                raise InputError(f"{where}: field 'network' makes no {cls.models[values['model_type']]} "
                                 f"({type(error).__name__}: {' '.join(str(error).split())[:100]})") from None

        network = load_module(make, folder / "model.safetensors")
        try:
            return cls(network, settings)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def files(self) -> dict[str, bytes]:
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        return {CONFIG: write_json(self.settings), "model.safetensors": safetensors.torch.save(weights)}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @abstractmethod
    def encode(self, medium: Tensor) -> np.ndarray: ...

    def encode_batch(self, media: Iterable[Tensor]) -> list[np.ndarray]:
        """Media of any sizes -> codes of each. One by one: padding would change the codes of these networks."""
        return [self.encode(medium) for medium in media]

    def embed_batch(self, media: Sequence[Tensor], patches: bool = False, codes: bool = True) -> list[Encoding]:
        """As `encode_batch`, without features."""
        return [Encoding(found, None) for found in self.encode_batch(media)]

    def _checked(self, codes: np.ndarray) -> Tensor:
        codes = self.as_grid(codes)
        check_codes(codes, range(self.size), f"{self.kind} codes")
        return torch.from_numpy(codes.astype(np.int64)).to(self.device)


class PretrainedAudio(Pretrained):
    """EnCodec, DAC or Mimi: sound (S,) at `rate` to codes (T, bands), coarse to fine, and back.

    https://arxiv.org/abs/2210.13438, https://arxiv.org/abs/2306.06546, https://arxiv.org/abs/2410.00037. A band is a residual
    codebook: band b has the codes [b * entries, (b + 1) * entries). The stream writes the bands of a time step one after another
    (the flattened pattern): exact, but with `bands` ids per step, where a delay pattern would write them in parallel.
    """

    kind = "audio"
    models = AUDIO
    Settings = AudioSettings

    def __init__(self, network: Any, settings: dict[str, Any]):
        super().__init__(network, settings)
        c = network.config
        if c.model_type == "encodec" and (c.normalize or c.audio_channels != 1 or c.chunk_length_s is not None):
            raise InputError("pretrained audio: found an EnCodec that is stereo, or needs loudness beside its codes; "
                             "expected one like encodec_24khz")
        self.books = getattr(c, "n_codebooks", None) or c.num_quantizers
        if not 1 <= self.bands <= self.books:
            raise InputError(f"codebooks: found {self.bands}, expected 1 to {self.books}")
        self.entries = c.codebook_size
        self.hop = c.frame_size if c.model_type == "mimi" else c.hop_length  # samples per time step

    @classmethod
    def from_pretrained(cls, folder: str | Path, codebooks: int = 4) -> "PretrainedAudio":
        """Read a folder of transformers. `codebooks`: how many of the first ones to use; more sound better and cost more."""
        return cls.wrap(cls.load(Path(folder)), codebooks=codebooks)

    @property
    def bands(self) -> int:  # type: ignore[override]  # the contract lets it be a property
        """Codes per time step."""
        return self.settings["codebooks"]

    @property
    def size(self) -> int:
        return self.bands * self.entries

    @property
    def rate(self) -> int:
        """Samples per second."""
        return self.network.config.sampling_rate

    @property
    def codes_per_second(self) -> float:  # type: ignore[override]  # the contract lets it be a property
        return self.rate / self.hop * self.bands

    def grid(self, waveform: Tensor) -> tuple[int, int]:
        """Time steps and bands of the codes of a waveform (S,)."""
        return max(1, math.ceil(len(waveform) / self.hop)), self.bands

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> np.ndarray:
        """Waveform (S,) of any length, padded with silence to whole steps -> codes (T, bands)."""
        check_waveform(waveform)
        steps, bands = self.grid(waveform)
        sound = F.pad(waveform, (0, steps * self.hop - len(waveform))).to(self.device)[None, None]
        kind = self.network.config.model_type
        if kind == "encodec":
            bandwidth = self.network.config.target_bandwidths[-1]
            found = self.network.encode(sound, bandwidth=bandwidth).audio_codes[0]
        else:
            found = self.network.encode(sound, **{"dac": {"n_quantizers": bands},
                                                  "mimi": {"num_quantizers": bands}}[kind]).audio_codes
        codes = found[0, :bands].T                                                        # (T, bands)
        return (codes + self.entries * torch.arange(bands, device=codes.device)).cpu().numpy()

    @torch.no_grad()
    def decode(self, codes: np.ndarray) -> Tensor:
        """Codes (T, bands) -> waveform (T * hop,). A code of another band counts as the same entry of its own band."""
        codes = self._checked(codes)
        entries = (codes % self.entries).T[None]                                          # (1, bands, T)
        if self.network.config.model_type == "encodec":
            sound = self.network.decode(entries[None], [None]).audio_values
        else:
            sound = self.network.decode(audio_codes=entries).audio_values
        sound, length = sound.flatten(), len(codes) * self.hop
        return F.pad(sound[:length], (0, max(0, length - len(sound)))).clamp(-1, 1).cpu()


class PretrainedImage(Pretrained):
    """The VQ-GANs of Chameleon and Emu3: pictures, uint8 (3, H, W), to codes (h, w), and back.

    https://arxiv.org/abs/2405.09818, https://arxiv.org/abs/2409.18869. transformers has no decoder for Chameleon's codes.
    """

    kind = "image"
    models = IMAGE
    Settings = ImageSettings

    def __init__(self, network: Any, settings: dict[str, Any]):
        super().__init__(network, settings)
        patch = 2 ** (len(network.config.channel_multiplier) - 1)
        self.config = ImageConfig(patch=patch, side=settings["side"], fit=settings["fit"])
        self.decodes = hasattr(network, "decode")
        mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, side: int | None = 512,
                        fit: Literal["pad", "crop", "resize"] = "crop") -> "PretrainedImage":
        """Read a folder of transformers; only the quantizer of a whole Chameleon or Emu3. `side`, `fit`: see `ImageConfig`."""
        network, path = cls.load(Path(folder)), Path(folder) / "preprocessor_config.json"
        found = read_json(path) if path.exists() else {}
        scale, mean, std = PIXELS[network.config.model_type]
        return cls.wrap(network, side=side, fit=fit, scale=found.get("rescale_factor", scale),
                        mean=found.get("image_mean", mean), std=found.get("image_std", std))

    def fit(self, picture: Tensor) -> Tensor:
        """As `ImageTokenizer.fit`."""
        return ImageTokenizer.fit(cast(ImageTokenizer, self), picture)

    def grid(self, picture: Tensor) -> tuple[int, int]:
        """As `ImageTokenizer.grid`."""
        return ImageTokenizer.grid(cast(ImageTokenizer, self), picture)

    @property
    def size(self) -> int:
        c = self.network.config
        return getattr(c, "codebook_size", None) or c.num_embeddings

    @torch.no_grad()
    def encode(self, picture: Tensor) -> np.ndarray:
        """A picture, uint8 (3, H, W) of any size -> codes (h, w)."""
        fitted = self.fit(picture)
        pixels = ((fitted.to(self.device) * self.settings["scale"] - self.mean) / self.std)[None]
        sizes = {} if self.network.config.model_type == "chameleon_vqgan" else {"image_sizes": [fitted.shape[-2:]]}
        codes = self.network.encode(pixels, **sizes).image_tokens[0 if sizes else slice(None)]
        return codes.view(self.grid(fitted)).cpu().numpy()

    @torch.no_grad()
    def decode(self, codes: np.ndarray) -> Tensor:
        """Codes (h, w) -> a picture, uint8 (3, patch*h, patch*w). Raises InputError for Chameleon."""
        codes = self._checked(codes)
        if not self.decodes:
            raise InputError("image codes of Chameleon: found no decoder in transformers; its pictures are input only")
        pixels = (self.network.decode(codes[None])[0] * self.std + self.mean) / self.settings["scale"]
        return pixels.round().clamp(0, 255).to(torch.uint8).cpu()


def require_transformers():
    return require("transformers", "pretrained", "pretrained codecs")


def build(transformers, name: str, values: dict[str, Any]) -> nn.Module:
    """A model of transformers in float32, with the weights that its constructor initialises."""
    cls = getattr(transformers, name)
    values = {key: value for key, value in values.items() if key != "model_type"}
    return cls(cls.config_class(**values)).float()


def part(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights in a folder whose names contain `name`, keyed by the rest of the name; others are not read."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            found |= {key.partition(name)[2]: file.get_tensor(key) for key in file.keys() if name in key}
    return found
