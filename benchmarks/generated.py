"""Do generated pictures and notes match their prompts, and are they original? Judged on the starter data.

    python benchmarks/generated.py runs/starter/decoder/model --guidance_scale 2 --output generated.json
    python benchmarks/generated.py runs/starter/decoder/model --short

A picture for a name known from training is right at rank 10 if, of the pictures of a style never trained on, that of
the name is among the ten nearest: by cosine of histograms of oriented gradients (https://doi.org/10.1109/CVPR.2005.177)
and coarse pixels, minus the mean of the training pictures. A note is right if its pitch is within 50 cents (pYIN of
librosa, extra `bench`), and if a classifier trained on real notes recognises the family of its instrument. Each judge's
own accuracy is reported first, on unseen real pictures and notes, and on their reconstructions by the model's tokenizer.

A second judge is a captioner, by default the one that comes with mmtx, which was trained on the same names: a picture or
note is right if its caption is the one that it was generated from, and of a note also each part of it.

Copying: the distance of generated samples to the nearest training sample, compared with the distances among training
samples, and with the distance of reconstructed training samples to the nearest, which is what a copy would have.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from audio_quality import pitch
from PIL import Image
from tqdm import tqdm

import mmtx
from mmtx.batching import BATCH
from mmtx.data.collection import DataSource, read_source
from mmtx.data.media import load_audio, load_image
from mmtx.data.sample import Media, Sample
from mmtx.errors import InputError
from mmtx.evaluation import confidence_interval, mel_features, pixel_features
from mmtx.shipped_files import find_shipped

DATA = "demos/data/starter"
PICTURES, STYLE = "images-train-*.tar.gz", "images-test-unseen-style.tar.gz"
NOTES, UNSEEN_NOTES = "sounds-train-*.tar.gz", "sounds-test-unseen-notes.tar.gz"
CONTROLS = 400                  # real samples to validate the image judge and to measure copies
SHORT, SHORT_TRAIN = 12, 300    # generated media per kind, and training images, with --short
SIDE, RATE = 64, 16_000         # resolution in pixels and sample rate in Hz for the judges
CELLS, DIRECTIONS = (8, 4), 8   # of the gradient histograms
CENTS = 50
CAPTIONER = "demos/starter"
SHARPNESS, PENALTY = 1.5, 1e-2  # of the kernel ridge


def read(pattern: str, limit: int | None = None) -> list[Sample]:
    return read_source(DataSource([str(find_shipped(DATA) / pattern)], limit=limit))


def medium_of(sample: Sample) -> Media:
    return next(part for turn in sample.turns for part in turn.parts if isinstance(part, Media))


def judged(medium: Any) -> np.ndarray:
    """An image as uint8 (3, SIDE, SIDE), or a sound (S,) at RATE: the input of the judges."""
    if isinstance(medium, Media):
        data = medium.source.read()
        return np.asarray(load_image(data) if medium.kind == "image" else load_audio(data, RATE))
    if isinstance(medium, mmtx.Sound):
        return np.asarray(load_audio(medium.samples, RATE, source_rate=medium.rate))
    return np.asarray(load_image(medium.resize((SIDE, SIDE))))


def originals(samples: Sequence[Sample]) -> list[np.ndarray]:
    return [judged(medium_of(sample)) for sample in progress(samples, "read")]


def copies(model: mmtx.Model, samples: Sequence[Sample]) -> list[np.ndarray]:
    """The media of the samples, encoded and decoded by the model's tokenizer."""
    found = []
    for sample in progress(samples, "copy"):
        medium = medium_of(sample)
        mark = mmtx.Image if medium.kind == "image" else mmtx.Audio
        found += map(judged, model.detokenize(model.tokenize([mark(medium.source.read())])))
    return found


def generate(model: mmtx.Model, captions: Sequence[str], out: str, sampling: dict) -> list[np.ndarray]:
    """One medium per caption."""
    made: list[np.ndarray] = []
    for first in progress(range(0, len(captions), BATCH), f"generate {out}"):
        seed = sampling["seed"] + first
        made += map(judged, model.generate_batch(captions[first:first + BATCH], out, **{**sampling, "seed": seed}))
    return made


def captions_of(captioner: mmtx.Model, media: Sequence[np.ndarray]) -> list[str]:
    """What the captioner says of judged media."""
    marked = [mmtx.Image(Image.fromarray(item.transpose(1, 2, 0))) if item.ndim == 3 else mmtx.Audio(torch.from_numpy(item))
              for item in media]
    return captioner.caption(marked)


# -- Images --------------------------------------------------------------------------------------------------


def gradients(picture: np.ndarray, cells: int) -> np.ndarray:
    """uint8 (3, SIDE, SIDE) -> gradient histograms over cells x cells squares, normalized to length 1."""
    dy, dx = np.gradient(picture / 255, axis=(1, 2))
    strongest = np.hypot(dx, dy).argmax(0)[None]  # of the three channels
    dx, dy = (np.take_along_axis(d, strongest, 0)[0] for d in (dx, dy))
    direction = np.arctan2(dy, dx) % np.pi / np.pi * DIRECTIONS
    low, part, strength = direction.astype(int) % DIRECTIONS, direction % 1, np.sqrt(np.hypot(dx, dy))
    maps = np.zeros((DIRECTIONS, SIDE, SIDE))
    rows, columns = np.indices(strength.shape)
    np.add.at(maps, (low, rows, columns), strength * (1 - part))
    np.add.at(maps, ((low + 1) % DIRECTIONS, rows, columns), strength * part)
    blocks = maps.reshape(DIRECTIONS, cells, SIDE // cells, cells, SIDE // cells).mean((2, 4))
    blocks /= np.sqrt((blocks ** 2).sum(0, keepdims=True) + 0.01)
    return blocks.ravel() / max(np.linalg.norm(blocks), 1e-9)


def look(picture: np.ndarray) -> np.ndarray:
    """Features of an image for the judge."""
    coarse = [0.7 * pixel_features(picture, size, centred=True) for size in (12, 6)]
    return np.concatenate([*(gradients(picture, cells) for cells in CELLS), *coarse])


class Gallery:
    """One reference image per name, ranked by similarity to a generated image."""

    def __init__(self, pictures: Sequence[np.ndarray], names: Sequence[str], mean: np.ndarray):
        self.places, self.mean = {name: place for place, name in enumerate(names)}, mean
        self.angles = self._angles(pictures)

    def _angles(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        features = np.stack([look(picture) for picture in pictures]) - self.mean
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    def ranks(self, pictures: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
        """Rank of the reference of the name among all references, (N,): 1 if none is nearer."""
        near = self._angles(pictures) @ self.angles.T
        right = near[np.arange(len(names)), [self.places[name] for name in names]]
        return (near > right[:, None]).sum(1) + 1


def judge_pictures(model: mmtx.Model, captioner: mmtx.Model, sampling: dict, short: bool) -> dict:
    style, train = read(STYLE), read(PICTURES, SHORT_TRAIN if short else None)
    names, real = [sample.caption for sample in style], originals(train)
    gallery = Gallery(originals(style), names, np.mean([look(picture) for picture in progress(real, "look")], axis=0))
    control = spread([sample for sample in train if sample.caption in gallery.places], CONTROLS)
    known, again = [sample.caption for sample in control], copies(model, control)
    asked = spread(names, SHORT) if short else names
    drawn = generate(model, asked, "image", sampling)
    figures = {}
    for who, pictures, titles in (("real", originals(control), known), ("real, coded", again, known),
                                  ("generated", drawn, asked)):
        ranks = gallery.ranks(pictures, titles)
        figures |= {f"name at rank {most}, {who}": share(ranks <= most) for most in (1, 10)}
        figures[f"name by captioner, {who}"] = share(np.array(captions_of(captioner, pictures)) == titles)
    return figures | distances("picture", drawn, real, again, pixel_features)


# -- Notes ---------------------------------------------------------------------------------------------------


def listen(sound: np.ndarray) -> np.ndarray:
    """Features of a sound for the family judge: loudness over time in four log-mel bands, down to 45 dB below full scale."""
    return mel_features(sound, RATE, window=512, mels=4, power=1, floor=1.0)


class Families:
    """Kernel ridge classifier from a sound to the family of its instrument.

    Features, kernel width and penalty had the best accuracy of those tried on a held-out quarter of the training notes, both original
    and decoded by an audio tokenizer.
    """

    def __init__(self, sounds: Sequence[np.ndarray], families: Sequence[str]):
        self.names = sorted(set(families))
        features = np.stack([listen(sound) for sound in progress(sounds, "listen")])
        self.mean, self.deviation = features.mean(0), features.std(0) + 1e-3
        self.points = (features - self.mean) / self.deviation
        wanted = np.array([[name == family for name in self.names] for family in families]) - 1 / len(self.names)
        self.weights = np.linalg.solve(self._kernel(self.points) + PENALTY * np.eye(len(features)), wanted)

    def _kernel(self, points: np.ndarray) -> np.ndarray:
        near = torch.cdist(torch.tensor(points), torch.tensor(self.points)).square() / self.points.shape[1]
        return np.exp(-SHARPNESS * near.numpy())

    def right(self, sounds: Sequence[np.ndarray], families: Sequence[str]) -> np.ndarray:
        """Whether the predicted family is right, (N,) bool."""
        points = (np.stack([listen(sound) for sound in sounds]) - self.mean) / self.deviation
        best = (self._kernel(points) @ self.weights).argmax(1)
        return np.array([self.names[i] == family for i, family in zip(best, families, strict=True)])


def in_tune(sounds: Sequence[np.ndarray], samples: Sequence[Sample]) -> np.ndarray:
    """Whether the pitch tracker finds the note of the sample within CENTS, (N,) bool."""
    found = [pitch(sound, RATE) for sound in progress(sounds, "pitch")]
    wanted = [440 * 2 ** ((sample.metadata["midi_note"] - 69) / 12) for sample in samples]
    return np.array([f is not None and abs(1200 * np.log2(f / w)) <= CENTS for f, w in zip(found, wanted, strict=True)])


def judge_notes(model: mmtx.Model, captioner: mmtx.Model, sampling: dict, short: bool) -> dict:
    train, unseen = read(NOTES), read(UNSEEN_NOTES, SHORT if short else None)
    known, real = spread(train, len(unseen)), originals(train)
    families = Families(real, [sample.metadata["family"] for sample in train])
    family_of = {sample.metadata["instrument"]: sample.metadata["family"] for sample in train}
    played = {name: generate(model, [sample.caption for sample in samples], "audio", sampling)
              for name, samples in (("known", known), ("unseen", unseen))}
    figures = {}
    for who, sounds, samples in (("real", originals(unseen), unseen), ("real, coded", copies(model, unseen), unseen),
                                 ("generated, known", played["known"], known),
                                 ("generated, unseen", played["unseen"], unseen)):
        figures[f"family, {who}"] = share(families.right(sounds, [sample.metadata["family"] for sample in samples]))
        if importlib.util.find_spec("librosa"):
            figures[f"pitch, {who}"] = share(in_tune(sounds, samples))
        named = [caption.rpartition(", ") for caption in captions_of(captioner, sounds)]
        for field, said in (("instrument", [instrument for instrument, _, _ in named]),
                            ("family", [family_of.get(instrument) for instrument, _, _ in named]),
                            ("note", [note for _, _, note in named])):
            right = [word == sample.metadata[field] for word, sample in zip(said, samples, strict=True)]
            figures[f"{field} by captioner, {who}"] = share(np.array(right))
    again = copies(model, spread(known, CONTROLS))
    return figures | distances("note", played["known"], real, again,
                               lambda sound: mel_features(sound, RATE, power=1, floor=1.0))


# -- Both ----------------------------------------------------------------------------------------------------


def distances(what: str, made: Sequence, train: Sequence, again: Sequence, features: Callable) -> dict:
    """Distances of generated media, training samples and tokenizer copies of some to the nearest (other) training sample.

    Root mean square differences: of pixels in [0, 1] averaged to 32 x 32, or of natural logarithms of mel.
    """
    points = torch.tensor(np.stack([features(item) for item in train]))

    def nearest(items: Sequence, number: int) -> np.ndarray:
        chunks = torch.tensor(np.stack([features(item) for item in items])).split(256)
        found = torch.cat([torch.cdist(chunk, points).kthvalue(number).values for chunk in progress(chunks, "nearest")])
        return found.numpy() / points.shape[1] ** 0.5

    far = {"made": nearest(made, 1), "training": nearest(train, 2), "copies": nearest(again, 1)}
    figures = {f"{what}: nearest to {who}": {f"{percent} %": round(float(np.percentile(values, percent)), 4)
                                             for percent in (5, 50, 95)} for who, values in far.items()}
    return {**figures, f"{what}: as near as 95 % of copies": share(far["made"] <= np.percentile(far["copies"], 95))}


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def share(right: np.ndarray) -> dict:
    """A share with its confidence interval."""
    return {name: round(value, 4) for name, value in confidence_interval(right.astype(float))._asdict().items()}


def progress(items: Sequence, name: str):
    return tqdm(items, desc=name, leave=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model that was trained to generate")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=("image", "audio"), default=["image", "audio"])
    parser.add_argument("--captioner", default=CAPTIONER, help=f"model that captions what was generated, default: {CAPTIONER}")
    parser.add_argument("--device")
    parser.add_argument("--short", action="store_true", help=f"{SHORT} pictures and twice {SHORT} notes only")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "audio" in options.kinds and not importlib.util.find_spec("librosa"):
        print("librosa is not installed, pitches are left out: pip install 'mmtx[bench]'", file=sys.stderr)
    model, captioner = (mmtx.load(folder, options.device) for folder in (options.model, options.captioner))
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "guidance_scale", "seed")}
    figures = {}
    for kind, judge in (("image", judge_pictures), ("audio", judge_notes)):
        if kind in options.kinds:
            figures |= judge(model, captioner, sampling, options.short)
    chosen = [f"{name} {value}" for name, value in sampling.items()]
    print(", ".join([options.model, *chosen, f"torch {torch.__version__}"]))
    for name, value in figures.items():
        print(f"{name:40} {', '.join(f'{key} {number}' for key, number in value.items())}")
    if options.output:
        facts = {"model": options.model, "captioner": options.captioner, "sampling": sampling, "short": options.short,
                 "torch": torch.__version__}
        options.output.write_text(json.dumps({**facts, "figures": figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
