"""Loss terms of a codec in addition to its reconstruction error: a perceptual distance and a discriminator.

Shapes: B batch, C channels, H height and W width of a picture (frames and mels of a spectrogram).
"""

import difflib
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtx.errors import InputError
from mmtx.schema import typed, within

LARGEST = 1e4           # largest scale of the adversarial term, as in VQGAN
MOST_WEIGHT = 10**9     # of a term in the loss


@typed
@dataclass(frozen=True)
class PerceptualConfig:
    """Distance of pictures in the features of a pretrained network, which the user supplies.

    Args:
        network: import path of its constructor (`torchvision.models.vgg16`, `timm.create_model`, a function of your own).
        layers: names of the features, as in torchvision's `create_feature_extractor`.
        weight: weight of the distance in the loss.
        arguments: keyword arguments of the constructor.
        weights: file of its weights, .safetensors or a state dict of torch; without it the constructor must return a trained network.
        mean: mean of the pixels in [0, 1] that it was trained with; by default ImageNet's.
        std: their standard deviation; by default ImageNet's.
    """

    network: str
    layers: list[str]
    weight: float = 0.1
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        within("perceptual.weight", self.weight, 0, MOST_WEIGHT)


@typed
@dataclass(frozen=True)
class AdversarialConfig:
    """A discriminator that learns to tell reconstructions from originals, and the weight of its term in the codec's loss.

    Args:
        weight: norm of the term's gradient at the reconstruction, relative to that of all other terms.
        start_step: step from which the discriminator is used and trained.
        width: channels of its first layer.
        depth: number of its layers, each of which halves the sides.
        learning_rate: its peak learning rate, with the codec's schedule.
    """

    weight: float = 0.5
    start_step: int = 1000
    width: int = 32
    depth: int = 3
    learning_rate: float = 4e-4

    def __post_init__(self):
        for name, least, most in (("width", 1, 2**14), ("depth", 1, 16), ("start_step", 0, 10**9), ("weight", 0, MOST_WEIGHT),
                                  ("learning_rate", 0, 100)):
            within(f"adversarial.{name}", getattr(self, name), least, most)


class Perceptual:
    """Mean squared difference of channel-normalised features: LPIPS (https://arxiv.org/abs/1801.03924) without learned weights.

    Not a module: the network must not be trained, averaged or saved.
    """

    def __init__(self, config: PerceptualConfig):
        """Raises InputError for a network that cannot be built or is untrained, or a layer or file that does not fit it."""
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        self.config = config
        network = _make(config)
        if config.weights is not None:
            _load(network, Path(config.weights))
        # A trained network has the same weights with every seed. An untrained one would judge by chance, and no figure would show it.
        elif not all(map(torch.equal, network.state_dict().values(), _make(config, 1).state_dict().values())):
            raise InputError(f"perceptual.weights: found none, and {config.network} makes a network with random "
                             "weights; expected a file with weights, or `arguments` with which it comes trained "
                             "(torchvision: weights: DEFAULT, timm: pretrained: true)")
        network.eval().requires_grad_(False)
        try:
            names = get_graph_node_names(network)[1]
        except Exception as error:
            raise InputError(f"perceptual.network: {config.network} cannot be traced by torch.fx "
                             f"({' '.join(str(error).split())[:200]})") from None
        for layer in config.layers or [""]:
            if layer not in names and not any(name.startswith(f"{layer}.") for name in names if layer):
                near = difflib.get_close_matches(layer, names, 5, 0.0)
                raise InputError(f"perceptual.layers: found {layer!r}, expected layers of {config.network}: "
                                 f"{', '.join(near)}, ...")
        self.network = create_feature_extractor(network, config.layers)
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> their mean distance, ()."""
        self.network.to(output.device)
        with torch.no_grad():
            wanted = self._features(target)
        found = self._features(output)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(found, wanted, strict=True)]).mean()

    def _features(self, pictures: Tensor) -> list[Tensor]:
        pixels = ((pictures + 1) / 2 - self.mean.to(pictures)) / self.std.to(pictures)
        return [F.normalize(features, dim=1) for features in self.network(pixels).values()]


def _make(config: PerceptualConfig, seed: int = 0) -> nn.Module:
    """Build the network, without affecting the random numbers of the run."""
    module, _, name = config.network.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), name)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network = make(**config.arguments)
    except Exception as error:
        raise InputError(f"perceptual.network: {config.network} cannot be made "
                         f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    if not isinstance(network, nn.Module):
        raise InputError(f"perceptual.network: {config.network} gives {type(network).__name__}, "
                         "expected a torch.nn.Module")
    return network


def _load(network: nn.Module, path: Path) -> None:
    try:
        state = (safetensors.torch.load_file(path) if path.suffix == ".safetensors"
                 else torch.load(path, map_location="cpu", weights_only=True))
        network.load_state_dict(state)
    except Exception as error:
        raise InputError(f"perceptual.weights: {path}: not weights of this network "
                         f"({' '.join(str(error).split())[:200]})") from None


class Discriminator(nn.Sequential):
    """A patch discriminator (https://arxiv.org/abs/1611.07004) of pictures or of spectrograms."""

    def __init__(self, channels: int, config: AdversarialConfig):
        layers: list[nn.Module] = []
        for number in range(config.depth):
            width = config.width * 2 ** min(number, 3)
            # With padding 2, even a single row gets at least one score.
            layers.append(nn.Conv2d(channels, width, 4, stride=2, padding=2))
            if number:
                layers.append(nn.GroupNorm(1, width))
            layers.append(nn.LeakyReLU(0.2))
            channels = width
        super().__init__(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, media: Tensor) -> Tensor:
        """Pictures (B, C, H, W) or spectrograms (B, H, W) -> a score for each patch, (B, 1, h, w)."""
        return super().forward(media if media.dim() == 4 else media[:, None])

    def generator_loss(self, output: Tensor) -> Tensor:
        """The codec's loss: minus the mean score. The discriminator's own weights get no gradient."""
        fixed = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return -torch.func.functional_call(self, fixed, (output,)).mean()

    def discriminator_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The discriminator's loss: the hinge loss. The codec gets no gradient."""
        return (F.relu(1 - self(target)).mean() + F.relu(1 + self(output.detach())).mean()) / 2

    def zero_loss(self) -> Tensor:
        """Zero, with a zero gradient for every weight: distributed training expects one in every step."""
        return cast(Tensor, sum(parameter.sum() for parameter in self.parameters())) * 0.0


def adaptive_weight(term: Tensor, rest: Tensor, output: Tensor) -> Tensor:
    """The factor that scales the gradient of `term` at `output` to the norm of that of `rest`.

    VQGAN (https://arxiv.org/abs/2012.09841) takes the gradients at the last layer's weights instead.
    """
    theirs, ours = (torch.autograd.grad(loss, output, retain_graph=True)[0].float().norm() for loss in (rest, term))
    return (theirs / ours.clamp_min(1e-12)).clamp_max(LARGEST)
