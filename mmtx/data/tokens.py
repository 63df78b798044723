"""Samples to documents of tokens: reads, augments and encodes their media."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch

from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.media import Sampled, cut_of_file
from mmtx.data.sample import Codes, Media, Sample, Text
from mmtx.data.skip_counter import SkipCounter
from mmtx.data.storage import FileSource
from mmtx.document import Document, MediaPart, Part, TextPart, Turn
from mmtx.errors import InputError
from mmtx.modality.base import Tokenizer, check_codes, media_tokenizer
from mmtx.modality.registry import MODALITIES

ENCODE_AT_ONCE = 256  # samples whose media are in memory together
UNAUGMENTED = 0.125   # share of views without augmentation, which is how media come at inference


class Digest(Protocol):
    """A hash object of hashlib."""

    def update(self, data: bytes) -> None: ...


class Augmentation(NamedTuple):
    """The augmentation of training media, by kind; None leaves them unchanged."""

    image: ImageAugmentation | None = None
    audio: AudioAugmentation | None = None

    def of(self, kind: str, medium: torch.Tensor, tokenizer: Tokenizer, generator: torch.Generator) -> torch.Tensor:
        """The augmented medium."""
        if kind == "image" and self.image:
            return self.image(medium, generator)
        if kind == "audio" and self.audio:
            return self.audio(medium, cast(Sampled, tokenizer).rate, generator)
        return medium


def seed_of(*numbers: int) -> int:
    """A seed that depends on every number and is the same everywhere."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def load_media(media: Media, tokenizers: Mapping[str, Tokenizer], digest: Digest | None = None) -> torch.Tensor:
    """Read a medium in the form that its tokenizer takes; its bytes are added to `digest`."""
    if media.kind not in tokenizers:
        raise InputError(f"{media.name}: found {media.kind}, but there is no {media.kind} tokenizer")
    data, options = data_of(media)
    if digest is not None:
        # The digest of an unchanged sound is the same as in versions before speed and semitones.
        played = ("" if media.speed == 1 else f"{media.speed} ") + ("" if media.semitones == 0 else f"{media.semitones} semitones ")
        digest.update(f"{len(data)} {media.start} {media.seconds} {played}".encode())
        digest.update(data)
    modality = MODALITIES[media.kind]
    try:
        return modality.get("read")(tokenizers[media.kind], data, media.name, **options)
    except InputError:
        raise
    except Exception as error:
        if modality.shipped:
            raise
        raise InputError(f"{media.name}: {type(error).__name__}: {' '.join(str(error).split())[:150]}") from error


def data_of(media: Media) -> tuple[Any, dict[str, Any]]:
    """What `read` of a modality takes, with its options: the bytes of a medium, or the samples of a cut of a long sound alone."""
    source, options = media.source, media.options
    if media.kind == "audio" and isinstance(source, FileSource) and source.size is None:
        if found := cut_of_file(source.path, media.name, media.start, media.seconds):
            samples, options["source_rate"] = found
            return samples, {name: value for name, value in options.items() if name not in ("start", "seconds")}
    return source.read(), options


def to_documents(samples: Sequence[Sample], tokenizers: Mapping[str, Tokenizer], patches: Collection[str] = ()) -> list[Document]:
    """Samples as documents of codes, without augmentation. Raises InputError on the first that cannot be read."""
    return [document for _, document in usable(samples, tokenizers, None, patches=patches)]


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


def load_sample(sample: Sample, tokenizers: Mapping[str, Tokenizer], digest: Digest | None = None) -> list:
    """The media of a sample as tensors, in order; their bytes are added to `digest`."""
    return [load_media(part, tokenizers, digest) for turn in sample.turns for part in turn.parts if isinstance(part, Media)]


def encode_samples(samples, loaded, tokenizers, augmentation: Augmentation, seeds,
                   patches: Collection[str] = (), codes: bool = True) -> list[Document]:
    """Samples and their media -> documents; all media of a kind go through the tokenizer together.

    Without `codes`, user turns have codes 0 for the kinds in `patches`, of which the decoder gets patches instead.
    """
    queues: dict[tuple[str, bool], list] = {}  # by kind, and whether codes are wanted
    orders: dict[str, list[bool]] = {}
    for sample, tensors, seed in zip(samples, loaded, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        change = bool(torch.rand((), generator=generator) >= UNAUGMENTED)
        media = [(turn.role, part) for turn in sample.turns for part in turn.parts if isinstance(part, Media)]
        for (role, part), tensor in zip(media, tensors, strict=True):
            if change and role != "assistant":  # targets of generation stay unchanged
                tensor = augmentation.of(part.kind, tensor, tokenizers[part.kind], generator)
            coded = codes or role != "user" or part.kind not in patches
            queues.setdefault((part.kind, coded), []).append(tensor)
            orders.setdefault(part.kind, []).append(coded)
    found = {(kind, coded): iter(tokenizers[kind].embed_batch(queue, kind in patches, coded))
             for (kind, coded), queue in queues.items()}
    encodings = {kind: iter([next(found[kind, coded]) for coded in order]) for kind, order in orders.items()}
    return [document_of(sample, tokenizers, lambda kind: MediaPart(kind, *next(encodings[kind]))) for sample in samples]


def document_of(sample: Sample, tokenizers: Mapping[str, Tokenizer], medium: Callable[[str], MediaPart]) -> Document:
    """A sample as a document; each medium, in order, is what `medium` returns for its kind."""
    def part_of(part) -> Part:
        if isinstance(part, Text):
            return TextPart(tokenizers["text"].encode(part.text))
        if isinstance(part, Codes):
            return _coded(part, tokenizers, sample.where)
        return medium(part.kind)

    return Document(tuple(Turn(turn.role, tuple(map(part_of, turn.parts))) for turn in sample.turns))


def _coded(part: Codes, tokenizers: Mapping[str, Tokenizer], where: str) -> MediaPart:
    if part.kind not in tokenizers:
        raise InputError(f"{where}: found {part.kind}, but there is no {part.kind} tokenizer")
    tokenizer, codes = media_tokenizer(tokenizers, part.kind), np.frombuffer(part.data, "<i4").reshape(part.height, -1)
    try:
        check_codes(codes, range(tokenizer.size), f"{part.kind} codes")
        return MediaPart(part.kind, tokenizer.as_grid(codes))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
