"""What each place of a stream attends to: weights by layer and head, over pieces of text, patches of pictures and cells of sounds.

    found = model.attention("cat.png")                   # of the answer that the model gives; or attention("cat.png", "a cat")
    found.weights                                        # (L, H, T, T)
    found.heat(found.words[0], found.media[0])           # what the first word saw of the picture, (h, w)
    found.plot("attention.png")

The weights say which places are read, not why: what is read may not matter, and what was read in lower layers is passed on.
`rollout` follows that (https://arxiv.org/abs/2005.00928).

Shapes: L layers, H heads, G key-value heads, K head width, T tokens of the stream, D width; h rows and w columns of a picture's
codes, t time steps and b bands of a sound's.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtx.embedding import Features
from mmtx.errors import InputError
from mmtx.modality.base import Tokenizer
from mmtx.model import Decoder, rotary_embedding
from mmtx.sequence import Prompt, gather_features
from mmtx.vocabulary import Vocabulary

MOST_WEIGHTS = 2 ** 28  # of all layers and heads: 1 GB
PLOTTED = 12            # words of a plot


def attention_weights(decoder: Decoder, ids: Tensor, features: Mapping[str, Features] | None = None) -> Tensor:
    """Ids of a stream (T,) -> the share (L, H, T, T) of each place (the last axis) in what each place (the one before) reads."""
    c, length = decoder.config, len(ids)
    if (count := c.depth * c.heads * length ** 2) > MOST_WEIGHTS:
        raise InputError(f"attention: found {length} tokens, so {count} weights, expected up to {MOST_WEIGHTS}")
    x, found = decoder.embed(ids[None], features), []
    angles = rotary_embedding(torch.arange(length, device=ids.device)[None], c.head_dim, c.rope_theta, c.rope_scaling)
    later = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
    for block in decoder.blocks:
        query, key, _ = block.attention.heads(block.attention_norm(x), angles)
        key = key.repeat_interleave(c.heads // c.kv_heads, 2)                                      # (1, T, H, K)
        scores = torch.einsum("bqhk,bthk->bhqt", query, key)[0] * c.head_dim ** -0.5
        found.append(scores.masked_fill(later, -torch.inf).softmax(-1))
        x = block(x, angles)
    return torch.stack(found)


class Stretch(NamedTuple):
    """A picture or sound of the stream: where its codes lie, their grid, and a picture to lay a heat map on, if there is one."""

    kind: str
    places: range
    grid: tuple[int, int]       # (h, w), or (t, b)
    shown: np.ndarray | None

    def upright(self, cells: np.ndarray) -> np.ndarray:
        """Something for each code, in its grid -> rows from the top: time of a sound runs to the right, high pitches lie above."""
        return cells.T[::-1] if self.kind == "audio" else cells


class Word(NamedTuple):
    """A word of the answer: what it says, the places of its pieces, and those that it was chosen at, one before each."""

    text: str
    places: tuple[int, ...]

    @property
    def chosen_at(self) -> list[int]:
        return [place - 1 for place in self.places]


@dataclass(frozen=True)
class AttentionMaps:
    """What the places of a stream attend to, with their names."""

    weights: Tensor                # (L, H, T, T) on the CPU
    labels: tuple[str, ...]        # of each place
    words: tuple[Word, ...]        # of the answer
    media: tuple[Stretch, ...]     # pictures and sounds

    def rollout(self) -> Tensor:
        """How much of each input lies in the last layer's state of each place, (T, T): heads are averaged, half of each state is
        the one below it, and layers are multiplied."""
        total = same = torch.eye(self.weights.shape[-1])
        for layer in self.weights:
            total = (0.5 * layer.mean(0) + 0.5 * same) @ total
        return total

    def rows(self, layer: int | None = None, head: int | None = None) -> Tensor:
        """Weights (T, T) of a layer and a head, or the mean over all of either that is not given."""
        count, heads = self.weights.shape[:2]
        for name, number, most in (("layer", layer, count), ("head", head, heads)):
            if number is not None and not (isinstance(number, Integral) and 0 <= number < most):
                raise InputError(f"{name}: found {number!r:.40}, expected 0 to {most - 1}")
        weights = self.weights if layer is None else self.weights[layer:layer + 1]
        return (weights if head is None else weights[:, head:head + 1]).mean((0, 1))

    def heat(self, word: Word, medium: Stretch, layer: int | None = None, head: int | None = None,
             rollout: bool = False) -> np.ndarray:
        """What a word of the answer, where its pieces were chosen, read of a picture (h, w) or a sound (t, b)."""
        for name, given, kind in (("word", word, Word), ("medium", medium, Stretch)):
            if not isinstance(given, kind):
                found = type(given).__name__ if isinstance(given, tuple) else f"{given!r:.40}"
                raise InputError(f"{name}: found {found}, expected one of `{'words' if kind is Word else 'media'}`")
        rows, read = self.rollout() if rollout else self.rows(layer, head), self._places("medium", medium.places)
        return rows[self._places("word", word.chosen_at)][:, read].mean(0).reshape(medium.grid).numpy()

    def _places(self, name: str, places: Iterable[int]) -> list[int]:
        """Some places of the stream. Raises InputError where they are none."""
        try:
            found = [*map(index, places)]
        except TypeError:
            found = []
        if not found:
            raise InputError(f"{name}: found {places!r:.100}, expected whole numbers")
        if wrong := [place for place in found if not 0 <= place < len(self.labels)]:
            raise InputError(f"{name}: found {wrong[0]}, expected 0 to {len(self.labels) - 1}")
        return found

    def plot(self, path: str | Path, layer: int | None = None, head: int | None = None, rollout: bool = False,
             places: Iterable[int] | None = None) -> None:
        """Write a picture: a column for each word of the answer, a row for each picture and sound; for text alone, a table of the
        weights between its pieces, by default all, or those at some `places`. Needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise InputError('plots need matplotlib: pip install "mmtx[plot]"') from None
        if not isinstance(path, (str, os.PathLike)) and not hasattr(path, "write"):
            raise InputError(f"path: found {type(path).__name__}, expected the name of a file")
        words, chosen = self.words[:PLOTTED], self._places("places", range(len(self.labels)) if places is None else places)
        if self.media and words:
            figure = Figure((1.8 * len(words) + 0.4, 2.1 * len(self.media)), layout="constrained")
            axes = figure.subplots(len(self.media), len(words), squeeze=False)
            for line, medium in zip(axes, self.media):
                for axis, word in zip(line, words):
                    _draw(axis, self.heat(word, medium, layer, head, rollout), medium)
                    axis.set_title(_plain(word.text), fontsize=9)
        else:
            side = 0.28 * len(chosen) + 1.5
            figure = Figure((side, side), layout="constrained")
            axis, labels = figure.subplots(), [_plain(self.labels[place]) for place in chosen]
            axis.imshow((self.rollout() if rollout else self.rows(layer, head))[chosen][:, chosen], cmap="magma")
            axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
            axis.set_yticks(range(len(labels)), labels, fontsize=7)
            axis.set_xlabel("is read")
            axis.set_ylabel("reads")
        try:
            figure.savefig(path, dpi=120)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be written ({error})") from None


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.strip().replace("$", r"\$") or "_"


def _draw(axis: Any, heat: np.ndarray, medium: Stretch) -> None:
    """A heat map on what it is of; time runs to the right, pitch upwards."""
    heat = medium.upright(heat)
    options = {"extent": (0, heat.shape[1], 0, heat.shape[0]), "aspect": "auto" if medium.kind == "audio" else "equal"}
    if medium.shown is not None:
        axis.imshow(medium.shown[::-1] if medium.kind == "audio" else medium.shown, cmap="gray", **options)
    axis.imshow(heat, cmap="inferno", alpha=1.0 if medium.shown is None else 0.6, **options)
    axis.set_xticks([])
    axis.set_yticks([])


@torch.inference_mode()
def attention_maps(decoder: Decoder, vocabulary: Vocabulary, tokenizers: Mapping[str, Tokenizer], prompt: Prompt,
                   answer: Sequence[int]) -> AttentionMaps:
    """The maps of a prompt and its answer, which is ids of text."""
    device = decoder.embedding.weight.device
    features = {kind: given.to(device) for kind, given in gather_features([(0, prompt.spans)]).items()}
    ids = [*map(int, prompt.ids), *map(int, answer)]
    weights = attention_weights(decoder, torch.tensor(ids, device=device), features).float().cpu()
    texts, text = vocabulary.range("text"), tokenizers["text"]
    labels = [text.decode([ident - texts.start]) if ident in texts else vocabulary.name(ident) for ident in ids]
    words = [Word(text.decode([ids[place] - texts.start for place in places]), tuple(places))
             for places in _words(labels, len(prompt.ids))]
    return AttentionMaps(weights, tuple(labels), tuple(words), _media(ids, vocabulary, tokenizers))


def _words(labels: Sequence[str], first: int) -> list[list[int]]:
    """The places of each word of an answer from place `first` on: a space begins one."""
    words: list[list[int]] = []
    for place in range(first, len(labels)):
        before = "".join(labels[each] for each in words[-1]) if words else ""
        if not before.strip() and words or before and not labels[place][:1].isspace():
            words[-1].append(place)
        else:
            words.append([place])
    return words


def _media(ids: Sequence[int], vocabulary: Vocabulary, tokenizers: Mapping[str, Tokenizer]) -> tuple[Stretch, ...]:
    """Pictures and sounds of a stream: runs of codes of one kind, between their tags."""
    media, place = [], 0
    for kind in vocabulary.media:
        codes = vocabulary.range(kind)
        while place < len(ids):
            stop = place
            while stop < len(ids) and ids[stop] in codes:
                stop += 1
            if stop > place:
                bands = vocabulary.bands(kind)
                grid = (ids[place - 2] - vocabulary.height(1) + 1, -1) if bands is None else (-1, bands)
                local = vocabulary.to_local(kind, ids[place:stop]).reshape(grid)
                media.append(Stretch(kind, range(place, stop), local.shape, _shown(tokenizers[kind], local)))
            place = stop + 1
        place = 0
    return tuple(sorted(media, key=lambda medium: medium.places.start))


def _shown(tokenizer: Tokenizer, codes: np.ndarray) -> np.ndarray | None:
    """What a medium looks like, as its codes tell it: pixels (H, W, 3), or a spectrogram (mels, frames) where there is one."""
    made = tokenizer.decode(codes)
    if tokenizer.kind == "image":
        return made.permute(1, 2, 0).cpu().numpy()
    return tokenizer.log_mel(made.cpu()).T.cpu().numpy() if hasattr(tokenizer, "log_mel") else None
