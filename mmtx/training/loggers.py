"""Loggers of a run: metrics.csv, which a resumed run continues exactly, and TensorBoard."""

import csv
import io
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.writer import FileWriter

from mmtx.errors import InputError
from mmtx.files import write_file


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn operating-system errors in this context into an InputError about `path`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


def append(path: str | Path, data: bytes) -> None:
    """Append to a file, all or nothing. Raises OSError if there is no room."""
    size = os.stat(path).st_size if os.path.isfile(path) else 0
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError:
        if os.path.isfile(path):
            os.truncate(path, size)
        raise


class MetricsWriter:
    """Writes `folder/metrics.csv`; the file of an earlier run is left alone until `keep` says how many rows to keep.

    Raises InputError if there is no room, and removes a partly written row.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "metrics.csv"
        self.names: list[str] = []
        self.rows: list[dict[str, Any]] = []
        with writing(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add a row, which `save` writes."""
        self.rows.append({**{name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()},
                          "step": step})

    def save(self) -> None:
        rows, self.rows = self.rows, []  # not retried when the run ends, if there is no room now
        if not rows:
            return
        with writing(self.path):
            new, there = {name for row in rows for name in row} - {*self.names}, self.path.is_file()
            self.names = sorted({*self.names, *new})
            if new and there:
                self._rewrite()
            append(self.path, self._table(rows, header=not there))

    def keep(self, rows: int) -> None:
        """Drop all but the first `rows` rows of the existing file."""
        with writing(self.path):
            if not rows:
                self.path.unlink(missing_ok=True)
            elif self.path.is_file():
                with open(self.path, newline="") as file:
                    self.names = next(csv.reader(file), [])
                self._rewrite(rows)

    def _rewrite(self, rows: int | None = None) -> None:
        with open(self.path, newline="") as file:
            kept = list(csv.DictReader(file))[:rows]
        write_file(self.path, self._table(kept, header=True))

    def _table(self, rows: list[dict[str, Any]], header: bool) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.names)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()


class Metrics(Logger):
    """Logs to `folder/metrics/metrics.csv`, row by row; a resumed run continues after the rows of its checkpoint."""

    name, version = "", "metrics"

    def __init__(self, folder: str | Path):
        super().__init__()
        self.folder = Path(folder)
        self.rows = 0
        self.writer: MetricsWriter | None = None

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        return str(self.folder / "metrics")

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsWriter:
        if self.writer is None:
            self.writer = MetricsWriter(self.log_dir)
        return self.writer

    @rank_zero_only
    def keep(self, rows: int) -> None:
        """Continue after the first `rows` rows of the existing file."""
        self.experiment.keep(rows)
        self.rows = rows

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log_metrics(metrics, self.rows if step is None else step)
        self.rows += 1
        self.experiment.save()

    def log_hyperparams(self, params: Any, *arguments: Any, **more: Any) -> None:
        """Nothing: `metrics/config.yaml` has them."""


class EventFile(FileWriter):
    """Writes each event at once, whole or not at all, to a file that the first event creates.

    Raises InputError if there is no room. The stock writer has a thread, which a full disk ends silently, and then the run waits
    for it forever. It also overwrites a file with the same name from the same second, as of a run that was resumed at once.
    """

    def __init__(self, folder: str):
        self.folder, self.path = folder, Path(folder) / f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
        self.first: int | None = 0  # the step to start at; None once the file has been started

    def get_logdir(self) -> str:
        return self.folder

    def add_event(self, event: Event, step: int | None = None, walltime: float | None = None) -> None:
        if self.first is not None:
            first, self.first = self.first, None
            with writing(self.folder):
                Path(self.folder).mkdir(parents=True, exist_ok=True)
            self.add_event(Event(file_version="brain.Event:2"), first)
            # Makes viewers drop what an interrupted run has logged for this and later steps.
            self.add_event(Event(session_log=SessionLog(status=SessionLog.START)), first)
        event.wall_time = time.time() if walltime is None else walltime
        if step is not None:
            event.step = int(step)
        data = event.SerializeToString()
        header = struct.pack("<Q", len(data))
        with writing(self.path):
            append(self.path, b"".join((header, struct.pack("<I", masked_crc32c(header)),
                                        data, struct.pack("<I", masked_crc32c(data)))))

    def flush(self) -> None:
        pass

    close = reopen = flush


class EventWriter(SummaryWriter):
    """The stock writer of scalars, text, images and more, to an `EventFile`."""

    file_writer: EventFile | None

    def _get_file_writer(self) -> EventFile:
        if self.file_writer is None:
            self.file_writer = EventFile(self.logdir)
            self.all_writers = {self.logdir: self.file_writer}
        return self.file_writer

    def close(self) -> None:
        """Does nothing: no file is open. After the stock method, the next event would go to a new file."""


class TensorBoard(TensorBoardLogger):
    """Event files in `folder/tensorboard`; a resumed run adds one."""

    def __init__(self, folder: str | Path):
        super().__init__(folder, name="", version="tensorboard", default_hp_metric=False)
        self.writer: EventWriter | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> EventWriter:
        if self.writer is None:
            self.writer = EventWriter(self.log_dir)
        return self.writer

    @rank_zero_only
    def start_at(self, step: int) -> None:
        """Continue at `step`: viewers drop what an interrupted run has logged from there on."""
        self.experiment.file_writer.first = step

    @rank_zero_only
    def log_hyperparams(self, params: Any, *arguments: Any, **more: Any) -> None:
        """Nothing: `metrics/config.yaml` has them."""

    def save(self) -> None:
        """Does nothing: everything is written already."""

    def finalize(self, status: str) -> None:
        pass
