"""Resume checkpoints: written atomically, verified when read, and refused by a run that differs from theirs.

A file is the output of `torch.save`, followed by MAGIC and the SHA-256 of that output, which `torch.load` ignores.
"""

import hashlib
import os
import re
import shutil
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from mmtx.data.corpus import Content
from mmtx.errors import InputError
from mmtx.files import sync_folder
from mmtx.saved_folder import writing
from mmtx.training import private
from mmtx.training.checkpoint_check import check_checkpoint, check_fits, shown
from mmtx.training.loader import ResumableLoader
from mmtx.training.loggers import Metrics, TensorBoard
from mmtx.training.sharding import Sharded
from mmtx.training.signals import Termination

MAGIC = b"mmtx-sha256:"
TAIL = len(MAGIC) + hashlib.sha256().digest_size
KEPT = 2  # checkpoints in the folder: if the newest turns out damaged, there is an older one


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file, syncs and renames, so that a kill or a full disk leaves existing checkpoints intact.

    `record` holds everything that determines the batches and the model of a run, as plain values by name. It is stored in
    each checkpoint, and reading one with another record raises InputError. `compared` selects by name which values must
    agree: to resume, all that must not change; to validate, those that determine the model.
    """

    def __init__(self, compared: Callable[[str], bool] = lambda name: not may_change(name)):
        self.record: dict[str, Any] = {}
        self.compared = compared
        self.sound: Path | None = None  # a file that `newest` has already verified

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises InputError if there is no room, or if a weight or optimizer state is not finite."""
        path = Path(path)
        check_finite({name: checkpoint.get(name, {}) for name in
                      ("state_dict", "current_model_state", "optimizer_states")}, str(path))
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(".part")  # one name for all, so that kills leave at most one behind
        writer = None
        try:
            with open(part, "wb") as file:
                writer = _Writer(file)
                torch.save({**checkpoint, "record": self.record}, cast(IO[bytes], writer))
                writer.finish()
            os.replace(part, path)
            sync_folder(path.parent)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(
                f"{path}: {writer.size if writer else 0} bytes cannot be written ({error.strerror}), "
                f"{shutil.disk_usage(path.parent).free} bytes are free; older checkpoints are kept") from None

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None,
                        ) -> dict[str, Any]:
        """Raises InputError for a damaged file, or that of a run with another record. Never unpickles objects."""
        if Path(path) != self.sound and (why := damage(Path(path))) is not None:
            raise InputError(f"{path}: {why}")
        checkpoint = _read(Path(path), map_location or "cpu")
        check_checkpoint(checkpoint, str(path))
        record = checkpoint.get("record", {})
        for name in sorted(filter(self.compared, {*record, *self.record})):
            found, expected = record.get(name), self.record.get(name)
            if found != expected:
                raise InputError(f"{path}: {name}: found {shown(found)}, expected {shown(expected)} as in this run")
        return checkpoint


def may_change(name: str) -> bool:
    """Whether an option may differ when a run is resumed, such as the location of its data, whose content is compared instead."""
    place = r"data\.init_args\.(num_workers|test(\..*)?|(train|validation)\.\d+\.(paths\.\d+|trusted|follow_links|reader|variants))"
    return re.fullmatch(place, name) is not None


def _read(path: Path, device: Any) -> Any:
    """Read what `torch.save` wrote. Raises InputError for anything else; never unpickles objects."""
    try:
        with zipfile.ZipFile(path) as archive:
            # `torch.save` never compresses: a file that would be larger in memory than on disk is not from it.
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size
                   for entry in archive.infolist()):
                raise InputError(f"{path}: not a checkpoint of mmtx (compressed)")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location=device, weights_only=True)
    except InputError:
        raise
    except Exception as error:  # malformed bytes can make both readers raise anything
        raise InputError(f"{path}: not a checkpoint of mmtx ({type(error).__name__})") from None


class _Writer:
    """The file that `torch.save` writes to: it hashes, counts bytes, and defers errors, on which torch would abort."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

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
        """Add the checksum and sync to disk. Raises OSError if any write failed."""
        self.write(MAGIC + self.hash.digest())
        if self.error is not None:
            raise self.error
        self.file.flush()
        os.fsync(self.file.fileno())


def damage(path: Path) -> str | None:
    """Why a file is not a sound checkpoint, or None if it is one."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "is no file, expected a checkpoint"
        with open(path, "rb") as file:
            left = os.fstat(file.fileno()).st_size - TAIL
            digest = hashlib.sha256()
            while left > 0 and (data := file.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
            tail = file.read()
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if not tail.startswith(MAGIC):
        return "no checksum at its end: it is truncated, or not a checkpoint of mmtx"
    return None if tail == MAGIC + digest.digest() else "its checksum does not fit: it has changed since it was written"


def by_age(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first by modification time: a run that starts anew has lower steps than the last.

    A file of another name, such as a copy that somebody keeps, is none of them.
    """
    return sorted(folder.glob(f"step-{'[0-9]' * 9}.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def newest(folder: Path) -> Path | None:
    """The newest sound checkpoint of a folder, None if it holds none at all; damaged ones are reported on stderr.

    Raises InputError if all are damaged.
    """
    paths = by_age(folder)
    for path in reversed(paths):
        if (why := damage(path)) is None:
            return path
        if getattr(rank_zero_only, "rank", 0) == 0:
            print(f"mmtx: {path}: {why}; using the checkpoint before it", file=sys.stderr)
    if paths:
        raise InputError(f"{folder}: found {len(paths)} damaged checkpoints and no sound one")
    return None


def check_finite(values: Any, where: str) -> None:
    """Raise InputError that names the first tensor, at any nesting depth, with a value that is not finite."""
    for name, value in leaves(values):
        # The sum needs no extra memory, but may overflow although all values are finite.
        if isinstance(value, Tensor) and value.is_floating_point() and not (value.sum().isfinite() or value.isfinite().all()):
            raise InputError(f"{where}: not written, for {name} holds values that are not finite")


def leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All values of nested mappings and lists, each with its dotted name."""
    if not isinstance(values, Mapping | list | tuple):
        yield name, values
        return
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        yield from leaves(value, f"{name}.{key}" if name else str(key))


class Checkpoints(Checkpoint):
    """Writes `folder/step-N.ckpt` every `every` steps, before each validation and when the run is asked to end.

    No checkpoint is written after the last step: a run resumed from it would have nothing to do, and not even write
    the model.
    """

    def __init__(self, folder: str | Path, every: int):
        self.folder, self.every = Path(folder), every
        self.termination = Termination()
        self.rows = 0                      # of metrics.csv that belong to the checkpoint
        self.validate = False              # whether a validation was due when it was written
        self.contents: dict[str, list[Tensor]] = {}  # digests of all samples, by option such as data.train

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "validate": self.validate, "contents": self.contents}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.validate = state["rows"], state["validate"]
        self.contents = state.get("contents", {})  # older checkpoints have none

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.termination.listen(trainer)
        if not isinstance(trainer.strategy, Sharded):
            private.before_restoring(trainer, lambda found: check_fits(
                found, private.state_now(trainer), trainer.optimizers, str(trainer.ckpt_path)))

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if module.automatic_optimization:
            self.termination.listen_to_interrupts()
        for logger in trainer.loggers:
            if isinstance(logger, Metrics):
                logger.keep(self.rows)
            elif isinstance(logger, TensorBoard):
                logger.start_at(trainer.global_step)
        loader = trainer.train_dataloader
        if isinstance(loader, ResumableLoader) and loader.next != trainer.global_step * trainer.accumulate_grad_batches:
            raise InputError(f"{trainer.ckpt_path}: found {loader.next} batches for {trainer.global_step} steps, expected "
                             f"{trainer.accumulate_grad_batches} each")
        contents = getattr(private.data_of(trainer), "contents", {})
        if self.contents:
            for name, sources in contents.items():
                compare(name, sources, self.contents.get(name, []))
        self.contents = {name: [torch.tensor(source.digests) for source in sources] for name, sources in contents.items()}
        if self.validate:
            private.validate_now(trainer)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if not module.automatic_optimization or not private.ends_step(trainer) or trainer.global_step >= trainer.max_steps:
            return
        stop = self.termination.requested(trainer)
        self.validate = private.validation_due(trainer)
        if stop or trainer.should_stop or self.validate or trainer.global_step % self.every == 0:
            self._save(trainer)
        if stop:
            self.termination.leave(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # The state before the validation has been saved.
        if self.termination.requested(trainer):
            self.termination.leave(trainer)

    def _save(self, trainer: Trainer) -> None:
        private.log_step_now(trainer)
        self.rows = max((logger.rows for logger in trainer.loggers if isinstance(logger, Metrics)), default=0)
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:09d}.ckpt")
        if trainer.is_global_zero:
            for path in by_age(self.folder)[:-KEPT]:
                trainer.strategy.remove_checkpoint(path)


def compare(name: str, sources: list[Content], before: list[Tensor]) -> None:
    """Raise InputError that names the first sample that has changed since the run began."""
    if len(sources) != len(before):
        raise InputError(f"{name}: found {len(sources)} kinds of sources, expected {len(before)} as in the run to be resumed")
    for source, digests in zip(sources, before):
        found, expected = source.digests, digests.numpy()
        least = min(len(found), len(expected))
        other = np.flatnonzero(found[:least] != expected[:least])
        if len(found) == len(expected) and not len(other):
            continue
        first = int(other[0]) if len(other) else least
        place = f"first {source.where(first)}" if first < len(found) else "the last ones are missing"
        count = f"{len(other)} of {len(found)} samples differ from" if len(found) == len(expected) else \
            f"found {len(found)} samples, not the {len(expected)} of"
        raise InputError(f"{name}: {count} the run to be resumed, {place}; expected the same data")
