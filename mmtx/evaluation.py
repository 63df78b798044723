"""Metrics for captions and transcripts, with confidence intervals and an untrained control.

A metric returns one number per item, so that `confidence_interval` can resample items; a figure is a `Score`.
Shapes: N items, D feature width, C channels, H height, W width, S samples, F frames, M mels.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mmtx.errors import InputError

RESAMPLES = 2000
CHUNK = 512  # queries at once: bounds the distance matrix of the control

# Presets of `pixel_features` and `mel_features`, to be chosen before a model is scored.
# "plain" is the usual definition and a weak control. The others had the best accuracy of the grids tried on
# the training part of the starter set alone (pictures: a style left out, sounds: a quarter of the pitches).
# "timbre" is little more than loudness over time, which suffices to identify an instrument of one SoundFont.
PIXELS: dict[str, dict[str, Any]] = {"plain": {"size": 32}, "shape": {"size": 12, "centred": True}}
MELS: dict[str, dict[str, Any]] = {
    "plain": {"window": 1024, "mels": 80, "power": 2, "floor": 1e-5},
    "timbre": {"window": 512, "mels": 4, "power": 1, "floor": 1e-2},
    "pitch": {"window": 2048, "hop": 512, "mels": 256, "power": 1, "floor": 1e-2, "mean": True},
}


class FieldReader(NamedTuple):
    """Reads captions as fields, so that each field is scored separately.

    The `reader` of a source, "FILE.py:FUNCTION", names a function that makes one. It is called with a mapping for each training
    sample, of its metadata and "caption".
    """

    fields: tuple[str, ...]                  # those that are compared with a sample's metadata; "caption" is the whole caption
    read: Callable[[str], Mapping[str, Any]]  # a caption -> the fields that it states
    unknown: tuple[str, ...] = ()            # fields left out, since these training samples do not determine them


WHOLE_CAPTION = FieldReader(("caption",), lambda caption: {"caption": caption})


class Score(NamedTuple):
    """A figure with its confidence interval [low, high] over `n` items."""

    value: float
    low: float
    high: float
    n: int


# Metrics: one number per item.


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation: apostrophes are dropped ("don't": "dont"), other marks separate words."""
    text = re.sub("['\u2019\u02bc]", "", unicodedata.normalize("NFKC", text).lower())
    return "".join(" " if unicodedata.category(c)[0] == "P" else c for c in text).split()


def word_errors(predicted: Sequence[str], true: Sequence[str]) -> tuple[list[int], list[int]]:
    """Per item: word errors (fewest insertions, deletions and substitutions) and number of true words.

    `confidence_interval` of both is the word error rate of the corpus, above 1 if many words are inserted.
    """
    return _errors(predicted, true, words)


def character_errors(predicted: Sequence[str], true: Sequence[str]) -> tuple[list[int], list[int]]:
    """Per item: character errors and number of true characters, of `words` joined by single spaces."""
    return _errors(predicted, true, lambda text: " ".join(words(text)))


def _errors(predicted: Sequence[str], true: Sequence[str], split: Callable[[str], Sequence[str]]) -> tuple[list[int], list[int]]:
    from torchaudio.functional import edit_distance

    _check_pairs(predicted, true)
    pairs = [(split(p), split(t)) for p, t in zip(predicted, true)]
    return [edit_distance(p, t) for p, t in pairs], [len(t) for _, t in pairs]


def field_scores(
    predicted: Sequence[str], true: Sequence[Mapping], read: Callable[[str], Mapping], fields: Sequence[str]
) -> dict[str, list[float]]:
    """Per field and item: 1.0 if the prediction, parsed by `read`, has the true value, else 0.0.

    `true` holds the fields of each item, the caption and the metadata of a sample; `read` parses a
    caption into fields, as that of a `FieldReader`. A field that `read` leaves out counts as wrong. Raises
    InputError if a true item lacks a field.
    """
    _check_pairs(predicted, true)
    for number, item in enumerate(true):
        for field in fields:
            if field not in item:
                raise InputError(f"item {number}: field {field!r} is missing, expected one of {sorted(item)}")
    guesses = [read(p) for p in predicted]
    return {f: [float(f in g and g[f] == t[f]) for g, t in zip(guesses, true)] for f in fields}


# Confidence.


def confidence_interval(
    per_item: Sequence[float], weights: Sequence[float] | None = None, level: float = 0.95
) -> Score:
    """Mean with its percentile bootstrap interval: items resampled with replacement, seed fixed.

    With `weights` the value is sum(per_item) / sum(weights): a word error rate from errors and true words.
    Without, if all items are 0 or all are 1, resampling would claim certainty: the exact binomial bound
    (Clopper and Pearson 1934) is used instead. The interval covers the choice of test items, not of training
    seeds, and assumes that items are independent.
    """
    values = np.asarray(per_item, dtype=np.float64)
    counts = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or not values.size or counts.shape != values.shape:
        raise InputError(f"found items {values.shape} and weights {counts.shape}, expected equal lengths")
    if not 0 < level < 1:
        raise InputError(f"level: found {level}, expected a share between 0 and 1")
    if not (np.isfinite([values, counts]).all() and (counts >= 0).all() and counts.sum() > 0):
        raise InputError("found numbers that are not finite or weights that sum to 0, expected neither")
    n, tail = len(values), (1 - level) / 2
    value = float(values.sum() / counts.sum())
    if weights is None and value in (0.0, 1.0) and (values == value).all():
        bound = tail ** (1 / n)
        return Score(value, bound if value else 0.0, 1.0 if value else 1 - bound, n)
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(RESAMPLES):
        chosen = random.integers(n, size=n)
        total = counts[chosen].sum()
        if total > 0:  # a resample of empty references only has no rate
            ratios.append(values[chosen].sum() / total)
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Score(value, float(low), float(high), n)


# The control: no training, only the nearest training item.


class NearestNeighbour:
    """Predicts the label of the training item at the smallest Euclidean distance (the first one on ties)."""

    def __init__(self, features: Iterable[np.ndarray], labels: Sequence) -> None:
        """Features, N times (D,), and a label for each."""
        self.features, self.labels = _stack(features), labels
        if len(self.features) != len(labels):
            raise InputError(f"control: found {len(self.features)} features and {len(labels)} labels, expected one each")

    def predict(self, features: Iterable[np.ndarray]) -> list:
        """Features, N times (D,) -> the labels of the nearest training items."""
        queries = _stack(features)
        if queries.shape[1] != self.features.shape[1]:
            raise InputError(f"control: found features of width {queries.shape[1]}, expected {self.features.shape[1]}")
        # |q - f|^2 without |q|^2, which is the same for every f. Double precision, since near ties occur.
        norms = np.einsum("nd,nd->n", self.features, self.features)
        chunks = [queries[i : i + CHUNK] for i in range(0, len(queries), CHUNK)]
        nearest = np.concatenate([(norms - 2 * (q @ self.features.T)).argmin(1) for q in chunks])
        return [self.labels[i] for i in nearest]


def pixel_features(image: Any, size: int = 32, centred: bool = False) -> np.ndarray:
    """uint8 (C, H, W), array or tensor -> float64 (C * size * size,) in [0, 1]: the picture, area-averaged.

    `centred` subtracts the mean and scales to length 1, so that distance ignores brightness and contrast.
    Starter set, exact name in an unseen style: `PIXELS["plain"]` 0.358, `PIXELS["shape"]` 0.445.
    """
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise InputError(f"picture: found {pixels.dtype} of shape {pixels.shape}, expected uint8 (C, H, W)")
    import torch

    average = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(pixels, dtype=torch.double), size)
    small: np.ndarray = average.flatten().numpy() / 255
    if not centred:
        return small
    small -= small.mean()
    return small / max(np.linalg.norm(small), 1e-9)


def mel_features(
    waveform: Any,
    rate: int = 16_000,
    samples: int = 24_000,
    window: int = 1024,
    hop: int = 256,
    mels: int = 80,
    power: float = 2,
    floor: float = 1e-5,
    mean: bool = False,
) -> np.ndarray:
    """Waveform (S,), array or tensor -> float64 (F * mels,): natural-log mel; with `mean` over time (mels,).

    The sound is cut or padded with silence to `samples`. torchaudio's MelSpectrogram: Hann window, centred
    frames, HTK mels, no norm; values are clamped to at least `floor`. Fine bands find the pitch, coarse ones
    the instrument. Starter set, pitches never trained on: instrument `MELS["plain"]` 0.275, `MELS["timbre"]`
    0.881; note `MELS["plain"]` 0.623, `MELS["pitch"]` 0.788.
    """
    wave = np.asarray(waveform, dtype=np.float64)
    if wave.ndim != 1 or not wave.size or not np.isfinite(wave).all():
        raise InputError(f"sound: found shape {wave.shape}, expected finite samples (S,)")
    import torch

    wave = np.pad(wave[:samples], (0, max(0, samples - len(wave))))
    mel = _mel_spectrogram(rate, window, hop, mels, power)(torch.from_numpy(wave)).T.numpy()  # (F, M)
    mel = np.log(np.maximum(mel, floor))
    return mel.mean(0) if mean else mel.ravel()


# Tables.


def table(rows: Iterable[tuple[str, Score | None, Score | None, str]]) -> str:
    """Rows (metric, score of the model, score of the control, which control) -> aligned columns; None prints as "-".

    The last column is n, the number of items. Raises InputError if model and control were scored on different
    numbers of items, which makes them incomparable.
    """
    lines = [("metric", "model", "strongest control", "n")]
    for metric, model, control, by in rows:
        sizes = {score.n for score in (model, control) if score is not None}
        if len(sizes) > 1:
            raise InputError(f"{metric}: found {model.n} items for the model and {control.n} for the control")
        lines.append((metric, _format(model), f"{_format(control)} {by}".rstrip(), str(*sizes) if sizes else "-"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        f"{metric:<{widths[0]}}  {model:<{widths[1]}}  {control:<{widths[2]}}  {n:>{widths[3]}}"
        for metric, model, control, n in lines
    )


def _format(score: Score | None) -> str:
    return "-" if score is None else f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def _check_pairs(predicted: Sequence, true: Sequence) -> None:
    if len(predicted) != len(true) or not len(true):
        raise InputError(f"found {len(predicted)} predictions for {len(true)} items, expected one each")


def _stack(features: Iterable[np.ndarray]) -> np.ndarray:
    """N times (D,) -> float64 (N, D)."""
    rows = [np.asarray(f, dtype=np.float64) for f in features]
    shapes = {row.shape for row in rows}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise InputError(f"control: found features of shapes {sorted(shapes)}, expected one shape (D,)")
    return np.stack(rows)


@lru_cache
def _mel_spectrogram(rate: int, window: int, hop: int, mels: int, power: float):
    import torch
    from torchaudio.transforms import MelSpectrogram

    return MelSpectrogram(rate, window, hop_length=hop, n_mels=mels, power=power,
                          wkwargs={"dtype": torch.double}).double()
