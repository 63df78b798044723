"""What must hold before a run trains or evaluates, and cannot be read from the type of an option."""

import re
import sys
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from mmtx.errors import InputError
from mmtx.schema import within
from mmtx.training.codec import CodecModule
from mmtx.training.decoder import DecoderModule
from mmtx.training.sharding import Sharded
from mmtx.training.source_data import SourceData
from mmtx.training.text import TextModule
from mmtx.training.vocoder import VocoderModule

LARGEST_OPTION = 10**9  # of steps, other counts and weights
MOST_WORKERS = 2**12
# Callbacks that change the settings that a run was planned with or need several epochs, and the option to set instead.
PLANNED = {GradientAccumulationScheduler: "trainer.accumulate_grad_batches", LearningRateFinder: "model.optimizer.learning_rate",
           BatchSizeFinder: "data.batch_size or data.tokens_per_batch", StochasticWeightAveraging: "ema"}


def check_fit(trainer: Trainer, given: Any, model: LightningModule, data: LightningDataModule, ema: float | None) -> None:
    """Raise InputError for a training run that cannot be; `given` are the options of the trainer as they were said."""
    _check_length(trainer, given, model, data)
    validates = _check_validation(trainer, given)
    if (clip := trainer.gradient_clip_val) is not None and not clip >= 0:  # which also refuses NaN
        raise InputError(f"trainer.gradient_clip_val: found {clip}, expected 0 or more")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _check_callback(callback, model, validates)
    within("model.z_loss", getattr(model, "z_loss", 0), 0, LARGEST_OPTION)
    within("data.seed", getattr(data, "seed", 0), 0, 2**64 - 1)
    check_run(trainer, model, data)
    if isinstance(trainer.strategy, Sharded):
        _check_sharded(model, ema)
    elif not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(f'trainer.strategy: found {type(trainer.strategy).__name__}, expected "ddp" or "sharded", whose '
                         "checkpoints a kill cannot damage")


def check_run(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> None:
    """Raise InputError for a run of any kind that cannot be."""
    within("data.num_workers", getattr(data, "num_workers", 0), 0, MOST_WORKERS)
    if isinstance(model, CodecModule | VocoderModule) and trainer.precision in ("16-true", "bf16-true", "64-true"):
        raise InputError(f'trainer.precision: found "{trainer.precision}", expected "32-true", "bf16-mixed" or "16-mixed" for '
                         "tokenizers, whose spectrograms and codes are computed in float32")


def _check_length(trainer: Trainer, given: Any, model: LightningModule, data: LightningDataModule) -> None:
    if isinstance(data, SourceData):
        # Its epoch is the whole run, so options that count epochs or cut them would do something else than they say.
        if given.max_epochs not in (None, -1):
            raise InputError(f"trainer.max_epochs: found {given.max_epochs}, expected none: trainer.max_steps is the length of a run")
        for name, default in (("limit_train_batches", 1.0), ("overfit_batches", 0.0)):
            if (value := getattr(given, name)) not in (None, default) or type(value) is int and value:
                raise InputError(f"trainer.{name}: found {value}, expected none: trainer.max_steps is the length of a run, and "
                                 "limit of a source in data.train takes fewer samples")
    if model.automatic_optimization:
        within("trainer.max_steps", trainer.max_steps, 1, LARGEST_OPTION)
    elif isinstance(model, TextModule) and trainer.world_size > 1:
        raise InputError(f"trainer.devices: found {trainer.world_size} processes, expected 1 for a text tokenizer")
    within("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, 1, LARGEST_OPTION)
    within("trainer.log_every_n_steps", trainer.log_every_n_steps, 0, LARGEST_OPTION)  # type: ignore[attr-defined]


def _check_validation(trainer: Trainer, given: Any) -> bool:
    """Whether the run is validated."""
    every, batches = given.val_check_interval, trainer.max_steps * trainer.accumulate_grad_batches
    if isinstance(every, int | float) and every <= 0:
        raise InputError(f"trainer.val_check_interval: found {every}, expected more than 0 (limit_val_batches 0: no validation)")
    if given.limit_val_batches == 0:
        return False
    if given.fast_dev_run or not isinstance(every, int) or not 0 < batches < every:
        return True
    if given.check_val_every_n_epoch is not None:
        raise InputError(f"trainer.val_check_interval: found {every}, expected at most {batches}, the batches of the run")
    if trainer.is_global_zero:
        print(f"mmtx: trainer.val_check_interval: found {every}, more than the {batches} batches of the run, so that it is "
              "not validated", file=sys.stderr)
    return False


def _check_callback(callback: Callback, model: LightningModule, validates: bool) -> None:
    found, monitor = f"trainer.callbacks: found {type(callback).__name__}", getattr(callback, "monitor", None)
    if (option := PLANNED.get(type(callback))) is not None:
        raise InputError(f"{found}, expected {option}")
    if isinstance(callback, BackboneFinetuning) and not hasattr(model, "backbone"):
        raise InputError(f"{found}, expected another, for {type(model).__name__} has no backbone")
    if isinstance(monitor, str) and monitor.startswith("val/") and not validates:
        raise InputError(f"{found} of {monitor}, expected another metric, for this run is not validated")
    if isinstance(callback, ModelCheckpoint):
        try:
            callback.format_checkpoint_name({})
        except (AttributeError, LookupError, ValueError) as error:
            raise InputError(f"{found} with the filename {callback.filename!r} ({error}), expected one such as "
                             '"{step}-{val/loss:.2f}"') from None


def _check_sharded(model: LightningModule, ema: float | None) -> None:
    if not isinstance(model, DecoderModule):
        raise InputError('trainer.strategy: found "sharded", which shares out decoders only, expected "ddp"')
    if ema is not None:
        raise InputError('ema: found an average of the weights, expected none with trainer.strategy "sharded"')
    if model.optimizer_config.muon_lr is not None:
        raise InputError(f"model.init_args.optimizer.muon_lr: found {model.optimizer_config.muon_lr}, expected none "
                         'with trainer.strategy "sharded", since Muon turns whole matrices')


def missing_metric(message: str) -> str | None:
    """Lightning's message that a callback monitors a metric that does not exist, in one clear line; None for any other message."""
    found = re.search(r"ModelCheckpoint\(monitor='(.+?)'\).* returned metrics: \[(.*?)\]", message) or re.search(
        r"Early stopping conditioned on metric `(.+?)` .* following: (.*)", message)
    if found is None:
        return None
    metrics = [name for name in re.findall(r"[^`', ]+", found[2]) if name not in ("epoch", "step")]
    return f"trainer.callbacks: found the monitor {found[1]!r}, expected one of {', '.join(metrics)}"
