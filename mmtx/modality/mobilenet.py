"""MobileNet as an encoder of sounds: a CNN pretrained on far more sounds than your own data.

MobileNet v1 (https://arxiv.org/abs/1704.04861) as YAMNet uses it for spectrograms, with batch norms folded into the preceding
convolutions (`demos/data/build_audio_encoder.py`).

Shapes: B batch, t time steps and b bands of a grid of patches, F frames, M mels of the tokenizer, m mels of the network, P numbers
in a patch, C channels, D width.
"""

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtx.config import MobileNetConfig
from mmtx.modality.efficientnet import SameConv2d
from mmtx.modality.grids import by_size
from mmtx.modality.log_mel import CENTRE, FLOOR, SPREAD

OFFSET = 1e-3    # that YAMNet adds to mel magnitudes before the logarithm
CHUNK = 512      # time steps of a sound in one pass, so that memory does not grow with its length
AT_ONCE, AT_ONCE_ON_GPU = 2 ** 11, 2 ** 17  # patches in one pass


@lru_cache
def band_places(mels: int, low: float, high: float, of_mels: int, of_low: float, of_high: float) -> Tensor:
    """Where the centres of bands on HTK's mel scale lie among `of_mels` bands on Slaney's, counted from 0, (mels,)."""
    htk = lambda hertz: 2595 * math.log10(1 + hertz / 700)
    slaney = lambda hertz: 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)
    step, of_step = (htk(high) - htk(low)) / (mels + 1), (slaney(of_high) - slaney(of_low)) / (of_mels + 1)
    centres = [700 * (10 ** ((htk(low) + (band + 1) * step) / 2595) - 1) for band in range(mels)]
    return torch.tensor([(slaney(centre) - slaney(of_low)) / of_step - 1 for centre in centres])


class SeparableConv2d(nn.Module):
    """A depthwise convolution, then a pointwise one, each followed by ReLU."""

    def __init__(self, width: int, channels: int, stride: int):
        super().__init__()
        self.mix = SameConv2d(width, width, 3, stride, groups=width)
        self.project = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, `channels`, H / stride, W / stride)."""
        return F.relu(self.project(F.relu(self.mix(x), inplace=True)), inplace=True)


class MobileNet(nn.Module):
    """Patches of log-mel spectrograms -> the outputs of some layers, averaged over the bands of each patch, each channel scaled."""

    def __init__(self, config: MobileNetConfig):
        super().__init__()
        self.config = config
        self.gain = nn.Parameter(torch.zeros(config.mels))  # log of each band's width, relative to that of the tokenizer's
        width = config.width - config.patches.width
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.stem = SameConv2d(1, config.stem, 3, stride=2)
        widths = [config.stem, *(layer.channels for layer in config.layers)]
        self.strides = [*accumulate((layer.stride for layer in config.layers), operator.mul, initial=2)][1:]
        self.layers = nn.ModuleList(SeparableConv2d(width, layer.channels, layer.stride)
                                    for width, layer in zip(widths, config.layers))

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Patches (n, P) of grids, row by row -> features (n, D); sounds of equal length share a pass."""
        pieces = [(min(CHUNK, steps - first), bands) for steps, bands in grids for first in range(0, steps, CHUNK)]
        return by_size(patches, pieces, self._grids, AT_ONCE if patches.device.type == "cpu" else AT_ONCE_ON_GPU)

    def _grids(self, patches: Tensor) -> Tensor:
        """Patches (B, t, b, P) -> features (B, t, b, D)."""
        c = self.config
        mel = patches[..., :c.patch_frames * c.patch_mels]  # without the pitch that patches may hold, too
        x = self.spectrogram(rearrange(mel, "b t w (f m) -> b (t f) (w m)", f=c.patch_frames))
        x = F.relu(self.stem(x[:, None].contiguous(memory_format=torch.channels_last)), inplace=True)
        found, (steps, bands) = [], patches.shape[1:3]
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in c.outputs:
                pooled = F.adaptive_avg_pool2d(x, (x.shape[2], bands))
                at = torch.arange(steps, device=x.device) * c.patch_frames // self.strides[index]
                found.append(rearrange(pooled[:, :, at], "b c t w -> b t w c"))
        return torch.cat(found, -1) * self.scale + self.shift

    def spectrogram(self, mel: Tensor) -> Tensor:
        """Scaled log-mel (B, F, M) of the tokenizer -> about the log-mel (B, F, m) that the network was trained on."""
        c = self.config
        places = band_places(c.mels, c.low, c.high, mel.shape[-1], c.from_low, c.from_high)
        below = places.floor().long().clamp(0, mel.shape[-1] - 2)
        share = (places - below).clamp(0, 1).to(mel)
        below = below.to(mel.device)
        mel = torch.lerp(mel[..., below], mel[..., below + 1], share)
        magnitude = (mel * SPREAD + CENTRE).exp() - FLOOR
        return (magnitude.clamp_min(0) * self.gain.exp() + OFFSET).log()
