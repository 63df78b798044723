"""Callbacks that write what a run leaves behind: its configuration, the finished model folder, and samples to look at."""

import io
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile
import torch
from jsonargparse import Namespace
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw
from torch import Tensor

from mmtx import __version__
from mmtx.data.storage import redacted
from mmtx.data.tokens import to_documents
from mmtx.files import write_file
from mmtx.inference.sampling import Sampling
from mmtx.json_files import write_json
from mmtx.medium import Sound, to_sound
from mmtx.modality.registry import MODALITIES
from mmtx.run_page import EVALUATION, step_of
from mmtx.saved_folder import check_target, writing
from mmtx.shipped_files import PACKAGE
from mmtx.training.checkpoint import check_finite
from mmtx.training.codec import CodecModule
from mmtx.training.decoder import DecoderModule
from mmtx.training.decoder_data import with_captions
from mmtx.training.loggers import Metrics
from mmtx.training.private import data_of
from mmtx.training.sharding import gathered

TILE = 96   # pixels per side of a picture on a contact sheet
COLUMNS = 8
SOUNDS = 8  # sound files written after a validation


class ProgressBar(TQDMProgressBar):
    """The stock progress bar without the logger's version, which carries no information here.

    When stdout is a file or a pipe, it prints one line per logged step and per validation instead; nothing with TQDM_DISABLE=1.
    """

    def __init__(self):
        terminal = sys.stdout is not None and sys.stdout.isatty()  # it is None if the shell closed it (>&-)
        self.plain = not terminal and "ipykernel" not in sys.modules
        super().__init__(refresh_rate=0 if self.plain else 1)
        self.last_step, self.timed_from = 0, (0, time.monotonic())  # last step reported; step and time that the speed counts from

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.last_step, self.timed_from = trainer.global_step, (trainer.global_step, time.monotonic())

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *given: Any) -> None:
        super().on_train_batch_end(trainer, module, *given)
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step != self.last_step and every and step % every == 0:
            now, (before, then) = time.monotonic(), self.timed_from
            self.last_step, self.timed_from = step, (step, now)
            self._tell(trainer, module, "train/", f"{(step - before) / max(now - then, 1e-9):.3g} steps/s")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_validation_end(trainer, module)
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._tell(trainer, module, "val/")
            self.timed_from = (trainer.global_step, time.monotonic())

    def _tell(self, trainer: Trainer, module: LightningModule, prefix: str, *more: str) -> None:
        if self.plain and trainer.is_global_zero and os.environ.get("TQDM_DISABLE", "0") in ("", "0"):
            figures = [f"{name} {value:.4g}" for name, value in self.get_metrics(trainer, module).items() if name.startswith(prefix)]
            print(f"step {trainer.global_step} of {trainer.max_steps}: {', '.join([*figures, *more])}", flush=True)


class SaveConfig(SaveConfigCallback):
    """Writes `folder/metrics/config.yaml`, the full configuration, and `environment.json` when training begins.

    A run that fails before that leaves the files of the previous run as they are. Passwords and signatures in URLs are left out:
    whoever repeats the run supplies them again.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any):
        super().__init__(parser, without_secrets(config), **options)

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        pass  # Lightning's class writes here

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.save_config(trainer, module, "fit")

    def save_config(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        (metrics,) = (logger for logger in trainer.loggers if isinstance(logger, Metrics))
        path = Path(metrics.log_dir) / self.config_filename
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.parser.dump(self.config, skip_none=False).encode())
        write_file(path.with_name("environment.json"), write_json(environment(trainer)))


def environment(trainer: Trainer) -> dict[str, Any]:
    """The versions and hardware of a run, which its configuration does not record."""
    accelerator = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else trainer.strategy.root_device.type
    return {"mmtx": __version__, "commit": commit(), "python": sys.version.split()[0], "torch": torch.__version__,
            "device": accelerator, "processes": trainer.world_size}


def commit() -> str | None:
    """The commit of the checkout that contains the package, with " + changes" if files differ from it; None if there is none."""
    git = lambda *words: subprocess.run(["git", "-C", PACKAGE.parent, *words], capture_output=True, text=True, timeout=20,
                                        check=True).stdout
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        return git("rev-parse", "HEAD").strip() + (" + changes" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout owned by another user
        return None


def without_secrets(value: Any) -> Any:
    """A configuration with the secrets in its URLs redacted."""
    if isinstance(value, Namespace):
        return Namespace(**{name: without_secrets(inside) for name, inside in vars(value).items()})
    if isinstance(value, dict):
        return {name: without_secrets(inside) for name, inside in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(inside) for inside in value)
    return redacted(value) if isinstance(value, str) else value


class SaveModel(Callback):
    """Writes `folder/model` atomically when training ends, and deletes the evaluation of the model that it replaces."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute() / "model"

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Raise InputError for a folder that must not be replaced now, not after hours of training."""
        check_target(self.folder)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.interrupted:
            return
        with gathered(module), writing(self.folder):
            if trainer.is_global_zero:
                check_finite(module.state_dict(), str(self.folder))
                cast(Any, module).save(self.folder)  # all of ours have it
                self.folder.with_name(EVALUATION).unlink(missing_ok=True)


class EMAWeightAveraging(WeightAveraging):
    """Exponential moving average of the weights, which leaves frozen ones as they are; checkpoints hold its state by this name.

    Its start is corrected as that of Adam's moments: the weights of n steps ago count decay**n, those of the first step no more than
    that. Lightning's leaves them all the rest, 74 % after 300 steps at 0.999. It also rounds the sum of two products, so that frozen
    weights, and with them the fingerprint of a refined codec, change; and it truncates the bytes of 4-bit weights.
    """

    def __init__(self, decay: float, use_buffers: bool):
        def moved(average: Tensor, weight: Tensor, count: Tensor) -> Tensor:
            """The average of `count` weights and one more."""
            if not average.is_floating_point():
                return weight
            share = (1 - decay) / -torch.expm1((count + 1) * math.log(decay))  # (1 - decay) / (1 - decay**(count + 1))
            return average.lerp(weight.to(average.dtype), share.to(average.dtype))

        super().__init__(use_buffers=use_buffers, avg_fn=moved)


class ShowSamples(Callback):
    """Writes samples after each validation: captions as text, pictures as a contact sheet, and the first sounds.

    `step-S-N.ogg` is the sound of row N of the text, decoded from its codes. For a codec, originals and reconstructions alternate,
    on the sheet and among the sounds. TensorBoard loggers get text and sheet. With `count` 0 nothing is written, but samples that
    an earlier run left at later steps are still deleted.
    """

    def __init__(self, folder: str | Path, count: int = 16):
        self.folder, self.count = Path(folder) / "samples", count

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Delete the samples after the step that the run resumes from; all of them if it is a new run."""
        if not trainer.is_global_zero:
            return
        with writing(self.folder):
            for path in self.folder.glob("step-*"):
                if step_of(path) > (trainer.global_step or -1):
                    path.unlink()

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or not self.count:
            return
        with gathered(module):
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
        samples = with_captions(getattr(data_of(trainer), "held_out", []))
        samples = samples[::max(1, -(-len(samples) // self.count))]
        model, documents = module.model(), to_documents(samples, module.tokenizers, patches=module.config.encoders)
        captions = model.caption_documents(documents, Sampling(max_new_tokens=48))
        lines = [f"{caption!r:40} {sample.caption!r}" for caption, sample in zip(captions, samples, strict=True)]
        lines = [f"{'predicted':40} true", *lines]
        write_file(path.with_suffix(".txt"), ("\n".join(lines) + "\n").encode())
        for writer in tensorboard_writers(trainer):
            writer.add_text("samples", "\n".join(f"    {line}" for line in lines), trainer.global_step)  # Markdown: verbatim
        tiles = []
        for document, caption, sample in zip(documents, captions, samples, strict=True):
            media = (part for turn in document.turns for part in turn.parts if MODALITIES[part.kind].picture is not None)
            if (part := next(media, None)) is not None and module.tokenizers[part.kind].decodes:
                picture = MODALITIES[part.kind].get("picture")(module.tokenizers[part.kind], part.array)
                tiles.append((picture, f"{caption}\n({sample.caption})"))
        self._sheet(trainer, tiles, path)
        heard = [(row, part) for row, document in enumerate(documents) for turn in document.turns for part in turn.parts
                 if part.kind == "audio" and module.tokenizers["audio"].decodes][:SOUNDS]
        self._sounds({row: to_sound(module.tokenizers["audio"], part.array) for row, part in heard}, path)

    def _reconstructions(self, trainer: Trainer, module: CodecModule, path: Path) -> None:
        batch = next(iter(data_of(trainer).val_dataloader()))
        media = batch.media[:self.count].to(module.device)
        output = module.tokenizer(media).output
        pairs = zip(module.tokenizer.pictures(media), module.tokenizer.pictures(output), strict=True)
        pictures = [picture for pair in pairs for picture in pair]
        self._sheet(trainer, [(p, "reconstruction" if i % 2 else "original") for i, p in enumerate(pictures)], path)
        if hasattr(module.tokenizer, "waveform"):
            tokenizer: Any = module.tokenizer
            waves = [tokenizer.waveform(mel.float()) for pair in zip(media[:SOUNDS // 2], output) for mel in pair]
            self._sounds({row: Sound(wave.float().cpu().numpy(), tokenizer.rate) for row, wave in enumerate(waves)}, path)

    @staticmethod
    def _sounds(sounds: dict[int, Sound], path: Path) -> None:
        for row, sound in sounds.items():
            file = io.BytesIO()
            soundfile.write(file, sound.samples, sound.rate, format="OGG")
            write_file(path.with_name(f"{path.name}-{row:02d}.ogg"), file.getvalue())

    @staticmethod
    def _sheet(trainer: Trainer, tiles: list[tuple[Tensor, str]], path: Path) -> None:
        if (sheet := contact_sheet(tiles, path.with_suffix(".png"))) is not None:
            for writer in tensorboard_writers(trainer):
                writer.add_image("samples", np.asarray(sheet), trainer.global_step, dataformats="HWC")


def tensorboard_writers(trainer: Trainer) -> list[Any]:
    """The summary writers of all TensorBoard loggers, usually one or none."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def contact_sheet(tiles: list[tuple[Tensor, str]], path: Path) -> Image.Image | None:
    """Write pictures, uint8 (3, H, W), with a text below each, as one PNG; write nothing and return None without tiles."""
    if not tiles:
        return None
    rows = -(-len(tiles) // COLUMNS)
    width, height = TILE + 8, TILE + 34
    sheet = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(tiles):
        x, y = i % COLUMNS * width + 4, i // COLUMNS * height + 4
        sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((TILE, TILE)), (x, y))
        short = "\n".join(line[:17] for line in text.split("\n"))
        draw.multiline_text((x, y + TILE + 2), short, fill="black", font_size=10, spacing=1)
    encoded = io.BytesIO()
    sheet.save(encoded, "png")
    write_file(path, encoded.getvalue())
    return sheet
