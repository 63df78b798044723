"""What a run leaves behind: its metrics, the finished model folder, and samples that one can look at."""

import csv
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageDraw
from safetensors import SafetensorError

from mmtx.data.prepare import write
from mmtx.data.sample import Text
from mmtx.data.storage import redacted
from mmtx.data.tokens import to_documents
from mmtx.errors import InputError
from mmtx.files import check_target
from mmtx.inference.sampling import Sampling
from mmtx.training.checkpoint import check_finite
from mmtx.training.codec import CodecModule
from mmtx.training.decoder import DecoderModule
from mmtx.training.sharding import whole

TILE = 96  # pixels a side of a picture on a contact sheet


class ProgressBar(TQDMProgressBar):
    """The stock bar without the logger's version, which tells nothing here."""

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return metrics


class MetricsWriter(ExperimentWriter):
    """The stock writer, which leaves the file of an earlier run alone until it is told what to keep of it.

    Raises InputError where there is no room, and takes a row back that was written in part.
    """

    def __init__(self, folder: str):
        with writing(folder):
            super().__init__(folder)

    def _check_log_dir_exists(self) -> None:
        pass

    def save(self) -> None:
        path, metrics = Path(self.metrics_file_path), self.metrics
        if not metrics:
            return
        self.metrics = []  # what there is no room for now, there will be none for when the run ends
        with writing(path):
            new, there = {key for row in metrics for key in row} - {*self.metrics_keys}, path.is_file()
            self.metrics_keys = sorted({*self.metrics_keys, *new})
            if new and there:
                self._rewrite_with_new_header(self.metrics_keys)
            size = path.stat().st_size if there else 0
            try:
                with open(path, "a", newline="") as file:
                    writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
                    if not there:
                        writer.writeheader()
                    writer.writerows(metrics)
            except OSError:
                os.truncate(path, size)
                raise

    def _rewrite_with_new_header(self, fieldnames: list[str], rows: int | None = None) -> None:
        with open(self.metrics_file_path, newline="") as file:
            metrics = list(csv.DictReader(file))[:rows]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(metrics)
        write(Path(self.metrics_file_path), text.getvalue().encode())

    def keep(self, rows: int) -> None:
        with writing(self.metrics_file_path):
            self._keep(rows)

    def _keep(self, rows: int) -> None:
        if not rows:
            Path(self.metrics_file_path).unlink(missing_ok=True)
        elif Path(self.metrics_file_path).is_file():
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])
            self._rewrite_with_new_header(self.metrics_keys, rows)


class Metrics(CSVLogger):
    """`folder/metrics/metrics.csv`, written row by row; a resumed run goes on where its checkpoint was written."""

    def __init__(self, folder: str | Path):
        super().__init__(folder, name="", version="metrics", flush_logs_every_n_steps=1)
        self.rows = 0
        self.latest: tuple[int | None, list[str]] | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsWriter:
        if self._experiment is None:
            self._experiment = MetricsWriter(self.log_dir)
        return self._experiment

    @rank_zero_only
    def keep(self, rows: int) -> None:
        """Drop all but the first `rows` rows of the file that is there."""
        self.experiment.keep(rows)
        self.rows = rows

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        # A checkpoint logs the step before it is written, and the trainer does so after it.
        if (step, sorted(metrics)) != self.latest:
            self.latest = step, sorted(metrics)
            self.rows += 1
            super().log_metrics(metrics, step)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What the system refuses within is told as an InputError about `path`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


class SaveConfig(SaveConfigCallback):
    """Writes `folder/metrics/config.yaml`: all that decided about the run.

    Passwords and signatures of URLs are left out: who runs it again gives them again.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any):
        super().__init__(parser, without_secrets(config), **options)

    def save_config(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        path = Path(trainer.logger.log_dir) / self.config_filename
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        write(path, self.parser.dump(self.config, skip_none=False).encode())


def without_secrets(value: Any) -> Any:
    """A configuration whose URLs are as they may be seen."""
    if isinstance(value, Namespace):
        return Namespace(**{name: without_secrets(inside) for name, inside in vars(value).items()})
    if isinstance(value, dict):
        return {name: without_secrets(inside) for name, inside in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(inside) for inside in value)
    return redacted(value) if isinstance(value, str) else value


class SaveModel(Callback):
    """Writes `folder/model` when training ends; it appears whole or not at all."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute() / "model"

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Raises InputError for a folder that may not be replaced, before hours of training and not after."""
        check_target(self.folder)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.interrupted:
            return
        with whole(module), writing(self.folder):
            if trainer.is_global_zero:
                check_finite(module.state_dict(), str(self.folder))
                module.save(self.folder)


class ShowSamples(Callback):
    """After each validation: captions of held-out samples as text, and pictures as a contact sheet.

    For a codec the sheet shows originals above their reconstructions.
    """

    def __init__(self, folder: str | Path, count: int = 16):
        self.folder, self.count = Path(folder) / "samples", count

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        with whole(module):
            if trainer.is_global_zero:
                self._show(trainer, module)

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        was_training = module.training
        module.eval()
        path = self.folder / f"step-{trainer.global_step:06d}"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode():
            if isinstance(module, DecoderModule):
                self._captions(trainer, module, path)
            elif isinstance(module, CodecModule):
                self._reconstructions(trainer, module, path)
        module.train(was_training)

    def _captions(self, trainer: Trainer, module: DecoderModule, path: Path) -> None:
        samples = trainer.datamodule.held_out
        samples = [s for s in samples[:: max(1, len(samples) // self.count)]
                   if s.turns[-1].role == "assistant" and all(isinstance(part, Text) for part in s.turns[-1].parts)]
        model, documents = module.model(), to_documents(samples, trainer.datamodule.tokenizers)
        captions = model.caption_documents(documents, Sampling(max_new_tokens=48))
        lines = [f"{caption!r:40} {sample.caption!r}" for caption, sample in zip(captions, samples, strict=True)]
        write(path.with_suffix(".txt"), ("\n".join([f"{'predicted':40} true", *lines]) + "\n").encode())
        tiles = []
        for document, caption, sample in zip(documents, captions, samples, strict=True):
            part = next((p for turn in document.turns for p in turn.parts if p.kind == "image"), None)
            if part is not None:
                picture = module.trainer.datamodule.tokenizers["image"].decode(part.codes)
                tiles.append((picture, f"{caption}\n({sample.caption})"))
        contact_sheet(tiles, path.with_suffix(".png"))

    def _reconstructions(self, trainer: Trainer, module: CodecModule, path: Path) -> None:
        batch = next(iter(trainer.datamodule.val_dataloader()))
        media = batch.media[:self.count].to(module.device)
        output = module.tokenizer(media).output
        if module.tokenizer.kind == "image":
            pictures = [((item.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).cpu() for pair in zip(media, output) for item in pair]
        else:
            # A spectrogram as a grey picture: time to the right, low tones at the bottom.
            media, output = module.shown(media), module.shown(output)
            pictures = [(item.clamp(-1, 3) + 1).div(4).mul(255).to(torch.uint8).T.flip(0).cpu().expand(3, -1, -1)
                        for pair in zip(media, output) for item in pair]
        contact_sheet([(p, "reconstruction" if i % 2 else "original") for i, p in enumerate(pictures)],
                      path.with_suffix(".png"))


def contact_sheet(tiles: list[tuple[torch.Tensor, str]], path: Path, columns: int = 8) -> None:
    """Pictures, uint8 (3, H, W), with a text below each, as one PNG."""
    if not tiles:
        return
    rows = -(-len(tiles) // columns)
    width, height = TILE + 8, TILE + 34
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(tiles):
        x, y = i % columns * width + 4, i // columns * height + 4
        sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((TILE, TILE)), (x, y))
        short = "\n".join(line[:17] for line in text.split("\n"))
        draw.multiline_text((x, y + TILE + 2), short, fill="black", font_size=10, spacing=1)
    encoded = io.BytesIO()
    sheet.save(encoded, "png")
    write(path, encoded.getvalue())
