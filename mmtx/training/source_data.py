"""What data of codecs and of the decoder have in common: where samples come from, and how they are read."""

from lightning import LightningDataModule

from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.collection import DataSource
from mmtx.data.sources import MAX_BAD


class SourceData(LightningDataModule):
    """Samples of sources, to learn from, to validate with and to test with."""

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
            train: what to learn from; for a decoder media, or what `mmtx prepare` made of them, for a codec media of its kind.
            validation: held-out samples.
            image_augmentation: changes to pictures, new ones each time, none by default. A codec has every second picture
                changed; a decoder has none where `train` is prepared, nor what an assistant turn is to make.
            audio_augmentation: changes to sounds, likewise.
            num_workers: processes that read media and put batches together.
            max_bad: share of the rows of each source that may be unusable.
            seed: fixes order, cuts and augmentation.
            test: samples for `mmtx test`, which nothing else reads.
        """
        super().__init__()
        self.train_sources, self.validation_sources, self.test = train, validation, test
        self.image_augmentation, self.audio_augmentation = image_augmentation, audio_augmentation
        self.num_workers, self.max_bad, self.seed = num_workers, max_bad, seed
