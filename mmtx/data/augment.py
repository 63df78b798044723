"""Augmentation: small random changes to pictures and sounds that keep their captions true.

Shapes: C=3 channels, H, W pixels, S samples. All randomness comes from the generator that is passed in.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmtx.schema import within

EQUALIZER_BANDS = 8  # bands of the equalizer
LOWEST = 60    # Hz, of its lowest band


@dataclass(frozen=True)
class ImageAugmentation:
    """Ranges of the changes to a picture; 0 turns one off.

    scale: size factor in [1/(1+scale), 1+scale]; stretch: the same for the aspect ratio; translate: share of a side; degrees: of
    rotation; color_jitter: saturation factor in [1-color_jitter, 1+color_jitter], and log gamma of each channel up to half as
    much; hue: degrees; shear: share of a side; blur: averages blocks of up to 1 + blur pixels a side; erase: in half of the
    pictures, paints over a rectangle with sides up to this share of the picture's; tint: share by which white may become
    darker. `grayscale`, `outline` (edges as dark lines) and `invert` are shares of pictures: icons of one colour have the
    shapes of coloured ones. These remove colours that a caption may name, so keep the shares small.
    """

    scale: float = 0.25
    stretch: float = 0.15
    translate: float = 0.1
    degrees: float = 8.0
    color_jitter: float = 0.5
    hue: float = 0.0
    shear: float = 0.0
    blur: float = 0.0
    erase: float = 0.0
    tint: float = 0.0
    grayscale: float = 0.0
    outline: float = 0.0
    invert: float = 0.0

    def __post_init__(self):
        for name, most in (("scale", 100), ("stretch", 100), ("translate", 1), ("degrees", 360), ("color_jitter", 1), ("hue", 360),
                           ("shear", 10), ("blur", 2**10), ("erase", 1), ("tint", 1), ("grayscale", 1), ("outline", 1),
                           ("invert", 1)):
            within(f"image_augmentation.{name}", getattr(self, name), 0, most)

    def __call__(self, picture: Tensor, generator: Generator) -> Tensor:
        """uint8 (3, H, W) -> uint8 (3, H, W); areas from outside the picture are white."""
        zoom, stretch, right, down, turn, saturation, red, green, blue = (
            2 * torch.rand(9, generator=generator) - 1).tolist()
        size = (1 + self.scale) ** zoom
        ratio = (1 + self.stretch) ** (stretch / 2)
        angle = math.radians(self.degrees) * turn
        cos, sin = math.cos(angle), math.sin(angle)
        slant = self.shear * (2 * float(torch.rand((), generator=generator)) - 1) if self.shear else 0.0
        aspect = picture.shape[2] / picture.shape[1]  # grid coordinates run from -1 to 1 on each axis, whatever its length
        matrix = torch.tensor([[[size * ratio * cos, size / ratio * (slant * cos - sin) / aspect, 2 * self.translate * right],
                                [size * ratio * sin * aspect, size / ratio * (slant * sin + cos), 2 * self.translate * down]]])
        # Inverted, since grid_sample pads with 0, which is to be white.
        ink = 1 - picture[None].float() / 255
        grid = F.affine_grid(matrix, list(ink.shape), align_corners=False)
        light = 1 - F.grid_sample(ink, grid, mode="bilinear", align_corners=False)[0]
        light = self._repaint(light, generator)
        if self.color_jitter:
            grey = light.mean(0, keepdim=True)
            light = (grey + (light - grey) * (1 + self.color_jitter * saturation)).clamp(0, 1)
            gamma = torch.tensor([red, green, blue]).mul(self.color_jitter / 2).exp()
            light = light.pow(gamma[:, None, None])
        return (light * 255).round().to(torch.uint8)

    def _repaint(self, light: Tensor, generator: Generator) -> Tensor:
        """Light (3, H, W) in [0, 1] -> the same shapes recoloured or partly hidden; draws no random numbers if all is off."""
        rand = lambda *size: torch.rand(size, generator=generator)
        if self.hue:
            light = rotate_hue(light, math.radians(self.hue) * float(2 * rand() - 1)).clamp(0, 1)
        if self.blur:
            light = box_blur(light, 1 + self.blur * float(rand()))
        shares = (self.grayscale, self.outline, self.invert)
        if any(shares):
            chance, depth = rand(2).tolist()
            if chance < sum(shares[:2]):
                light = (light.mean(0, keepdim=True) if chance < self.grayscale else outline(light, 1 + 2 * depth)).expand(3, -1, -1)
            if rand() < self.invert:
                light = 1 - light
        if self.tint:
            light = light * (1 - self.tint * rand(3, 1, 1) * rand())
        if self.erase and rand() < 0.5:
            height, width = light.shape[1:]
            tall, wide, top, left, *colour = rand(7).tolist()
            tall, wide = round(self.erase * tall * height), round(self.erase * wide * width)
            top, left = round(top * (height - tall)), round(left * (width - wide))
            light = light.clone()
            light[:, top:top + tall, left:left + wide] = torch.tensor(colour)[:, None, None]
        return light


def rotate_hue(light: Tensor, angle: float) -> Tensor:
    """Light (3, H, W) with its colours rotated about the grey axis by an angle in radians."""
    cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3)
    share = (1 - cos) / 3
    matrix = torch.tensor([[cos + share, share - sin, share + sin],
                           [share + sin, cos + share, share - sin],
                           [share - sin, share + sin, cos + share]])
    return torch.einsum("oc,chw->ohw", matrix, light)


def box_blur(light: Tensor, pixels: float) -> Tensor:
    """Light (3, H, W) blurred: averaged over blocks of `pixels` a side and interpolated back to size."""
    height, width = light.shape[1:]
    small = F.interpolate(light[None], (max(1, round(height / pixels)), max(1, round(width / pixels))), mode="area")
    return F.interpolate(small, (height, width), mode="bilinear", align_corners=False)[0]


def outline(light: Tensor, strength: float) -> Tensor:
    """Light (3, H, W) -> (1, H, W): edges as dark lines on white."""
    padded = F.pad(light[None], (1, 1, 1, 1), mode="replicate")[0]
    across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    return (1 - strength * torch.hypot(across, down).amax(0, keepdim=True)).clamp(0, 1)


@dataclass(frozen=True)
class AudioAugmentation:
    """Ranges of the changes to a sound; 0 turns one off.

    shift: seconds forward or back (silence fills the gap); tilt: of the spectrum, in [0, 1]; noise: amplitude; gain: amplitude
    factor in [1 - gain, 1]; speed: semitones up or down by faster or slower playback. Below half a semitone a note keeps its
    name; more is for codecs and vocoders only, since it would make a caption that names the note false. equalizer: decibels by
    which each of EQUALIZER_BANDS bands is louder or softer; band_stop: width in octaves of a band that is removed, in half of the
    sounds; time_mask: seconds that are silenced, in half of the sounds; fade: decibels by which the end is softer or louder;
    reverb: seconds in which an echo, at most as loud as the sound, decays by 60 dB.
    """

    shift: float = 0.1
    tilt: float = 0.5
    noise: float = 0.003
    gain: float = 0.6
    speed: float = 0.0
    equalizer: float = 0.0
    band_stop: float = 0.0
    time_mask: float = 0.0
    fade: float = 0.0
    reverb: float = 0.0

    def __post_init__(self):
        for name, most in (("shift", 3600), ("tilt", 1), ("noise", 1), ("gain", 1), ("speed", 48), ("equalizer", 120),
                           ("band_stop", 10), ("time_mask", 3600), ("fade", 120), ("reverb", 60)):
            within(f"audio_augmentation.{name}", getattr(self, name), 0, most)

    def __call__(self, waveform: Tensor, rate: int, generator: Generator) -> Tensor:
        """Waveform (S,) at `rate` -> waveform (S,)."""
        shift, tilt, noise, gain = torch.rand(4, generator=generator).tolist()
        if self.speed:
            factor = 2 ** (self.speed * (2 * float(torch.rand((), generator=generator)) - 1) / 12)
            played = F.interpolate(waveform[None, None], size=max(1, round(len(waveform) / factor)), mode="linear")[0, 0]
            waveform = F.pad(played, (0, max(0, len(waveform) - len(played))))[:len(waveform)]
        samples = round((2 * shift - 1) * self.shift * rate)
        if samples >= 0:
            moved = F.pad(waveform, (samples, 0))[:len(waveform)]
        else:
            moved = F.pad(waveform[-samples:], (0, min(-samples, len(waveform))))
        moved = moved + (2 * tilt - 1) * self.tilt * F.pad(moved, (1, 0))[:-1]
        moved = self._colour(moved, rate, generator) * (1 - gain * self.gain)
        return moved + noise * self.noise * torch.randn(len(moved), generator=generator)

    def _colour(self, waveform: Tensor, rate: int, generator: Generator) -> Tensor:
        """Waveform (S,) as another room, instrument or microphone might shape it; draws no random numbers if all is off."""
        rand = lambda *size: torch.rand(size, generator=generator)
        length = len(waveform)
        if self.fade:
            waveform = waveform * 10 ** (self.fade * float(2 * rand() - 1) / 20 * torch.linspace(0, 1, length))
        if self.equalizer or self.band_stop or self.reverb:
            loudest = waveform.abs().max()
            size = 2 * length if self.reverb else length
            spectrum = torch.fft.rfft(waveform, size)
            octave = (torch.linspace(0, rate / 2, len(spectrum)) / LOWEST).clamp_min(1).log2()  # above LOWEST Hz
            if self.equalizer:
                place = octave / octave[-1].clamp_min(1e-6) * (EQUALIZER_BANDS - 1)  # a single sample has 0 octaves
                low = place.long().clamp_max(EQUALIZER_BANDS - 2)
                level = self.equalizer * (2 * rand(EQUALIZER_BANDS) - 1)
                spectrum = spectrum * 10 ** (torch.lerp(level[low], level[low + 1], place - low) / 20)
            if self.band_stop and rand() < 0.5:
                wide, first = (self.band_stop * rand()), rand()
                spectrum = torch.where((octave - first * (octave[-1] - wide)).sub(wide / 2).abs() < wide / 2, 0, spectrum)
            if self.reverb:
                seconds, wet = rand(2).tolist()
                time = torch.arange(length) / rate
                echo = torch.randn(length, generator=generator) * 10 ** (-3 * time / (self.reverb * max(seconds, 0.01)))
                spectrum = spectrum * (1 + wet * torch.fft.rfft(echo / echo.norm(), size))
            waveform = torch.fft.irfft(spectrum, size)[:length]
            waveform = waveform * (loudest / waveform.abs().max().clamp_min(1e-6))
        if self.time_mask and rand() < 0.5:
            silent = round(self.time_mask * float(rand()) * rate)
            first = round(float(rand()) * max(0, length - silent))
            waveform = waveform.clone()
            waveform[first:first + silent] = 0
        return waveform
