"""Data of codecs: media of one kind, with or without captions, read and checked before training, cut and augmented by index.

Shapes: B batch, H height, W width, S samples, F frames, M mels.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mmtx.data.collection import Collected, DataSource, progress, read_sources, require_sources, test_sources
from mmtx.data.corpus import Content
from mmtx.data.sample import Media
from mmtx.data.tokens import load_media, seed_of
from mmtx.errors import InputError
from mmtx.modality.audio import AudioTokenizer
from mmtx.modality.autoencoder import Codec
from mmtx.modality.image import resize, to_float
from mmtx.schema import typed, within
from mmtx.training.loader import ResumableLoader, loader
from mmtx.training.source_data import SourceData


class CodecBatch(NamedTuple):
    """Media of one size, as the codec's `forward` takes them."""

    media: Tensor    # from `Codec.batch`: pictures (B, 3, H, W) in [-1, 1], log-mel (B, F, M)
    samples: Tensor  # (B,) indices of the media; empty in a batch that only keeps ranks in step


class CodecBatches(Dataset):
    """Batch k of media, as a pure function of (seed, k, rank)."""

    def __init__(self, media: list[Tensor], collate: Callable[[list[Tensor], Generator], Tensor], batch_size: int,
                 seed: int, steps: int, rank: int, world: int, weights: Tensor | None):
        """`collate` makes the codec's input from media; without `weights` each medium comes once, in order.

        If media do not divide evenly among ranks, the last batches are smaller or have no samples, as in `PackedBatches`:
        all ranks must take the same number of steps.
        """
        self.media, self.collate, self.batch_size, self.steps = media, collate, batch_size, steps
        self.seed, self.rank, self.world, self.weights = seed, rank, world, weights

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, k: int) -> CodecBatch:
        generator = Generator().manual_seed(seed_of(self.seed, k, self.rank))
        if self.weights is None:
            chosen = range((k * self.world + self.rank) * self.batch_size, (k * self.world + self.rank + 1) * self.batch_size)
            chosen = [i for i in chosen if i < len(self.media)]
            if not chosen:
                return CodecBatch(self.collate(self.media[:1], generator), torch.tensor([], dtype=torch.long))
        else:
            chosen = torch.multinomial(self.weights, self.batch_size, replacement=True, generator=generator).tolist()
        return CodecBatch(self.collate([self.media[i] for i in chosen], generator), torch.tensor(chosen))


class CodecData(SourceData):
    """Media of one kind, read and checked once before training, cut and augmented by index."""

    @typed
    def __init__(self, train: list[DataSource], validation: list[DataSource], batch_size: int = 32, multi_size_prob: float = 0.0,
                 **options: Any):
        """
        Args:
            batch_size: pictures or cuts of sound per batch on each device.
            multi_size_prob: share of training batches that differ from the usual size, so that the codec works at any:
                resized crops of pictures with sides from half a chunk to a whole one, or shorter cuts of sound.
            **options: of `SourceData`.
        """
        super().__init__(train, validation, **options)
        within("data.batch_size", batch_size, 1, 2**24)
        within("data.multi_size_prob", multi_size_prob, 0, 1)
        self.batch_size, self.multi_size_prob = batch_size, multi_size_prob
        self.contents: dict[str, list[Content]] = {}

    def setup(self, stage: str) -> None:
        self.tokenizer = cast(Codec, self.required_loop().module.tokenizer)
        if stage == "test":
            if not hasattr(self, "test_media"):
                self.test_media, _, _ = self._load(read_sources(test_sources(self.test), self.max_bad, captions=False), "test")
            return
        if hasattr(self, "train_media") or stage != "fit" and hasattr(self, "validation_media"):
            return
        # Rows of all sources are read before the media of any.
        train = read_sources(require_sources(self.train_sources, "train"), self.max_bad, captions=False) if stage == "fit" else None
        held_out = read_sources(require_sources(self.validation_sources, "validation"), self.max_bad, captions=False)
        self.validation_media, _, _ = self._load(held_out, "validation")
        if train is not None:
            self.train_media, self.weights, self.names = self._load(train, "train")

    def _load(self, found: Collected, name: str) -> tuple[list[Tensor], Tensor, list[str]]:
        media, weights, names, digests = [], [], [], []
        for sample, repeat, skipped in progress(f"read {name}")(list(zip(*found, strict=True))):
            parts = [part for turn in sample.turns for part in turn.parts
                     if isinstance(part, Media) and part.kind == self.tokenizer.kind]
            digest = [hashlib.blake2b(digest_size=8) for _ in parts]
            try:
                loaded = [load_media(part, {part.kind: self.tokenizer}, own) for part, own in zip(parts, digest, strict=True)]
            except InputError as error:
                skipped.skip(error)
                continue
            media += loaded
            names += [part.name for part in parts]
            digests += [own.digest() for own in digest]
            # Sounds are drawn in proportion to their length.
            weights += [float(repeat) * (1 if self.tokenizer.bands is None else tensor.shape[-1]) for tensor in loaded]
        found.finish()
        if not media:
            raise InputError(f"read {name}: no {self.tokenizer.kind} among {len(found.samples)} samples")
        self.contents[f"data.{name}"] = [Content(np.frombuffer(b"".join(digests), "<i8"), names.__getitem__)]
        return media, torch.tensor(weights, dtype=torch.float64), names

    @property
    def _audio(self) -> AudioTokenizer:
        """The codec, if it is one of sounds."""
        return cast(AudioTokenizer, self.tokenizer)

    def sample_names(self, batch: CodecBatch) -> list[str]:
        """File and row of each medium of a training batch."""
        return [self.names[number] for number in batch.samples.tolist()]

    def _pictures(self, pictures: list[Tensor], generator: Generator) -> Tensor:
        """Pictures of a training batch: each augmented with probability 0.5, and in some batches all randomly cropped."""
        if self.image_augmentation:
            pictures = [self.image_augmentation(picture, generator) if torch.rand((), generator=generator) < 0.5
                        else picture for picture in pictures]
        c = self.tokenizer.config
        if torch.rand((), generator=generator) < self.multi_size_prob or c.side is None:
            height, width = (c.patch * int(torch.randint(-(-c.chunk // 2), c.chunk + 1, (), generator=generator))
                             for _ in range(2))
            pictures = [random_resized_crop(picture, height, width, generator) for picture in pictures]
        return to_float(torch.stack(pictures))

    def _sounds(self, waveforms: list[Tensor], generator: Generator) -> Tensor:
        """Log-mel of cuts of sound, one chunk long or in some batches shorter; each augmented with probability 0.5."""
        c = self.tokenizer.config
        steps = c.chunk
        if torch.rand((), generator=generator) < self.multi_size_prob:
            steps = int(torch.randint(1, c.chunk + 1, (), generator=generator))
        return self._audio.spectrogram(self._augmented_cuts(waveforms, steps, generator))

    def _augmented_cuts(self, waveforms: list[Tensor], steps: int, generator: Generator) -> Tensor:
        """Cuts of sound (B, S), each augmented with probability 0.5."""
        return torch.stack([
            self.audio_augmentation(cut, self._audio.rate, generator)
            if self.audio_augmentation and torch.rand((), generator=generator) < 0.5 else cut
            for cut in self._cuts(waveforms, steps, generator)])

    def _cuts(self, waveforms: list[Tensor], steps: int, generator: Generator) -> Iterator[Tensor]:
        samples = steps * self.tokenizer.config.patch_frames * self.tokenizer.config.hop
        for waveform in waveforms:
            first = int(torch.randint(max(1, len(waveform) - samples + 1), (), generator=generator))
            cut = waveform[first:first + samples]
            yield F.pad(cut, (0, samples - len(cut)))

    def train_dataloader(self) -> ResumableLoader:
        steps = self.batches_of_run()
        collate = {"image": self._pictures, "audio": self._sounds}.get(self.tokenizer.kind, self._pieces)
        return ResumableLoader(self._batches(self.train_media, collate, steps, self.weights), self.num_workers)

    def _pieces(self, media: list[Tensor], generator: Generator) -> Tensor:
        """Pieces of the media of a training batch, as their codec cuts them."""
        return self.tokenizer.batch([self.tokenizer.piece(medium, generator) for medium in media])

    def _held_out(self, name: str) -> DataLoader:
        loop = self.required_loop()
        # The cut of a medium depends only on its index, not on its batch.
        media = [self.held_out_piece(medium, Generator().manual_seed(seed_of(self.seed, number)))
                 for number, medium in enumerate(getattr(self, f"{name}_media"))]
        if len({tuple(medium.shape) for medium in media}) > 1:
            expected = ' with `side` and fit "pad" or "crop"' if self.tokenizer.kind == "image" else " that cuts them"
            raise InputError(f"{name}: found {self.tokenizer.kind} of different sizes, expected a tokenizer{expected}")
        steps = -(-len(media) // (self.batch_size * loop.world))
        return loader(self._batches(media, self.held_out, steps, None), self.num_workers)

    def held_out_steps(self) -> int:
        """Time steps of the codec in a held-out cut of sound."""
        return self.tokenizer.config.chunk

    def held_out_piece(self, medium: Tensor, generator: Generator) -> Tensor:
        """The piece of a held-out medium that is evaluated."""
        if self.tokenizer.kind == "audio":
            return next(self._cuts([medium], self.held_out_steps(), generator))
        return self.tokenizer.piece(medium, generator)

    def held_out(self, media: list[Tensor], generator: Generator) -> Tensor:
        """Pieces of a validation batch, as they are."""
        return self.tokenizer.batch(media)

    def _batches(self, media: list[Tensor], collate, steps: int, weights: Tensor | None) -> CodecBatches:
        return CodecBatches(media, collate, self.batch_size, self.seed, steps, self.loop.rank, self.loop.world, weights)


def random_resized_crop(picture: Tensor, height: int, width: int, generator: Generator) -> Tensor:
    """A random crop of a picture (3, H, W), resized: from the largest of the new aspect ratio to one with a quarter of its sides."""
    largest = min(picture.shape[-2] / height, picture.shape[-1] / width)
    share = 4 ** -float(torch.rand((), generator=generator))
    rows, columns = (max(1, round(edge * largest * share)) for edge in (height, width))
    top = int(torch.randint(picture.shape[-2] - rows + 1, (), generator=generator))
    left = int(torch.randint(picture.shape[-1] - columns + 1, (), generator=generator))
    return resize(picture[:, top:top + rows, left:left + columns], height, width)
