"""`mmtx fit`: the Lightning command line, with what every run of ours needs already in it."""

import errno
import logging
import re
import signal
import threading
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mmtx.data.config import check_yaml, read_text
from mmtx.data.output import alone, check_output
from mmtx.data.storage import recorded, scrub
from mmtx.errors import InputError
from mmtx.files import find_shipped
from mmtx.training.callbacks import Metrics, ProgressBar, SaveConfig, SaveModel, ShowSamples
from mmtx.training.checkpoint import AtomicCheckpointIO, Checkpoints, flatten, may_change, newest
from mmtx.training.codec import CodecModule
from mmtx.training.decoder import DecoderModule
from mmtx.training.guard import SkipNonFinite, Telemetry
from mmtx.training.memory import keep_memory
from mmtx.training.sharding import Sharded
from mmtx.training.signals import follow_launcher, launch_uninterrupted
from mmtx.training.vocoder import VocoderModule

# What of `trainer` a resumed run must have in common with the one it goes on with.
RESUMED_TRAINER = ("max_steps", "accumulate_grad_batches", "precision", "gradient_clip_val", "gradient_clip_algorithm")
MOST = 10**9        # of steps and of numbers in options
MOST_SEED = 2**32 - 1  # of NumPy's own generator, which a run seeds too
TRUSTED = ["mmtx", "lightning"]  # packages whose classes a configuration from others may name
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Parser(LightningArgumentParser):
    """The stock parser, whose errors come after a page of options and are a tree of types tried."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser within the parser, whose message the outer one quotes
            super().error(message, ex)
        raise input_error_in(ex) or InputError(one_line(message)) from None


class FitCLI(LightningCLI):
    """The stock command line plus `--output`, the folder that a run writes to, and that is its own while `held` is open."""

    def __init__(self, *args: Any, held: ExitStack, **kwargs: Any):
        self.held = held
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, required=True,
                            help="folder for the run: the model, checkpoints, metrics, samples")
        parser.add_argument("--save_every", type=int, default=500, help="steps between two resume checkpoints")
        parser.add_argument("--samples", type=int, default=16, help="held-out samples shown after each validation, or 0")
        parser.add_argument("--ema", type=float | None, default=None,
                            help="decay of an average of the weights (0.999, say), which is validated and saved")
        parser.add_argument("--max_skipped", type=int, default=10,
                            help="steps with a loss or gradient that is not finite, in a row, that end the run")
        parser.add_argument("--trusted_only", type=bool, default=False,
                            help="for a configuration from others: refuse classes and functions that are not of mmtx or "
                                 "lightning, before anything of them is imported")

    def _set_seed(self) -> None:
        """The stock one, which takes 32 bits."""
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool):
            check_range("seed_everything", seed, 0, MOST_SEED)
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        config = self.config.get(str(self.subcommand), self.config)
        perceptual = config.get("model.init_args.perceptual")
        if config["trusted_only"] and perceptual is not None:
            raise InputError(f"model.init_args.perceptual.network: found {perceptual.network}, which would be called, expected "
                             "none with --trusted_only true")

    def instantiate_trainer(self, **kwargs: Any):
        output, trainer = check_output(self._get(self.config_init, "output")), self._get(self.config_init, "trainer")
        if self.subcommand and (rank_zero_only.rank or 0) == 0:
            self.held.enter_context(alone(output, "output"))
        samples, save_every, max_skipped, ema = (
            self._get(self.config_init, name) for name in ("samples", "save_every", "max_skipped", "ema"))
        for name, value, least in (("samples", samples, 0), ("save_every", save_every, 1), ("max_skipped", max_skipped, 1)):
            check_range(name, value, least, MOST)
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
        if self.model.automatic_optimization:
            check_range("trainer.max_steps", self.trainer.max_steps, 1, MOST)
        check_range("trainer.accumulate_grad_batches", self.trainer.accumulate_grad_batches, 1, MOST)
        check_range("data.seed", getattr(self.datamodule, "seed", 0), 0, 2**64 - 1)
        strategy, precision = self.trainer.strategy, self.trainer.precision
        if isinstance(self.model, CodecModule | VocoderModule) and precision in ("16-true", "bf16-true", "64-true"):
            raise InputError(f'trainer.precision: found "{precision}", expected "32-true", "bf16-mixed" or "16-mixed" for '
                             "tokenizers, whose spectrograms and codes are computed in float32")
        launch_uninterrupted(strategy.launcher)
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
                if not may_change(name)}

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


def check_range(name: str, value: int, least: int, most: int) -> None:
    """Raise InputError unless `least` <= `value` <= `most`."""
    if value < least:
        raise InputError(f"{name}: found {value}, expected {least} or more")
    if value > most:
        raise InputError(f"{name}: found {value if value < 10**30 else 'a number beyond all bounds'}, expected {most} or less")


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


def command_line(arguments: list[str], run: bool, held: ExitStack | None = None) -> FitCLI:
    """Build all that a command line names and, with `run`, do it: then its first word is "fit"."""
    jsonargparse.set_loader("yaml", load_yaml)
    return FitCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
        auto_configure_optimizers=False,
        trainer_defaults={"use_distributed_sampler": False, "num_sanity_val_steps": 0,
                          "enable_model_summary": False},
        args=arguments,
        run=run,
        held=held or ExitStack(),
    )


STOCK_YAML = jsonargparse.get_loader("yaml")


def load_yaml(text: str) -> Any:
    """The stock way to read YAML, of files, of files that these name, and of values on the command line."""
    check_yaml(text, "configuration")
    return STOCK_YAML(text)


def is_trusted_only(arguments: list[str]) -> bool:
    """What the command line says of it; a configuration cannot take it back, nor is it asked."""
    said = [value for name, value in zip(arguments, [*arguments[1:], ""]) if name == "--trusted_only"]
    said += [argument.partition("=")[2] for argument in arguments if argument.startswith("--trusted_only=")]
    return any(value.lower() not in ("false", "no", "0") for value in said)


def shipped_configs(arguments: list[str]) -> list[str]:
    """Arguments with the file of each `--config FILE` as it lies here or, if there is none, in the package."""
    found, is_file = [], False
    for argument in arguments:
        if is_file:
            argument = _config(argument)
        elif argument.startswith("--config="):
            argument = f"--config={_config(argument.removeprefix('--config='))}"
        is_file = argument in ("--config", "-c")
        found.append(argument)
    return found


def _config(name: str) -> str:
    path = find_shipped(name)
    read_text(path)  # here its name can be told
    return str(path)


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
    if is_trusted_only(arguments):
        jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=TRUSTED)
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        with ExitStack() as held:
            command_line(["fit", *shipped_configs(arguments)], True, held)
    except MisconfigurationException as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from None
    except ValueError as error:
        if (mistake := input_error_in(error)) is None:
            raise
        raise mistake from None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(f"output: {error.filename or ''} cannot be written ({error.strerror})") from None
    except RuntimeError as error:
        if not (ended := re.search(r"DataLoader worker \(pid\(?s?\)? ?[\d, ]+\).*", str(error))):
            raise
        raise InputError(f"data.workers: {ended[0].rstrip('.')} (out of memory?); the same command with --ckpt_path last "
                         "goes on") from None
    except (KeyboardInterrupt, SystemExit) as stop:
        # The trainer makes a status of its own of Ctrl-C.
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from None
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)
