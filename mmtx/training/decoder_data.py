"""Data of the decoder: samples as packed batches of ids, and the tokenizers that encode them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, make_dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from mmtx.data.collection import DataSource, progress, require_sources, test_sources
from mmtx.data.corpus import Content, Corpus, read_corpus
from mmtx.data.packing import Batch, PackedBatches
from mmtx.data.sample import with_captions
from mmtx.data.tokens import Augmentation
from mmtx.errors import InputError
from mmtx.modality.base import Tokenizer, load_tokenizer
from mmtx.modality.registry import media_kinds
from mmtx.schema import typed
from mmtx.shipped_files import find_shipped
from mmtx.training.loader import ResumableLoader, loader
from mmtx.training.source_data import SourceData
from mmtx.vocabulary import Vocabulary

CAPTIONED = 16  # batch size of `mmtx predict`


def with_media(kind: Any, default: Any, help: str) -> Callable[[type], type]:
    """Give a dataclass a field for each kind of media registered at its definition; `help` describes it, as in "weight of {}."."""
    def extended(cls: type) -> type:
        more_help = "".join(f"    {name}: {help.format(name)}\n    " for name in media_kinds())
        names = {"__doc__": f"{cls.__doc__}{more_help}", "__qualname__": cls.__qualname__}
        more = [(name, kind, field(default=default)) for name in media_kinds()]
        made = make_dataclass(cls.__name__, more, bases=(cls,), namespace=names, frozen=True)
        made.__module__ = cls.__module__  # from Python 3.12 on, make_dataclass sets its caller's, where pickle would not find it
        return made
    return extended


@typed
@with_media(str | None, None, "folder of the {} tokenizer; null for a model without.")
@dataclass(frozen=True)
class TokenizerFolders:
    """Folders of the tokenizers by kind.

    Args:
        text: folder of the text tokenizer.
    """

    text: str

    def load(self) -> dict[str, Tokenizer]:
        """The tokenizers by kind. Raises InputError for a folder that holds none, or one of another kind."""
        folders = {kind: folder for kind, folder in asdict(self).items() if folder is not None}
        found = {kind: load_tokenizer(find_shipped(folder)) for kind, folder in folders.items()}
        for kind, tokenizer in found.items():
            if tokenizer.kind != kind:
                raise InputError(f"tokenizers.{kind}: {folders[kind]} holds a tokenizer for {tokenizer.kind}")
        return found


class DecoderData(SourceData):
    """Samples -> documents of codes and features -> packed batches."""

    @typed
    def __init__(self, tokenizers: TokenizerFolders, train: list[DataSource], validation: list[DataSource],
                 tokens_per_batch: int = 4096, max_seq_len: int = 1024, **options: Any):
        """
        Args:
            tokenizers: folders of the tokenizers.
            tokens_per_batch: tokens per batch on each device.
            max_seq_len: most tokens in a document; longer samples are skipped.
            **options: of `SourceData`.
        """
        super().__init__(train, validation, **options)
        self.max_seq_len, self.tokens_per_batch = max_seq_len, tokens_per_batch
        self.augmentation = Augmentation(self.image_augmentation, self.audio_augmentation)
        self.tokenizers = tokenizers.load()
        self.vocabulary = Vocabulary.build(self.tokenizers)

    def setup(self, stage: str) -> None:
        merge_size = getattr(self.loop.module, "merge_size", {})
        self.vocabulary = self.vocabulary.merging(merge_size)
        takes = (*map(self._takes, ("continuous_inputs", "train_encoder", "dpo")), merge_size)
        if takes != getattr(self, "read_for", takes):  # it was read for another decoder, or before there was one
            for name in ("train_documents", "validation_documents", "test_documents"):
                self.__dict__.pop(name, None)
        self.read_for = takes
        if stage == "test" and not hasattr(self, "test_documents"):
            self.test_documents = self._read(test_sources(self.test), "read test")
        if stage != "test" and not hasattr(self, "validation_documents"):
            self.validation_documents = self._read(require_sources(self.validation_sources, "validation"), "read validation")
            self.held_out = self.validation_documents.samples
        if stage == "fit" and not hasattr(self, "train_documents"):
            sources = require_sources(self.train_sources, "train")
            self.train_documents = self._read(sources, "read train", augmentation=self.augmentation)

    def _read(self, sources: list[DataSource], name: str, **more: Any) -> Corpus:
        return read_corpus(sources, self.tokenizers, self.vocabulary, max_seq_len=self.max_seq_len, seed=self.seed,
                           max_bad=self.max_bad, features=self._takes("continuous_inputs"),
                           patches=self.tokenizers if self._takes("train_encoder") else (), pairs=self._takes("dpo"),
                           num_workers=self.num_workers, progress=progress(name), **more)

    @property
    def contents(self) -> dict[str, list[Content]]:
        """Digests of the data, which must be unchanged when a run is resumed."""
        return {"data.train": self.train_documents.contents(), "data.validation": self.validation_documents.contents()}

    def _takes(self, option: str) -> bool:
        """Whether the decoder trains with an option that determines what the data give it."""
        return bool(getattr(self.loop.module, option, False))

    def sample_names(self, batch: Batch) -> list[str]:
        """File and row of each sample of a training batch."""
        return [self.train_documents.where(number) for number in batch.samples.tolist()]

    def train_dataloader(self) -> ResumableLoader:
        steps = self.batches_of_run()
        batches = PackedBatches(
            self.train_documents, self.vocabulary, self.tokens_per_batch, repeats=self.train_documents.repeats, seed=self.seed,
            steps=steps, rank=self.loop.rank, world=self.loop.world)
        return ResumableLoader(batches, self.num_workers)

    def _held_out(self, name: str) -> DataLoader:
        loop = self.required_loop()
        return loader(PackedBatches(getattr(self, f"{name}_documents"), self.vocabulary, self.tokens_per_batch, shuffle=False,
                                    rank=loop.rank, world=loop.world))

    def predict_dataloader(self) -> DataLoader:
        """Lists of validation samples that have a caption. Raises InputError if there are none."""
        samples = with_captions(self.held_out)
        if not samples:
            raise InputError("data.validation: found no samples that a caption answers, expected media, not prepared shards")
        return DataLoader(samples, batch_size=CAPTIONED, collate_fn=list)  # type: ignore[arg-type]  # a list is a dataset

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Samples to caption are not tensors yet.
        return batch if isinstance(batch, list) else super().transfer_batch_to_device(batch, device, dataloader_idx)
