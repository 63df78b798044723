"""The base of data for codecs and the decoder: where samples come from, how they are read, and which loop takes the batches."""

from typing import Any, NamedTuple

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.collection import DataSource
from mmtx.data.skip_counter import MAX_BAD
from mmtx.errors import InputError
from mmtx.schema import typed, within
from mmtx.training.module import TrainingModule


class Loop(NamedTuple):
    """The training loop that takes batches: a trainer's, or the user's own."""

    module: Any = None  # what it trains
    batches: int = 0    # of each process
    rank: int = 0
    world: int = 1


class SourceData(LightningDataModule):
    """Samples of sources for training, validation and test."""

    @typed
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
        self.own_loop = Loop()

    @typed
    def attach(self, module: TrainingModule, steps: int, rank: int = 0, world: int = 1) -> None:
        """Prepare a training loop of the user's own, as a trainer would: build the module's network, and read the data.

        `train_dataloader` then has `steps` batches, those of a trainer with as many `max_steps`; process `rank` of `world` gets its
        own.
        """
        within("steps", steps, 1, 2**48)
        within("rank", rank, 0, world - 1)
        self.trainer = module.trainer = None
        self.own_loop, module.own_data = Loop(module, steps, rank, world), self
        module.prepare_data()
        self.setup("fit")
        module.configure_model()

    @property
    def loop(self) -> Loop:
        """The loop of the trainer, or else the one that `attach` prepared."""
        if (trainer := self.trainer) is None:
            return self.own_loop
        return Loop(trainer.lightning_module, trainer.max_steps * trainer.accumulate_grad_batches, trainer.global_rank,
                    trainer.world_size)

    def required_loop(self) -> Loop:
        """`loop`. Raises InputError if there is none yet."""
        if (loop := self.loop).module is None:
            raise InputError(f"{type(self).__name__}: found no trainer, expected Trainer(max_steps=...).fit(model, data), or "
                             "data.attach(model, steps=...) for a loop of your own")
        return loop

    def batches_of_run(self) -> int:
        """Training batches of each process. Raises InputError if it is not known how many there are."""
        if (loop := self.required_loop()).batches < 1:
            raise InputError(f"Trainer: found max_steps {self.trainer.max_steps}, expected the steps of the run, which is one epoch")
        return loop.batches

    def val_dataloader(self) -> DataLoader:
        return self._held_out("validation")

    def test_dataloader(self) -> DataLoader:
        return self._held_out("test")

    def _held_out(self, name: str) -> DataLoader:
        """Batches of the held-out samples of an option: "validation" or "test"."""
        raise NotImplementedError
