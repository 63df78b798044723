"""The base of data for codecs and the decoder: where samples come from, and how they are read."""

from lightning import LightningDataModule

from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.collection import DataSource
from mmtx.data.sources import MAX_BAD
from mmtx.errors import InputError


class SourceData(LightningDataModule):
    """Samples of sources for training, validation and test."""

    def __init__(
        self,
        train: list[DataSource],
        validation: list[DataSource],
        image_augmentation: ImageAugmentation | None = None,
        audio_augmentation: AudioAugmentation | None = None,
        num_workers: int = 0,
        max_bad: float = MAX_BAD,
        seed: int = 0,
        test: list[DataSource] | None = None,
    ):
        """
        Args:
            train: sources to learn from: for a decoder media, or shards that `mmtx prepare` made of them; for a codec media of
                its kind.
            validation: sources of held-out samples.
            image_augmentation: random changes to pictures, drawn anew each time; none by default. A codec changes half of the
                pictures; for a decoder, prepared pictures and those of assistant turns are not changed.
            audio_augmentation: the same for sounds.
            num_workers: processes that read media and assemble batches.
            max_bad: share of the rows of each source that may be unusable.
            seed: determines order, cuts and augmentation.
            test: sources for `mmtx test`, which nothing else reads.
        """
        super().__init__()
        self.train_sources, self.validation_sources, self.test = train, validation, test
        self.image_augmentation, self.audio_augmentation = image_augmentation, audio_augmentation
        self.num_workers, self.max_bad, self.seed = num_workers, max_bad, seed

    def batches_of_run(self) -> int:
        """Training batches of each process. Raises InputError without a trainer that says how many steps there are."""
        if self.trainer is None:
            raise InputError(f"{type(self).__name__}: found no trainer, expected Trainer(max_steps=...).fit(model, data)")
        if self.trainer.max_steps < 1:
            raise InputError(f"Trainer: found max_steps {self.trainer.max_steps}, expected the steps of the run, which is one epoch")
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches
