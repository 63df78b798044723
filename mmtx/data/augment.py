"""Small random changes to pictures and sounds that leave their captions true.

Shapes: C=3 channels, H, W pixels, S samples. All randomness comes from the generator that is passed in.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class ImageAugmentation:
    """Ranges of the changes to a picture; 0 turns one off.

    zoom: size factor in [1/(1+zoom), 1+zoom]; stretch: the same for the ratio of the sides; shift: share of a side;
    turn: degrees; colour: saturation factor in [1-colour, 1+colour], and gamma of each channel by half as much.
    """

    zoom: float = 0.25
    stretch: float = 0.15
    shift: float = 0.1
    turn: float = 8.0
    colour: float = 0.5

    def __call__(self, picture: Tensor, generator: Generator) -> Tensor:
        """uint8 (3, H, W) -> uint8 (3, H, W); what comes in from outside is white."""
        zoom, stretch, right, down, turn, saturation, red, green, blue = (
            2 * torch.rand(9, generator=generator) - 1).tolist()
        size = (1 + self.zoom) ** zoom
        ratio = (1 + self.stretch) ** (stretch / 2)
        angle = math.radians(self.turn) * turn
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = torch.tensor([[[size * ratio * cos, -size / ratio * sin, 2 * self.shift * right],
                                [size * ratio * sin, size / ratio * cos, 2 * self.shift * down]]])
        # Ink on white: outside of the picture grid_sample gives 0, which is white here.
        ink = 1 - picture[None].float() / 255
        grid = F.affine_grid(matrix, list(ink.shape), align_corners=False)
        light = 1 - F.grid_sample(ink, grid, mode="bilinear", align_corners=False)[0]
        if self.colour:
            grey = light.mean(0, keepdim=True)
            light = (grey + (light - grey) * (1 + self.colour * saturation)).clamp(0, 1)
            gamma = torch.tensor([red, green, blue]).mul(self.colour / 2).exp()
            light = light.pow(gamma[:, None, None])
        return (light * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class AudioAugmentation:
    """Ranges of the changes to a sound; 0 turns one off.

    shift: seconds forward or back (silence fills the gap); tilt: highs against lows, in [0, 1); noise: amplitude;
    gain: loudness factor in [1 - gain, 1]; speed: semitones up or down by which it plays faster or slower, for codecs
    and vocoders alone: a caption that names a note would become false.
    """

    shift: float = 0.1
    tilt: float = 0.5
    noise: float = 0.003
    gain: float = 0.6
    speed: float = 0.0

    def __call__(self, waveform: Tensor, rate: int, generator: Generator) -> Tensor:
        """Waveform (S,) at `rate` -> waveform (S,)."""
        shift, tilt, noise, gain = torch.rand(4, generator=generator).tolist()
        if self.speed:
            factor = 2 ** (self.speed * (2 * float(torch.rand((), generator=generator)) - 1) / 12)
            played = F.interpolate(waveform[None, None], size=round(len(waveform) / factor), mode="linear")[0, 0]
            waveform = F.pad(played, (0, max(0, len(waveform) - len(played))))[:len(waveform)]
        samples = round((2 * shift - 1) * self.shift * rate)
        if samples >= 0:
            moved = F.pad(waveform, (samples, 0))[:len(waveform)]
        else:
            moved = F.pad(waveform[-samples:], (0, min(-samples, len(waveform))))
        moved = moved + (2 * tilt - 1) * self.tilt * F.pad(moved, (1, 0))[:-1]
        moved = moved * (1 - gain * self.gain)
        return moved + noise * self.noise * torch.randn(len(moved), generator=generator)
