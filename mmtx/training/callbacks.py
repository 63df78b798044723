"""What a run leaves behind: its configuration, the finished model folder, and samples that one can look at."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw

from mmtx.data.prepare import write
from mmtx.data.storage import redacted
from mmtx.data.tokens import to_documents
from mmtx.files import check_target
from mmtx.inference.sampling import Sampling
from mmtx.modality.modality import MODALITIES
from mmtx.training.checkpoint import check_finite
from mmtx.training.codec import CodecModule
from mmtx.training.decoder import DecoderModule, with_captions
from mmtx.training.loggers import Metrics, writing
from mmtx.training.sharding import whole

TILE = 96  # pixels a side of a picture on a contact sheet


class ProgressBar(TQDMProgressBar):
    """The stock bar without the logger's version, which tells nothing here."""

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return metrics


class SaveConfig(SaveConfigCallback):
    """Writes `folder/metrics/config.yaml`: all that decided about the run.

    Passwords and signatures of URLs are left out: who runs it again gives them again.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any):
        super().__init__(parser, without_secrets(config), **options)

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.save_config(trainer, module, stage)

    def save_config(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        (metrics,) = (logger for logger in trainer.loggers if isinstance(logger, Metrics))
        path = Path(metrics.log_dir) / self.config_filename
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

    For a codec the sheet shows originals above their reconstructions. Loggers of TensorBoard get both.
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
        samples = getattr(trainer.datamodule, "held_out", [])
        samples = with_captions(samples[:: max(1, len(samples) // self.count)])
        model, documents = module.model(), to_documents(samples, module.tokenizers, patches=module.config.encoders)
        captions = model.caption_documents(documents, Sampling(max_new_tokens=48))
        lines = [f"{caption!r:40} {sample.caption!r}" for caption, sample in zip(captions, samples, strict=True)]
        lines = [f"{'predicted':40} true", *lines]
        write(path.with_suffix(".txt"), ("\n".join(lines) + "\n").encode())
        for board in boards(trainer):
            board.add_text("samples", "\n".join(f"    {line}" for line in lines), trainer.global_step)  # four blanks: as it is
        tiles = []
        for document, caption, sample in zip(documents, captions, samples, strict=True):
            media = (part for turn in document.turns for part in turn.parts if MODALITIES[part.kind].picture is not None)
            if (part := next(media, None)) is not None and module.tokenizers[part.kind].decodes:
                picture = MODALITIES[part.kind].get("picture")(module.tokenizers[part.kind], part.codes)
                tiles.append((picture, f"{caption}\n({sample.caption})"))
        self._sheet(trainer, tiles, path)

    def _reconstructions(self, trainer: Trainer, module: CodecModule, path: Path) -> None:
        batch = next(iter(trainer.datamodule.val_dataloader()))
        media = batch.media[:self.count].to(module.device)
        output = module.tokenizer(media).output
        pairs = zip(module.tokenizer.pictures(media), module.tokenizer.pictures(output), strict=True)
        pictures = [picture for pair in pairs for picture in pair]
        self._sheet(trainer, [(p, "reconstruction" if i % 2 else "original") for i, p in enumerate(pictures)], path)

    @staticmethod
    def _sheet(trainer: Trainer, tiles: list[tuple[torch.Tensor, str]], path: Path) -> None:
        if (sheet := contact_sheet(tiles, path.with_suffix(".png"))) is not None:
            for board in boards(trainer):
                board.add_image("samples", np.asarray(sheet), trainer.global_step, dataformats="HWC")


def boards(trainer: Trainer) -> list[Any]:
    """The writers of all TensorBoard loggers, by default one or none."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def contact_sheet(tiles: list[tuple[torch.Tensor, str]], path: Path, columns: int = 8) -> Image.Image | None:
    """Pictures, uint8 (3, H, W), with a text below each, as one PNG; no tiles, no sheet."""
    if not tiles:
        return None
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
    return sheet
