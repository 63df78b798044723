"""EfficientNet as an image encoder: a CNN pretrained on far more pictures than your own data.

EfficientNet (https://arxiv.org/abs/1905.11946) in its Lite form: ReLU6, and no squeeze-and-excitation. Batch norms are folded
into the preceding convolutions (`demos/data/build_image_encoder.py`), so features do not depend on the rest of the batch.

Shapes: B batch, C channels, H height and W width in pixels, h rows and w columns of a grid of patches, P numbers in a patch, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtx.config import EfficientNetConfig, Stage
from mmtx.modality.grids import by_size

# Patches of equally sized pictures in one pass. On a CPU, activations should stay in its cache: with 8 x 8 patches on one core of
# an AMD EPYC, each of 64 pictures took 2.4 ms in batches of 16 and in place, 8.2 ms all at once and not in place (and 3.6 to 5.2 ms
# in smaller batches, for which torch has another 1 x 1 convolution on one thread).
AT_ONCE, AT_ONCE_ON_GPU = 2 ** 10, 2 ** 16


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: outputs have ceil(side / stride), and odd padding goes to the end."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        missing = [max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[-2:]]
        if any(pad % 2 for pad in missing):
            (top, bottom), (left, right) = ((pad // 2, pad - pad // 2) for pad in missing)
            x, missing = F.pad(x, (left, right, top, bottom)), [0, 0]
        padding = [pad // 2 for pad in missing]  # done by the convolution itself, without a copy of its input
        if self.groups > 1 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # Gradients of depthwise convolutions take 1.5 to 12 times as long in bfloat16: 72 ms in place of 9 for (14, 96, 65, 65),
            # 59 in place of 15 for (14, 672, 8, 8), on one core of an Intel Xeon with AMX, torch 2.14.1.
            with torch.autocast("cpu", enabled=False):
                return F.conv2d(x.float(), self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class InvertedBottleneck(nn.Module):
    """MBConv (https://arxiv.org/abs/1801.04381): expand, depthwise convolution, project; residual if the shapes match."""

    def __init__(self, width: int, stage: Stage, stride: int):
        super().__init__()
        inner = width * stage.expansion
        self.expand = nn.Conv2d(width, inner, 1) if stage.expansion > 1 else None
        self.mix = SameConv2d(inner, inner, stage.kernel, stride, groups=inner)
        self.project = nn.Conv2d(inner, stage.channels, 1)
        self.residual = stride == 1 and width == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, `channels`, H / stride, W / stride)."""
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.mix(y), inplace=True))
        return x + y if self.residual else y


class EfficientNetEncoder(nn.Module):
    """Patches of pictures -> features of the last stage with one position per patch, and those of the very last stage."""

    def __init__(self, config: EfficientNetConfig):
        super().__init__()
        self.patch, self.scale, self.fine = config.side, config.scale, config.fine_stage
        self.times = config.strides[-1] // config.strides[self.fine - 1]  # patches per side of a position of the last stage
        self.stem = SameConv2d(3, config.stem, 3, stride=2)
        self.stages = nn.ModuleList()
        width = config.stem
        for stage in config.stages:
            blocks = []
            for index in range(stage.blocks):
                blocks.append(InvertedBottleneck(width, stage, stage.stride if index == 0 else 1))
                width = stage.channels
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Patches (n, P) of grids, row by row -> features (n, D); pictures of equal size share a pass."""
        return by_size(patches, grids, self._grids, AT_ONCE if patches.device.type == "cpu" else AT_ONCE_ON_GPU)

    def _grids(self, patches: Tensor) -> Tensor:
        """Patches (B, h, w, P) -> features (B, h, w, D)."""
        pictures = rearrange(patches, "b h w (p q c) -> b c (h p) (w q)", p=self.patch, q=self.patch)
        return rearrange(self.features(pictures), "b c h w -> b h w c")

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> features (B, D, h, w)."""
        x = F.interpolate(pictures, scale_factor=self.scale, mode="bilinear") if self.scale > 1 else pictures
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)), inplace=True)
        for stage in self.stages[:self.fine]:
            x = stage(x)
        fine, (rows, columns) = x, x.shape[-2:]
        for stage in self.stages[self.fine:]:
            x = stage(x)
        if x is fine:
            return fine
        coarse = F.interpolate(x, scale_factor=self.times, mode="nearest")[..., :rows, :columns]
        return torch.cat([fine, coarse], 1)
