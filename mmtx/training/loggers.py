"""Loggers of a run: metrics.csv, which a resumed run continues exactly, and TensorBoard."""

import csv
import io
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.writer import FileWriter

from mmtx.files import write_file
from mmtx.saved_folder import writing


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


class Metrics(Logger):
    """Logs to `folder/metrics/metrics.csv`, row by row; a resumed run continues after the rows of its checkpoint.

    The file of an earlier run is left alone until `keep` says how many rows to keep. Raises InputError if there is no room, and
    leaves no partly written row.
    """

    name, version = "", "metrics"

    def __init__(self, folder: str | Path):
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics" / "metrics.csv"
        self.rows = 0
        self.columns: list[str] = []

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def keep(self, rows: int) -> None:
        """Continue after the first `rows` rows of the existing file."""
        self.rows = rows
        with writing(self.path):
            if not rows:
                self.path.unlink(missing_ok=True)
            elif self.path.is_file():
                self._rewrite(self._read()[:rows])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {**{name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()},
               "step": self.rows if step is None else step}
        self.rows += 1
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file() and {*row} <= {*self.columns}:
                append(self.path, self._table([row], header=False))
            else:
                self._rewrite([*self._read(), row])

    def log_hyperparams(self, params: Any, *arguments: Any, **more: Any) -> None:
        """Nothing: `metrics/config.yaml` has them."""

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.columns = sorted({name for row in rows for name in row})
        write_file(self.path, self._table(rows, header=True))

    def _table(self, rows: list[dict[str, Any]], header: bool) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()


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
