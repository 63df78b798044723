"""Resume checkpoints: written whole or not at all, checked when read, and refused by a run that is not theirs.

A file is what `torch.save` writes with MAGIC and the SHA-256 of all that behind it, which `torch.load` ignores.
"""

import hashlib
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from mmtx.errors import InputError
from mmtx.training.loader import ResumableLoader
from mmtx.training.signals import Termination

MAGIC = b"mmtx-sha256:"
TAIL = len(MAGIC) + hashlib.sha256().digest_size
KEPT = 2  # files in the folder: while one is written, and if it turns out damaged, there is one before it


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs and renames, so that a kill or a full disk leaves the files that were there.

    `record` says, as plain values by name, all that makes the batches and the model of a run what they are. It is
    stored with each checkpoint, and reading one with another record raises InputError.
    """

    def __init__(self):
        self.record: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises InputError if there is no room, or if a weight or a state of the optimizer is not finite."""
        path = Path(path)
        check_finite({name: checkpoint.get(name, {}) for name in
                      ("state_dict", "current_model_state", "optimizer_states")}, str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(".part")  # the same for all, so that no second one is left behind by kills
        writer = None
        try:
            with open(part, "wb") as file:
                writer = _Writer(file)
                torch.save({**checkpoint, "record": self.record}, writer)
                writer.finish()
            os.replace(part, path)
            _sync(path.parent)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(
                f"{path}: {writer.size if writer else 0} bytes cannot be written ({error.strerror}), "
                f"{shutil.disk_usage(path.parent).free} bytes are free; older checkpoints stay") from None

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None,
                        ) -> dict[str, Any]:
        """Raises InputError for a damaged file, or one of a run with another record. Never unpickles objects."""
        if (why := damage(Path(path))) is not None:
            raise InputError(f"{path}: {why}")
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        record = checkpoint.get("record", {})
        for name in sorted({*record, *self.record}):
            found, expected = record.get(name), self.record.get(name)
            if found != expected:
                raise InputError(f"{path}: {name}: found {found!r}, expected {expected!r} as in this run")
        return checkpoint


class _Writer:
    """What `torch.save` writes to: it hashes, counts, and keeps an error for later, since torch would abort on it."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.size, self.error = file, hashlib.sha256(), 0, None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        """Add the checksum and wait until all is on the disk. Raises OSError if anything was not."""
        self.write(MAGIC + self.hash.digest())
        if self.error is not None:
            raise self.error
        self.file.flush()
        os.fsync(self.file.fileno())


def _sync(folder: Path) -> None:
    """Put the names in a folder on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(path: Path) -> str | None:
    """Why a file is no checkpoint that can be trusted, or None if it is one."""
    try:
        with open(path, "rb") as file:
            left = os.fstat(file.fileno()).st_size - TAIL
            digest = hashlib.sha256()
            while left > 0 and (data := file.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
            tail = file.read()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not tail.startswith(MAGIC):
        return "no checksum at its end: it is truncated, or not a checkpoint of mmtx"
    return None if tail == MAGIC + digest.digest() else "its checksum does not fit: it has changed since it was written"


def by_age(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first. A run that starts anew has lower steps than the one before it."""
    return sorted(folder.glob("step-*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def newest(folder: Path) -> Path | None:
    """The newest sound checkpoint of a folder, None if it holds none at all; tells of damaged ones on stderr.

    Raises InputError if all are damaged.
    """
    paths = by_age(folder)
    for path in reversed(paths):
        if (why := damage(path)) is None:
            return path
        if rank_zero_only.rank == 0:
            print(f"mmtx: {path}: {why}; going back to the checkpoint before it", file=sys.stderr)
    if paths:
        raise InputError(f"{folder}: found {len(paths)} damaged checkpoints and no sound one")
    return None


def check_finite(values: Any, where: str) -> None:
    """Raise InputError that names the first of nested tensors with a value that is not finite."""
    for name, tensor in _tensors(values):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{where}: not written, for {name} holds values that are not finite")


def _tensors(values: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(values, Tensor):
        yield name, values
    elif isinstance(values, Mapping | list | tuple):
        items = values.items() if isinstance(values, Mapping) else enumerate(values)
        for key, value in items:
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def flatten(values: Any, name: str = "") -> dict[str, Any]:
    """Nested configuration as plain values by dotted name."""
    if isinstance(values, Mapping | list | tuple):
        items = values.items() if isinstance(values, Mapping) else enumerate(values)
        return {path: leaf for key, value in items
                for path, leaf in flatten(value, f"{name}.{key}" if name else str(key)).items()}
    return {name: values if isinstance(values, bool | int | float | str | None) else str(values)}


class Checkpoints(Checkpoint):
    """Writes `folder/step-N.ckpt` every `every` steps, before each validation and on SIGTERM, which ends the run.

    No checkpoint is written after the last step: a run resumed from it would find nothing to do, not even to write
    the model.
    """

    def __init__(self, folder: str | Path, every: int):
        self.folder, self.every = Path(folder), every
        self.termination = Termination()
        self.rows = 0                      # of metrics.csv that belong to the checkpoint
        self.validate = False              # whether a validation was due when it was written
        self.sizes: int | None = None      # checksum of the samples' sizes, to notice that files have changed

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "validate": self.validate, "sizes": self.sizes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.validate, self.sizes = state["rows"], state["validate"], state["sizes"]

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.termination.listen(trainer)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        for logger in trainer.loggers:
            if hasattr(logger, "keep"):
                logger.keep(self.rows)
        found = checksum(trainer.train_dataloader)
        if self.sizes not in (None, found):
            raise InputError(f"data.train: found samples whose sizes have the checksum {found:08x}, expected "
                             f"{self.sizes:08x} as in the run to be resumed: files have changed")
        self.sizes = found
        if self.validate:
            # The trainer would take the validation that the checkpoint was written before for done.
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting, trainer.validating = False, True
            loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        loop = trainer.fit_loop
        if not module.automatic_optimization or loop._should_accumulate() or trainer.global_step >= trainer.max_steps:
            return
        stop = self.termination.agreed(trainer)
        self.validate = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if stop or self.validate or trainer.global_step % self.every == 0:
            self._save(trainer)
        if stop:
            self.termination.leave(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # The state before the validation has been saved.
        if self.termination.agreed(trainer):
            self.termination.leave(trainer)

    def _save(self, trainer: Trainer) -> None:
        # The trainer logs the step after this hook; a kill in between would lose its row.
        trainer._logger_connector.update_train_step_metrics()
        self.rows = max((getattr(logger, "rows", 0) for logger in trainer.loggers), default=0)
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:09d}.ckpt")
        if trainer.is_global_zero:
            for path in by_age(self.folder)[:-KEPT]:
                trainer.strategy.remove_checkpoint(path)


def checksum(loader: Any) -> int | None:
    """CRC-32 of the sizes of all samples behind a loader of batches; None for one that cannot resume."""
    if not isinstance(loader, ResumableLoader):
        return None
    data = loader.dataset
    return zlib.crc32(np.ascontiguousarray(data.documents.lengths if hasattr(data, "documents") else data.weights))
