"""Training samples as documents of tokens: their lengths are measured once, and each batch encodes them anew."""

import hashlib
import pickle
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from mmtx.data.sample import Codes, Media, Sample, Text
from mmtx.data.skip_counter import MAX_BAD, SkipCounter
from mmtx.data.tokens import Augmentation, document_of, encode_samples, load_sample, seed_of
from mmtx.data.workers import WorkerDied, Workers
from mmtx.document import MediaPart
from mmtx.errors import InputError
from mmtx.modality.base import Tokenizer, media_tokenizer
from mmtx.sequence import Pair, Rendered, render
from mmtx.vocabulary import Vocabulary

BLOCK = 128          # samples that a process measures at a time
MIN_FOR_WORKERS = 32 * BLOCK  # samples from which on processes are worth the seconds that they take to start


class Documents:
    """Samples as documents. All are read and measured once; each batch reads and encodes its media again.

    So each view of a sample can differ, and a corpus of any size needs memory for its paths and texts only.
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
        pairs: bool = False,
        num_workers: int = 0,
        progress: Callable[[Iterable], Iterable] = iter,
    ):
        """Samples that cannot be read, or that need more than `max_seq_len` tokens, are skipped.

        Media of the kinds in `patches` come with patches instead of features, for a decoder with encoders of its own.

        `counters` holds the counter of each sample's source, which limits how many may be skipped; by default all samples are of
        one source. `first` is the number of the first sample; numbers seed the views. With `pairs`, each sample is rendered with
        its preferred and with its rejected answer, and must have both; its length is the sum, less one. If `num_workers` is more
        than one, so many processes measure.
        """
        if counters is None:
            counters = [SkipCounter(MAX_BAD, len(samples))] * len(samples)
        self.tokenizers, self.vocabulary, self.augmentation, self.seed = tokenizers, vocabulary, augmentation, seed
        self.patches, self.pairs = patches, pairs
        self.samples: list[Sample] = []  # those that can be used
        self.numbers: list[int] = []     # their numbers among all samples, counted from `first`
        lengths, digests = [], []
        with closing(_measured(samples, first, Measure(tokenizers, vocabulary, max_seq_len, pairs), num_workers)) as measured:
            for number, (sample, found) in enumerate(zip(progress(samples), measured, strict=True), first):
                if isinstance(found, InputError):
                    counters[number - first].skip(found)
                    continue
                self.samples.append(sample)
                self.numbers.append(number)
                lengths.append(found[0])
                digests.append(found[1])
        for skipped in dict.fromkeys(counters):
            skipped.check()
        if not self.samples:
            raise InputError(f"no sample can be used: {counters[0].summary()}")
        self.lengths = np.array(lengths)  # (samples,) tokens of each document
        self.digests = np.frombuffer(b"".join(digests), "<i8")  # (samples,) of the text and media of each

    def __len__(self) -> int:
        return len(self.samples)

    def where(self, number: int) -> str:
        """File and row of a document."""
        return self.samples[number].where

    def load(self, sample: Sample) -> list[torch.Tensor]:
        """The media of a sample, in order; a subclass may keep them in memory."""
        return load_sample(sample, self.tokenizers)

    def render(self, chosen: Sequence[tuple[int, int]]) -> list[Rendered | Pair]:
        """Documents of (sample, view) pairs. All views of a sample have the same length and text, unless its prompt is dropped.

        The answers of a pair have the same view of what they answer.
        """
        answers = [(answer, seed_of(self.seed, self.numbers[number], view)) for number, view in chosen
                   for answer in _answers(self.samples[number], self.pairs)]
        samples, seeds = [_drop(answer, seed) for answer, seed in answers], [seed for _, seed in answers]
        media = [self.load(sample) for sample in samples]
        documents = encode_samples(samples, media, self.tokenizers, self.augmentation, seeds, self.patches, codes=False)
        rendered = [render(document, self.vocabulary) for document in documents]
        found: list[Rendered | Pair] = [*map(Pair, rendered[::2], rendered[1::2])] if self.pairs else [*rendered]
        for (number, _), one in zip(chosen, found, strict=True):
            if (length := _length(one)) > self.lengths[number]:
                raise InputError(f"{self.where(number)}: found {length} tokens, expected {self.lengths[number]} as at the start of "
                                 "the run; its file has changed")
        return found


def _answers(sample: Sample, pairs: bool) -> tuple[Sample, ...]:
    return sample.pair if pairs else (sample,)


def _length(rendered: Rendered | Pair) -> int:
    """Tokens of a document, or of both documents of a pair without the last of one: a batch leaves out the last of each."""
    return 1 + sum(len(one.ids) - 1 for one in rendered) if isinstance(rendered, Pair) else len(rendered.ids)


class Measure(NamedTuple):
    """What the length of a document depends on, besides the sample."""

    tokenizers: Mapping[str, Tokenizer]
    vocabulary: Vocabulary
    max_seq_len: int
    pairs: bool


Measured = tuple[int, bytes] | InputError  # tokens of a document and the digest of the sample, or why it cannot be used


def _measured(samples: Sequence[Sample], first: int, measure: Measure, num_workers: int) -> Generator[Measured, None, None]:
    """Measure all samples in order, here or in processes that work some blocks ahead."""
    if num_workers < 2 or len(samples) < MIN_FOR_WORKERS:
        for number, sample in enumerate(samples, first):
            yield _measure(sample, number, measure)
        return
    pool = Workers(num_workers, _measure_block, measure._replace(tokenizers=dict(measure.tokenizers)))
    try:
        running: deque[Future] = deque()
        for start in range(0, len(samples), BLOCK):
            # Metadata are not sent: lengths do not depend on them, and they may be large.
            block = [replace(sample, metadata={}) for sample in samples[start:start + BLOCK]]
            running.append(pool.submit(pickle.dumps((first + start, block))))
            if len(running) > 4 * num_workers:
                yield from running.popleft().result()
        for future in running:
            yield from future.result()
    except WorkerDied as died:
        raise InputError(f"data.num_workers: one of the {num_workers} worker processes that read the samples {died}; the same "
                         "command starts again") from None
    finally:
        pool.end()


def _measure_block(measure: Measure, first: int, samples: Sequence[Sample]) -> list[Measured]:
    torch.set_num_threads(1)
    return [_measure(sample, number, measure) for number, sample in enumerate(samples, first)]


def _measure(sample: Sample, number: int, measure: Measure) -> Measured:
    """The length of the sample's document, rendered with all codes 0, and a digest of its contents."""
    digest = hashlib.blake2b(b"%d" % number, digest_size=8)  # the number seeds augmentation
    if measure.pairs and sample.rejected is None:
        return InputError(f"{sample.where}: found one answer, expected two, in fields 'chosen' and 'rejected', for model.dpo")
    try:
        found = [_blank(answer, measure, digest) for answer in _answers(sample, measure.pairs)]
    except InputError as error:
        return error
    for rendered in found:
        if len(rendered.ids) - 1 > measure.max_seq_len:
            return InputError(f"{sample.where}: found {len(rendered.ids)} tokens, "
                              f"expected at most max_seq_len + 1 = {measure.max_seq_len + 1}")
        if not rendered.loss_mask.any():
            return InputError(f"{sample.where}: found nothing to learn, expected an assistant turn or a plain document")
    return _length(Pair(*found) if measure.pairs else found[0]), digest.digest()


def _blank(sample: Sample, measure: Measure, digest: Any) -> Rendered:
    """The sample's document with all codes of media 0; its contents are added to the digest."""
    for turn in sample.turns:
        texts = [part.text if isinstance(part, Text) else None for part in turn.parts]
        digest.update(f"{turn.role} {texts}".encode("utf-8", "backslashreplace"))
        for part in turn.parts:
            if isinstance(part, Codes):
                digest.update(part.data)
    media = load_sample(sample, measure.tokenizers, digest)
    kinds = [part.kind for turn in sample.turns for part in turn.parts if isinstance(part, Media)]
    blank = iter([MediaPart.blank(kind, media_tokenizer(measure.tokenizers, kind).grid(tensor))
                  for kind, tensor in zip(kinds, media, strict=True)])
    return render(document_of(sample, measure.tokenizers, lambda _: next(blank)), measure.vocabulary)


def _drop(sample: Sample, seed: int) -> Sample:
    """The sample, with its user turns emptied for a share `cond_drop_prob` of the seeds."""
    if np.random.default_rng(seed).random() >= sample.cond_drop_prob:
        return sample
    turns = (replace(turn, parts=()) if turn.role == "user" else turn for turn in sample.turns)
    return replace(sample, turns=tuple(turns))
