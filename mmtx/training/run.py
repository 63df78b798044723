"""`mmtx fit`: the Lightning command line, with what every run of ours needs already in it."""

import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mmtx.data.storage import recorded, redacted, scrub
from mmtx.errors import InputError
from mmtx.files import find_shipped
from mmtx.training.callbacks import Metrics, ProgressBar, SaveModel, ShowSamples
from mmtx.training.checkpoint import AtomicCheckpointIO, Checkpoints, flatten, newest
from mmtx.training.codec import CodecModule
from mmtx.training.decoder import DecoderModule
from mmtx.training.guard import SkipNonFinite, Telemetry
from mmtx.training.memory import keep_memory
from mmtx.training.sharding import Sharded
from mmtx.training.signals import follow_launcher
from mmtx.training.vocoder import VocoderModule

# What of `trainer` a resumed run must have in common with the one it goes on with.
RESUMED_TRAINER = ("max_steps", "accumulate_grad_batches", "precision", "gradient_clip_val", "gradient_clip_algorithm")
MAY_CHANGE = ("data.init_args.workers",)


class Parser(LightningArgumentParser):
    """The stock parser, whose errors come after a page of options and are a tree of types tried."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser within the parser, whose message the outer one quotes
            super().error(message, ex)
        raise input_error_in(ex) or InputError(one_line(message)) from None


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml without the passwords and signatures of URLs: who runs it again gives them again."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any):
        super().__init__(parser, without_secrets(config), **options)


def without_secrets(value: Any) -> Any:
    """A configuration whose URLs are as they may be seen."""
    if isinstance(value, Namespace):
        return Namespace(**{name: without_secrets(inside) for name, inside in vars(value).items()})
    if isinstance(value, dict):
        return {name: without_secrets(inside) for name, inside in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(inside) for inside in value)
    return redacted(value) if isinstance(value, str) else value


class FitCLI(LightningCLI):
    """The stock command line plus `--output`, the folder that a run writes to."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, required=True,
                            help="folder for the run: the model, checkpoints, metrics, samples")
        parser.add_argument("--save_every", type=int, default=500, help="steps between two resume checkpoints")
        parser.add_argument("--samples", type=int, default=16, help="held-out samples shown after each validation, or 0")
        parser.add_argument("--ema", type=float | None, default=None,
                            help="decay of an average of the weights (0.999, say), which is validated and saved")
        parser.add_argument("--max_skipped", type=int, default=10,
                            help="steps with a loss or gradient that is not finite, in a row, that end the run")

    def instantiate_trainer(self, **kwargs: Any):
        output, trainer = check_output(self._get(self.config_init, "output")), self._get(self.config_init, "trainer")
        samples, save_every, max_skipped, ema = (
            self._get(self.config_init, name) for name in ("samples", "save_every", "max_skipped", "ema"))
        for name, value, least in (("samples", samples, 0), ("save_every", save_every, 1), ("max_skipped", max_skipped, 1)):
            if value < least:
                raise InputError(f"{name}: found {value}, expected {least} or more")
        if ema is not None and not 0 < ema < 1:
            raise InputError(f"ema: found {ema}, expected a number between 0 and 1")
        self.trainer_defaults["callbacks"] = [
            *([] if trainer.enable_progress_bar is False else [ProgressBar()]),
            # Samples are shown before, and the model is saved after, the average gives way and takes its place.
            *([ShowSamples(output, samples)] if samples else []),
            *([] if ema is None else [EMAWeightAveraging(decay=ema, use_buffers=False)]),
            SaveModel(output),
            LearningRateMonitor("step"),
            SkipNonFinite(max_skipped),
            Telemetry(),
            Checkpoints(output / "checkpoints", save_every),
        ]
        self.checkpoint_io = AtomicCheckpointIO()
        kwargs["plugins"] = [*as_list(trainer.plugins), self.checkpoint_io]
        kwargs["logger"] = Metrics(output)
        try:
            return super().instantiate_trainer(default_root_dir=str(output), **kwargs)
        except (MisconfigurationException, ValueError, ImportError) as error:
            raise InputError(f"trainer: {' '.join(str(error).split())}") from None

    def before_fit(self) -> None:
        # The text tokenizer is no optimizer's work and counts no steps.
        if self.model.automatic_optimization and self.trainer.max_steps < 1:
            raise InputError(f"trainer.max_steps: found {self.trainer.max_steps}, expected 1 or more")
        strategy, precision = self.trainer.strategy, self.trainer.precision
        if isinstance(self.model, CodecModule | VocoderModule) and precision in ("16-true", "bf16-true", "64-true"):
            raise InputError(f'trainer.precision: found "{precision}", expected "32-true", "bf16-mixed" or "16-mixed" for '
                             "tokenizers, whose spectrograms and codes are computed in float32")
        if isinstance(strategy, Sharded):
            self._check_sharded()
        elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError(f'trainer.strategy: found {type(strategy).__name__}, expected "ddp" or "sharded", whose '
                             "checkpoints a kill cannot damage")

    def _check_sharded(self) -> None:
        if not isinstance(self.model, DecoderModule):
            raise InputError('trainer.strategy: found "sharded", which shares out decoders only, expected "ddp"')
        if self._get(self.config_init, "ema") is not None:
            raise InputError('ema: found an average of the weights, expected none with trainer.strategy "sharded"')
        if self.model.optimizer_config.muon is not None:
            raise InputError(f"model.init_args.optimizer.muon: found {self.model.optimizer_config.muon}, expected none "
                             'with trainer.strategy "sharded", since Muon turns whole matrices')

    def record(self) -> dict[str, Any]:
        """All that decides the batches and the model, as plain values by name."""
        config = self.config.get(str(self.subcommand), self.config).as_dict()
        tokenizers = getattr(self.datamodule, "tokenizers", {})
        record = flatten({
            **{name: config[name] for name in ("seed_everything", "ema", "model", "data")},
            "trainer": {name: config["trainer"][name] for name in RESUMED_TRAINER},
            "tokenizers": {kind: tokenizer.fingerprint for kind, tokenizer in tokenizers.items()},
            "processes": self.trainer.world_size,
            **({"sharded": True} if isinstance(self.trainer.strategy, Sharded) else {}),
        })
        return {name: recorded(value) if isinstance(value, str) else value for name, value in record.items()
                if name not in MAY_CHANGE and not name.endswith(".trusted")}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """What `Trainer.fit` gets: the newest checkpoint that is sound in place of "last"."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        self.checkpoint_io.record = self.record()
        if kwargs.get("ckpt_path") == "last":
            kwargs["ckpt_path"] = newest(Path(self._get(self.config_init, "output")) / "checkpoints")
        elif kwargs.get("ckpt_path") is not None and not Path(kwargs["ckpt_path"]).is_file():
            raise InputError(f'ckpt_path: {kwargs["ckpt_path"]}: no such file, expected a checkpoint or "last"')
        return kwargs

    def _parse_ckpt_path(self) -> None:
        """Resuming must not let the checkpoint's hyperparameters override the configuration that the user gave."""


def check_output(folder: str) -> Path:
    """Create the output folder, or say why it cannot be written, before any long work."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"output: {folder} cannot be written ({error.strerror})") from None
    return path


def as_list(value: Any) -> list:
    """None, one value or several as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def one_line(message: str) -> str:
    """The key, what was expected and what was found, out of a message of jsonargparse."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    found = re.findall(r"(?:Got|Given) value: (?!NestedArg|Namespace)(.*)", message)
    facts = re.sub(r"Parser key \"[^\"]+\":|\. Got value: .*|Expected a <class 'NoneType'>", "", message)
    facts = re.sub(r"Expected a (?:typing\.)?", "expected ", re.sub(r"<class '([^']+)'>", r"\1", facts))
    noise = ("Does not validate", "Subtypes:", "Errors:", "Problem with given class_path", "Given value")
    lines = [line.strip(" -") for line in facts.splitlines()]
    told = [f"found {value}" for value in found[:1] if len(value) < 80]
    told += [line for line in lines if line and not line.startswith(noise)]
    return scrub(": ".join(filter(None, [".".join(keys), ", ".join(told)])))


def input_error_in(error: BaseException | None) -> InputError | None:
    """The InputError that `error` wraps, for jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def command_line(arguments: list[str], run: bool) -> FitCLI:
    """Build all that a command line names and, with `run`, do it: then its first word is "fit"."""
    return FitCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        trainer_defaults={"use_distributed_sampler": False, "num_sanity_val_steps": 0,
                          "enable_model_summary": False},
        args=arguments,
        run=run,
    )


def shipped_configs(arguments: list[str]) -> list[str]:
    """Arguments with the file of each `--config FILE` as it lies here or, if there is none, in the package."""
    found, is_file = [], False
    for argument in arguments:
        if is_file:
            argument = str(find_shipped(argument))
        elif argument.startswith("--config="):
            argument = f"--config={find_shipped(argument.removeprefix('--config='))}"
        is_file = argument == "--config"
        found.append(argument)
    return found


def fit(arguments: list[str]) -> None:
    """Run `mmtx fit ARGUMENTS`. Raises InputError for a mistake in the configuration or the data."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*WeightAveraging callback with a model that overrides.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # `sys.argv` stays as it is: it is what the other processes of a run on several devices are started with.
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    follow_launcher()
    keep_memory()
    try:
        command_line(["fit", *shipped_configs(arguments)], run=True)
    except MisconfigurationException as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from None
    except ValueError as error:
        if (mistake := input_error_in(error)) is None:
            raise
        raise mistake from None
