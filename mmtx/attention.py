"""Attention maps: weights by layer and head over text pieces, patches of pictures and cells of sounds.

    found = model.attention("cat.png")                   # for the model's own answer; or attention("cat.png", "a cat")
    found.weights                                        # (L, H, T, T)
    found.heat(found.words[0], found.media[0])           # how much the first word attends to each patch, (h, w)
    found.plot("attention.png")

The weights say which positions are attended to, not whether they matter, and a position also carries what it attended to in
lower layers. `rollout` accounts for the latter (https://arxiv.org/abs/2005.00928).

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
from mmtx.files import user_path
from mmtx.modality.base import Tokenizer
from mmtx.model import Decoder, rotary_embedding
from mmtx.sequence import Prompt, gather_features
from mmtx.vocabulary import Vocabulary

MAX_WEIGHTS = 2 ** 28   # of all layers and heads: 1 GiB
MAX_PLOTTED_WORDS = 12


def attention_weights(decoder: Decoder, ids: Tensor, features: Mapping[str, Features] | None = None) -> Tensor:
    """Ids of a stream (T,) -> attention weights (L, H, T, T) of queries (third axis) over keys (last axis).

    Raises InputError if they would be more than `MAX_WEIGHTS`.
    """
    c, length = decoder.config, len(ids)
    if (count := c.depth * c.heads * length ** 2) > MAX_WEIGHTS:
        raise InputError(f"attention: found {length} tokens, so {count} weights, expected up to {MAX_WEIGHTS}")
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


class MediaSpan(NamedTuple):
    """A picture or sound in the stream: positions of its codes, their grid, and an image to draw heat maps on, if any."""

    kind: str
    places: range
    grid: tuple[int, int]       # (h, w), or (t, b)
    shown: np.ndarray | None

    def upright(self, cells: np.ndarray) -> np.ndarray:
        """Values in the grid of the codes -> rows from the top; for sounds, time runs to the right and high pitches are on top."""
        return cells.T[::-1] if self.kind == "audio" else cells


class Word(NamedTuple):
    """A word of the answer: its text, the positions of its pieces, and those that predicted them, each one earlier."""

    text: str
    places: tuple[int, ...]

    @property
    def chosen_at(self) -> list[int]:
        return [place - 1 for place in self.places]


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """The attention weights of a stream, with labels of its positions, the words of the answer and the media."""

    weights: Tensor                # (L, H, T, T) on the CPU
    labels: tuple[str, ...]        # of each position
    words: tuple[Word, ...]        # of the answer
    media: tuple[MediaSpan, ...]   # pictures and sounds

    def rollout(self) -> Tensor:
        """Attention rollout (T, T): the share of each input (last axis) in each final hidden state.

        Heads are averaged, half of each layer's weight goes to the residual connection, and layers are multiplied.
        """
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

    def heat(self, word: Word, medium: MediaSpan, layer: int | None = None, head: int | None = None,
             rollout: bool = False) -> np.ndarray:
        """Attention to a picture (h, w) or sound (t, b), averaged over the positions that predicted a word of the answer.

        Without `layer` or `head` it averages over all; `rollout` replaces the weights. Raises InputError.
        """
        for name, given, kind in (("word", word, Word), ("medium", medium, MediaSpan)):
            if not isinstance(given, kind):
                found = type(given).__name__ if isinstance(given, tuple) else f"{given!r:.40}"
                raise InputError(f"{name}: found {found}, expected one of `{'words' if kind is Word else 'media'}`")
        rows, read = self.rollout() if rollout else self.rows(layer, head), self._places("medium", medium.places)
        return rows[self._places("word", word.chosen_at)][:, read].mean(0).reshape(medium.grid).numpy()

    def _places(self, name: str, places: Iterable[int]) -> list[int]:
        """Positions of the stream as a list. Raises InputError unless all are in range and there is at least one."""
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
        """Write heat maps as an image file, with a column per word of the answer and a row per picture or sound.

        Without media, or with `places`, it draws the matrix of weights between all pieces, or those at these places. Needs
        matplotlib. Raises InputError.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise InputError('plots need matplotlib: pip install "mmtx[plot]"') from None
        if not isinstance(path, (str, os.PathLike)) and not hasattr(path, "write"):
            raise InputError(f"path: found {type(path).__name__}, expected the name of a file")
        words, chosen = self.words[:MAX_PLOTTED_WORDS], self._places("places", range(len(self.labels)) if places is None else places)
        if places is None and self.media and words:
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
            figure.savefig(user_path(path) if isinstance(path, (str, os.PathLike)) else path, dpi=120)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be written ({error})") from None


def _plain(text: str) -> str:
    """Text escaped so that matplotlib does not read it as a formula."""
    return text.strip().replace("$", r"\$") or "_"


def _draw(axis: Any, heat: np.ndarray, medium: MediaSpan) -> None:
    """Draw a heat map over its medium; time runs to the right, pitch upwards."""
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
    """The attention maps of a prompt followed by an answer of text ids."""
    device = decoder.embedding.weight.device
    features = {kind: given.to(device) for kind, given in gather_features([(0, prompt.spans)]).items()}
    ids = [*map(int, prompt.ids), *map(int, answer)]
    weights = attention_weights(decoder, torch.tensor(ids, device=device), features).float().cpu()
    texts, text = vocabulary.range("text"), tokenizers["text"]
    labels = [text.decode([ident - texts.start]) if ident in texts else vocabulary.name(ident) for ident in ids]
    words = [Word(text.decode([ids[place] - texts.start for place in places]), tuple(places))
             for places in _words(labels, len(prompt.ids))]
    merged = {span.start: span.codes for span in prompt.spans if span.codes is not None}
    return AttentionMaps(weights, tuple(labels), tuple(words), _media(ids, vocabulary, tokenizers, merged))


def _words(labels: Sequence[str], first: int) -> list[list[int]]:
    """The positions of each word of an answer that starts at position `first`; words start with a space."""
    words: list[list[int]] = []
    for place in range(first, len(labels)):
        before = "".join(labels[each] for each in words[-1]) if words else ""
        if not before.strip() and words or before and not labels[place][:1].isspace():
            words[-1].append(place)
        else:
            words.append([place])
    return words


def _media(ids: Sequence[int], vocabulary: Vocabulary, tokenizers: Mapping[str, Tokenizer],
           merged: Mapping[int, np.ndarray]) -> tuple[MediaSpan, ...]:
    """The media of a stream: runs of codes of one kind, between their tags; `merged`: all codes of those that start at a place."""
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
                shown = _shown(tokenizers[kind], merged.get(place, local))
                media.append(MediaSpan(kind, range(place, stop), local.shape, shown))
            place = stop + 1
        place = 0
    return tuple(sorted(media, key=lambda medium: medium.places.start))


def _shown(tokenizer: Tokenizer, codes: np.ndarray) -> np.ndarray | None:
    """An image of a medium decoded from its codes: pixels (H, W, 3) or a spectrogram (mels, frames); None if there is none."""
    made = tokenizer.decode(codes)
    if tokenizer.kind == "image":
        return made.permute(1, 2, 0).cpu().numpy()
    return tokenizer.log_mel(made.cpu()).T.cpu().numpy() if hasattr(tokenizer, "log_mel") else None
