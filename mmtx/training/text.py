"""Training of the text tokenizer with the same command as everything else.

SentencePiece has no gradients: a single "step" passes it all texts.
"""

from pathlib import Path

import torch
from lightning import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from mmtx.data.collection import DataSource, read_sources, require_sources
from mmtx.data.sample import Text
from mmtx.data.skip_counter import MAX_BAD
from mmtx.errors import InputError
from mmtx.modality.text import TextTokenizer
from mmtx.schema import typed


class TextData(LightningDataModule):
    """All texts of the samples, captions and prompts alike, as one batch."""

    @typed
    def __init__(self, train: list[DataSource], max_bad: float = MAX_BAD):
        """
        Args:
            train: sources whose texts to learn from.
            max_bad: share of the rows of each source that may be unusable.
        """
        super().__init__()
        self.train_sources, self.max_bad = train, max_bad

    def setup(self, stage: str) -> None:
        found = read_sources(require_sources(self.train_sources, "train"), self.max_bad)
        found.finish()
        self.texts = [part.text for sample in found.samples for turn in sample.turns for part in turn.parts
                      if isinstance(part, Text)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.texts], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


class TextModule(LightningModule):
    """Trains a SentencePiece model in one step."""

    @typed
    def __init__(self, size: int = 1024):
        """
        Args:
            size: maximum number of pieces, 257 of them fixed (bytes and unknown); the result has fewer if the texts have no more.
        """
        super().__init__()
        self.size = size
        self.automatic_optimization = False
        self.tokenizer: TextTokenizer | None = None

    def configure_optimizers(self) -> None:
        return None

    def training_step(self, texts: list[str], index: int) -> None:
        self.tokenizer = TextTokenizer.train(texts, self.size)
        characters = sum(len(text) for text in texts)
        pieces = sum(len(self.tokenizer.encode(text)) for text in texts)
        self.log("pieces", torch.tensor(float(self.tokenizer.size)), prog_bar=True)
        self.log("characters_per_piece", torch.tensor(characters / max(1, pieces)), prog_bar=True)

    def save(self, folder: str | Path) -> None:
        if self.tokenizer is None:
            raise InputError("TextModule: found no tokenizer yet, expected Trainer(max_epochs=1).fit(model, data) before")
        self.tokenizer.save(folder)
