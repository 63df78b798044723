"""Samples to token streams, once before training: several augmented views of each sample, kept as small integers.

Shapes: T tokens of a document.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.media import load_audio, load_image
from mmtx.data.sample import Media, Sample, Text
from mmtx.data.sources import SkipCounter
from mmtx.errors import InputError
from mmtx.modality.base import Tokenizer
from mmtx.sequence import AudioPart, Document, ImagePart, Part, TextPart, Turn, render
from mmtx.vocabulary import Vocabulary

ENCODE_AT_ONCE = 256  # samples whose media are in memory together


class Augmentation(NamedTuple):
    """What is done to pictures and sounds of a training sample; None leaves them alone."""

    image: ImageAugmentation | None = None
    audio: AudioAugmentation | None = None


class TokenStore:
    """Documents as ids, in one flat array; every sample has the same number of views."""

    def __init__(self, ids: np.ndarray, trained: np.ndarray, offsets: np.ndarray, numbers: Sequence[int],
                 views: int):
        self.ids = ids                # (sum of T,) int32
        self.trained = trained        # (sum of T,) bool
        self.offsets = offsets        # (samples * views + 1,) int64
        self.numbers = numbers        # which of the given samples each one is
        self.views = views

    def __len__(self) -> int:
        return len(self.numbers)

    def lengths(self) -> np.ndarray:
        """Tokens of every document, (samples, views)."""
        return np.diff(self.offsets).reshape(len(self), self.views)

    def document(self, sample: int, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and trained mask (T,) of one view of one sample."""
        index = sample * self.views + view
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.trained[part]


def build_store(
    samples: Sequence[Sample],
    tokenizers: Mapping[str, Tokenizer],
    vocabulary: Vocabulary,
    *,
    views: int = 1,
    augmentation: Augmentation = Augmentation(),
    context: int,
    seed: int = 0,
    max_bad: float = 0.01,
    progress: Callable[[Iterable], Iterable] = iter,
) -> TokenStore:
    """Encode every sample `views` times; view 0 is the sample as it is, the others are augmented.

    Samples that cannot be read, or that need more than `context` tokens, are skipped up to the share `max_bad`.
    Text-only samples are the same in every view.
    """
    skipped = SkipCounter(max_bad)
    kept, documents = [], []
    starts = range(0, len(samples), ENCODE_AT_ONCE)
    for first in progress(starts):
        chunk = samples[first:first + ENCODE_AT_ONCE]
        usable, parts = [], []
        for number, sample in enumerate(chunk, start=first):
            try:
                parts.append(_load(sample, tokenizers))
                usable.append(number)
            except InputError as error:
                skipped.skip(error)
        rendered = [
            [render(document, vocabulary) for document in _encode(
                [samples[n] for n in usable], parts, tokenizers, augmentation if view else Augmentation(),
                [seed_of(seed, n, view) for n in usable])]
            for view in range(views)
        ]
        for place, number in enumerate(usable):
            versions = [rendered[view][place] for view in range(views)]
            longest = max(len(version.ids) for version in versions)
            if longest - 1 > context:
                skipped.skip(InputError(f"{samples[number].where}: found {longest} tokens, "
                                        f"expected at most context + 1 = {context + 1}"))
                continue
            if not versions[0].trained.any():
                skipped.skip(InputError(f"{samples[number].where}: found nothing to learn, expected an assistant turn "
                                        "or a plain document"))
                continue
            kept.append(number)
            documents.extend(versions)
        skipped.check(len(samples))
    if not documents:
        raise InputError(f"no sample can be used: {skipped.summary(len(samples))}")
    lengths = [len(document.ids) for document in documents]
    return TokenStore(
        np.concatenate([document.ids for document in documents]),
        np.concatenate([document.trained for document in documents]),
        np.concatenate([[0], np.cumsum(lengths)]),
        kept,
        views,
    )


def seed_of(*numbers: int) -> int:
    """A seed that depends on every number and is the same everywhere."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def load_media(media: Media, tokenizers: Mapping[str, Tokenizer]) -> torch.Tensor:
    """Read a picture or a sound in the form that its tokenizer takes."""
    if media.kind not in tokenizers:
        raise InputError(f"{media.name}: found {media.kind}, but there is no {media.kind} tokenizer")
    if media.kind == "image":
        return tokenizers["image"].fit(load_image(media.source.read(), media.name))
    return load_audio(media.source.read(), tokenizers["audio"].rate, media.name)


def to_documents(samples: Sequence[Sample], tokenizers: Mapping[str, Tokenizer],
                 progress: Callable[[Iterable], Iterable] = iter) -> list[Document]:
    """Samples as documents of codes, as they are. Raises InputError on the first that cannot be read."""
    documents = []
    for first in progress(range(0, len(samples), ENCODE_AT_ONCE)):
        chunk = samples[first:first + ENCODE_AT_ONCE]
        loaded = [_load(sample, tokenizers) for sample in chunk]
        documents += _encode(chunk, loaded, tokenizers, Augmentation(), [0] * len(chunk))
    return documents


def _load(sample: Sample, tokenizers: Mapping[str, Tokenizer]) -> list:
    """Media of a sample in order: tensors; text stays with the sample."""
    return [load_media(part, tokenizers) for turn in sample.turns for part in turn.parts if isinstance(part, Media)]


def _encode(samples, loaded, tokenizers, augmentation: Augmentation, seeds) -> list[Document]:
    """Samples and their media -> documents; all media of a kind go through the tokenizer together."""
    queues: dict[str, list] = {"image": [], "audio": []}
    for sample, tensors, seed in zip(samples, loaded, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        media = [part for turn in sample.turns for part in turn.parts if isinstance(part, Media)]
        for part, tensor in zip(media, tensors, strict=True):
            if part.kind == "image" and augmentation.image:
                tensor = augmentation.image(tensor, generator)
            if part.kind == "audio" and augmentation.audio:
                tensor = augmentation.audio(tensor, tokenizers["audio"].rate, generator)
            queues[part.kind].append(tensor)
    codes = {kind: iter(tokenizers[kind].encode_batch(queue) if queue else ()) for kind, queue in queues.items()}

    def part_of(part) -> Part:
        if isinstance(part, Text):
            return TextPart(tokenizers["text"].encode(part.text))
        return (ImagePart if part.kind == "image" else AudioPart)(next(codes[part.kind]))

    return [Document(tuple(Turn(turn.role, tuple(map(part_of, turn.parts))) for turn in sample.turns))
            for sample in samples]
