"""Samples to documents of tokens, encoded anew each time a batch asks for them.

Shapes: T tokens of a document, h rows and w columns of codes (time steps and bands of a sound).
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch

from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.media import Sampled
from mmtx.data.sample import Media, Sample, Text
from mmtx.data.sources import MAX_BAD, SkipCounter
from mmtx.document import Document, MediaPart, Part, TextPart, Turn
from mmtx.errors import InputError
from mmtx.modality.base import Encoding, Tokenizer, media_tokenizer
from mmtx.modality.modality import MODALITIES
from mmtx.sequence import Rendered, render
from mmtx.vocabulary import Vocabulary

ENCODE_AT_ONCE = 256  # samples whose media are in memory together
UNTOUCHED = 0.125     # share of views that augmentation leaves alone, for that is how media come in use


class Digest(Protocol):
    """As of hashlib."""

    def update(self, data: bytes) -> None: ...


class Augmentation(NamedTuple):
    """What is done to media of a training sample, by kind; None leaves them alone."""

    image: ImageAugmentation | None = None
    audio: AudioAugmentation | None = None

    def of(self, kind: str, medium: torch.Tensor, tokenizer: Tokenizer, generator: torch.Generator) -> torch.Tensor:
        """A medium changed."""
        if kind == "image" and self.image:
            return self.image(medium, generator)
        if kind == "audio" and self.audio:
            return self.audio(medium, cast(Sampled, tokenizer).rate, generator)
        return medium


class Documents:
    """Samples as documents. All are read and measured once; their media are read and encoded again for each batch.

    So every view of a sample can differ, and a corpus of any size needs no more memory than its paths and texts.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizers: Mapping[str, Tokenizer],
        vocabulary: Vocabulary,
        *,
        max_seq_len: int,
        augmentation: Augmentation = Augmentation(),
        seed: int = 0,
        patches: Collection[str] = (),
        counters: Sequence[SkipCounter] | None = None,
        first: int = 0,
        progress: Callable[[Iterable], Iterable] = iter,
    ):
        """Samples that cannot be read, or that need more than `max_seq_len` tokens, are skipped.

        Of the kinds in `patches` media come with their patches, for a decoder with encoders, and not with features.

        `counters` are those of the source of each sample, and say how many may be; without them all are of one source.
        `first` is the number of the first sample, by which its views are seeded.
        """
        if counters is None:
            counters = [SkipCounter(MAX_BAD, len(samples))] * len(samples)
        self.tokenizers, self.vocabulary, self.augmentation, self.seed = tokenizers, vocabulary, augmentation, seed
        self.patches = patches
        self.samples: list[Sample] = []  # those that can be used
        self.numbers: list[int] = []     # which of the given samples they are, from `first`
        lengths, digests = [], []
        for number, sample in enumerate(progress(samples), first):
            digest = hashlib.blake2b(b"%d" % number, digest_size=8)  # the number decides about augmentation
            try:
                rendered = self._measure(sample, max_seq_len, digest)
            except InputError as error:
                counters[number - first].skip(error)
                continue
            self.samples.append(sample)
            self.numbers.append(number)
            lengths.append(len(rendered.ids))
            digests.append(digest.digest())
        for skipped in dict.fromkeys(counters):
            skipped.check()
        if not self.samples:
            raise InputError(f"no sample can be used: {counters[0].summary()}")
        self.lengths = np.array(lengths)  # (samples,) tokens of each document
        self.digests = np.frombuffer(b"".join(digests), "<i8")  # (samples,) of all that each says and shows

    def __len__(self) -> int:
        return len(self.samples)

    def where(self, number: int) -> str:
        """File and row of a document."""
        return self.samples[number].where

    def render(self, chosen: Sequence[tuple[int, int]]) -> list[Rendered]:
        """Documents of (sample, view) pairs. All views of a sample have the same length and text, or are shorter."""
        seeds = [seed_of(self.seed, self.numbers[sample], view) for sample, view in chosen]
        samples = [_drop(self.samples[sample], seed) for (sample, _), seed in zip(chosen, seeds, strict=True)]
        media = [load_sample(sample, self.tokenizers) for sample in samples]
        documents = encode_samples(samples, media, self.tokenizers, self.augmentation, seeds, self.patches, codes=False)
        return [render(document, self.vocabulary) for document in documents]

    def _measure(self, sample: Sample, max_seq_len: int, digest: Digest) -> Rendered:
        """The document with all codes 0; what it is made of is added to `digest`."""
        for turn in sample.turns:
            texts = [part.text if isinstance(part, Text) else None for part in turn.parts]
            digest.update(f"{turn.role} {texts}".encode("utf-8", "backslashreplace"))
        media = load_sample(sample, self.tokenizers, digest)
        kinds = [part.kind for turn in sample.turns for part in turn.parts if isinstance(part, Media)]
        blank = {kind: iter([Encoding(np.zeros(media_tokenizer(self.tokenizers, kind).grid(tensor), int), None)
                             for k, tensor in zip(kinds, media, strict=True) if k == kind]) for kind in set(kinds)}
        rendered = render(_document(sample, self.tokenizers, blank), self.vocabulary)
        if len(rendered.ids) - 1 > max_seq_len:
            raise InputError(f"{sample.where}: found {len(rendered.ids)} tokens, "
                             f"expected at most max_seq_len + 1 = {max_seq_len + 1}")
        if not rendered.loss_mask.any():
            raise InputError(f"{sample.where}: found nothing to learn, expected an assistant turn or a plain document")
        return rendered


def seed_of(*numbers: int) -> int:
    """A seed that depends on every number and is the same everywhere."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def load_media(media: Media, tokenizers: Mapping[str, Tokenizer], digest: Digest | None = None) -> torch.Tensor:
    """Read a medium in the form that its tokenizer takes; its bytes are added to `digest`."""
    if media.kind not in tokenizers:
        raise InputError(f"{media.name}: found {media.kind}, but there is no {media.kind} tokenizer")
    data = media.source.read()
    if digest is not None:
        digest.update(f"{len(data)} {media.start} {media.seconds} ".encode())
        digest.update(data)
    return MODALITIES[media.kind].get("read")(tokenizers[media.kind], data, media.name, **media.cut)


def to_documents(samples: Sequence[Sample], tokenizers: Mapping[str, Tokenizer],
                 progress: Callable[[Iterable], Iterable] = iter, patches: Collection[str] = ()) -> list[Document]:
    """Samples as documents of codes, as they are. Raises InputError on the first that cannot be read."""
    return [document for _, document in usable(samples, tokenizers, None, progress, patches)]


def usable(samples: Sequence[Sample], tokenizers: Mapping[str, Tokenizer], skipped: SkipCounter | None,
           progress: Callable[[Iterable], Iterable] = iter,
           patches: Collection[str] = ()) -> list[tuple[Sample, Document]]:
    """Samples with their documents of codes; those that cannot be read are left out and counted, or raise InputError."""
    found: list[tuple[Sample, Document]] = []
    for first in progress(range(0, len(samples), ENCODE_AT_ONCE)):
        chunk, loaded = [], []
        for sample in samples[first:first + ENCODE_AT_ONCE]:
            try:
                loaded.append(load_sample(sample, tokenizers))
                chunk.append(sample)
            except InputError as error:
                if skipped is None:
                    raise
                skipped.skip(error)
        documents = encode_samples(chunk, loaded, tokenizers, Augmentation(), [0] * len(chunk), patches)
        found += zip(chunk, documents, strict=True)
    return found


def _drop(sample: Sample, seed: int) -> Sample:
    """The sample or, for its share `cond_drop_prob` of seeds, the sample with its user turns emptied."""
    if np.random.default_rng(seed).random() >= sample.cond_drop_prob:
        return sample
    turns = (replace(turn, parts=()) if turn.role == "user" else turn for turn in sample.turns)
    return replace(sample, turns=tuple(turns))


def load_sample(sample: Sample, tokenizers: Mapping[str, Tokenizer], digest: Digest | None = None) -> list:
    """Media of a sample in order: tensors; text stays with the sample. Their bytes are added to `digest`."""
    return [load_media(part, tokenizers, digest) for turn in sample.turns for part in turn.parts if isinstance(part, Media)]


def encode_samples(samples, loaded, tokenizers, augmentation: Augmentation, seeds,
                   patches: Collection[str] = (), codes: bool = True) -> list[Document]:
    """Samples and their media -> documents; all media of a kind go through the tokenizer together.

    Without `codes` those of a user turn are 0 where a decoder gets patches in their place.
    """
    queues: dict[tuple[str, bool], list] = {}  # by kind, and whether codes are wanted
    orders: dict[str, list[bool]] = {}
    for sample, tensors, seed in zip(samples, loaded, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        change = bool(torch.rand((), generator=generator) >= UNTOUCHED)
        media = [(turn.role, part) for turn in sample.turns for part in turn.parts if isinstance(part, Media)]
        for (role, part), tensor in zip(media, tensors, strict=True):
            if change and role != "assistant":  # what is to be made is learnt as it is
                tensor = augmentation.of(part.kind, tensor, tokenizers[part.kind], generator)
            coded = codes or role != "user" or part.kind not in patches
            queues.setdefault((part.kind, coded), []).append(tensor)
            orders.setdefault(part.kind, []).append(coded)
    found = {(kind, coded): iter(tokenizers[kind].embed_batch(queue, kind in patches, coded))
             for (kind, coded), queue in queues.items()}
    encodings = {kind: iter([next(found[kind, coded]) for coded in order]) for kind, order in orders.items()}
    return [_document(sample, tokenizers, encodings) for sample in samples]


def _document(sample: Sample, tokenizers: Mapping[str, Tokenizer], encodings: Mapping[str, Iterator[Encoding]]) -> Document:
    """A sample as a document; each medium takes the next encoding of its kind."""
    def part_of(part) -> Part:
        if isinstance(part, Text):
            return TextPart(tokenizers["text"].encode(part.text))
        return MediaPart(part.kind, *next(encodings[part.kind]))

    return Document(tuple(Turn(turn.role, tuple(map(part_of, turn.parts))) for turn in sample.turns))
