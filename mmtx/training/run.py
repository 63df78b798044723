"""`mmtx fit`, `validate`, `test` and `predict`: the Lightning command line, with what every run of ours needs in it."""

import errno
import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mmtx.data.output import check_output, lock_folder
from mmtx.data.storage import recorded, scrub
from mmtx.data.yaml_check import check_yaml, read_text
from mmtx.errors import InputError
from mmtx.files import find_shipped, user_path, write_file
from mmtx.hub import find_model
from mmtx.modality.registry import PLUGINS
from mmtx.schema import within
from mmtx.training import private
from mmtx.training.callbacks import ProgressBar, SaveConfig, SaveModel, ShowSamples
from mmtx.training.checkpoint import AtomicCheckpointIO, Checkpoints, by_age, flatten, may_change, newest
from mmtx.training.checkpoint_check import check_weights
from mmtx.training.codec import CodecModule
from mmtx.training.decoder import DecoderModule
from mmtx.training.guard import SkipNonFinite
from mmtx.training.loggers import Metrics, TensorBoard
from mmtx.training.memory import keep_memory
from mmtx.training.sharding import Sharded
from mmtx.training.signals import follow_launcher, launch_uninterrupted, status
from mmtx.training.vocoder import VocoderModule

# What of `trainer` a resumed run must have in common with the one it goes on with.
RESUMED_TRAINER = ("max_steps", "accumulate_grad_batches", "precision", "gradient_clip_val", "gradient_clip_algorithm")
# Defaults that differ from Lightning's. Nothing else is a callback or a logger that is not asked for by an option of ours.
TRAINER = {
    "logger": True,  # TensorBoard
    "callbacks": [
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor", "init_args": {"logging_interval": "step"}},
        {"class_path": "mmtx.training.guard.Telemetry"},
    ],
    "check_val_every_n_epoch": None,
    "val_check_interval": 1.0,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 20,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
SOURCES = ("train", "validation", "test")  # lists of `DataSource` in the options of data
PREDICTIONS = "predictions.jsonl"
LARGEST_OPTION = 10**9  # steps, and what else is counted or weighted
MOST_WORKERS = 2**12
MOST_SEED = 2**32 - 1  # of NumPy's own generator, which a run seeds too
TRUSTED = ["mmtx", "lightning"]  # packages whose classes a configuration from others may name
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Parser(LightningArgumentParser):
    """The stock parser, whose errors come after a page of options and are a tree of types tried."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser within the parser, whose message the outer one quotes
            super().error(message, ex)
        raise input_error_in(ex) or InputError(one_line(message)) from None


class FitCLI(private.PlainCLI):
    """The stock command line plus `--output`, the folder that a run writes to, and that is its own while `held` is open.

    `word` is the subcommand.
    """

    def __init__(self, *args: Any, word: str, held: ExitStack, **kwargs: Any):
        self.word, self.held = word, held
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static there, and called on the instance
        """The one that is asked for, whose `--ckpt_path` is ours: parsers of the others would take as long to make."""
        return {self.word: {*super().subcommands()[self.word], "ckpt_path"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER.items()})
        parser.add_argument("--output", type=str, required=True,
                            help="folder of the run: model, checkpoints, samples; metrics and tensorboard, whatever else "
                                 "trainer.logger says (false: no tensorboard)")
        parser.add_argument("--ckpt_path", type=str | None, default=None,
                            help='a checkpoint of this run: a file, or "last" for the newest in --output; mmtx fit goes on with it '
                                 "(and with last begins anew where there is none), the others take its weights, by default those "
                                 "of the finished model")
        parser.add_argument("--save_every", type=int, default=500, help="steps between two resume checkpoints")
        parser.add_argument("--samples", type=int, default=16, help="held-out samples shown after each validation, or 0")
        parser.add_argument("--ema", type=float | None, default=None,
                            help="decay of an average of the weights (0.999, say), which is validated and saved")
        parser.add_argument("--max_skipped", type=int, default=10,
                            help="steps with a loss or gradient that is not finite, in a row, that end the run")
        parser.add_argument("--trusted_only", type=bool, default=False,
                            help="for a configuration from others: refuse classes and functions that are not of mmtx or "
                                 "lightning, before anything of them is imported")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """The stock ones, of which the seed may have 32 bits."""
        super().parse_arguments(parser, args)
        seed = self.config.get(str(self.config.get("subcommand")), self.config)["seed_everything"]
        if not isinstance(seed, bool):
            within("seed_everything", seed, 0, MOST_SEED)

    def said(self, name: str) -> Any:
        """What the command line and its files say of an option, with the classes that they name instantiated."""
        return self.config_init.get(str(self.subcommand), self.config_init).get(name)

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return user_path(self.said("output"))

    def before_instantiate_classes(self) -> None:
        config = self.config.get(str(self.subcommand), self.config)
        perceptual = config.get("model.init_args.perceptual")
        called = {"model.init_args.perceptual.network": perceptual and perceptual.network}
        for name in ("train", "validation", "test"):
            sources = config.get(f"data.init_args.{name}") or ()
            called |= {f"data.init_args.{name}.{i}.variants": source.variants for i, source in enumerate(sources)}
        for name, found in called.items():
            if config["trusted_only"] and found is not None:
                raise InputError(f"{name}: found {found}, which would be called, expected none with --trusted_only true")

    def instantiate_trainer(self, **kwargs: Any):
        output, trainer = self.output, self.said("trainer")
        root = trainer.default_root_dir
        if root is not None and Path(root).absolute() != output.absolute():
            raise InputError(f"trainer.default_root_dir: found {root}, expected none: --output is that folder, found {output}")
        if self.word in ("fit", "predict"):
            check_output(self.said("output"))
            if self.subcommand and is_first_rank():
                self.held.enter_context(lock_folder(output, "output"))
        loggers = [] if trainer.logger in (None, True, False) else as_list(trainer.logger)
        progress = [] if trainer.enable_progress_bar is False else [ProgressBar()]
        if self.word == "fit":
            self.checkpoint_io = AtomicCheckpointIO()
            self.trainer_defaults["callbacks"] = [*progress, *self._callbacks(output)]
            loggers += [*([TensorBoard(output)] if trainer.logger in (None, True) else []), Metrics(output)]
        else:
            self.checkpoint_io = AtomicCheckpointIO(lambda name: name.startswith(("model.", "tokenizers.")))
            self.trainer_defaults["callbacks"], self.save_config_callback = progress, None
        if isinstance(trainer.val_check_interval, float) and trainer.check_val_every_n_epoch is None:
            kwargs["check_val_every_n_epoch"] = 1  # a share of the batches of an epoch, which are those of the run
        if not self.model.automatic_optimization:
            kwargs["gradient_clip_val"] = None
        kwargs |= {"plugins": [*as_list(trainer.plugins), self.checkpoint_io], "logger": loggers, "default_root_dir": str(output)}
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, ImportError) as error:
            raise InputError(f"trainer: {' '.join(str(error).split())}") from None

    def _callbacks(self, output: Path) -> list[Callback]:
        """What `--output`, `--save_every`, `--samples`, `--ema` and `--max_skipped` stand for."""
        samples, save_every, max_skipped, ema = map(self.said, ("samples", "save_every", "max_skipped", "ema"))
        for name, value, least in (("samples", samples, 0), ("save_every", save_every, 1), ("max_skipped", max_skipped, 1)):
            within(name, value, least, LARGEST_OPTION)
        if ema is not None and not 0 < ema < 1:
            raise InputError(f"ema: found {ema}, expected a number between 0 and 1")
        average = [] if ema is None else [EMAWeightAveraging(decay=ema, use_buffers=False)]
        if self.said("trainer").fast_dev_run:  # a rehearsal, which leaves what is in the folder as it is
            return [*average, SkipNonFinite(max_skipped)]
        return [
            # Samples are shown before, and the model is saved after, the average gives way and takes its place.
            ShowSamples(output, samples),
            *average,
            SaveModel(output),
            SkipNonFinite(max_skipped),
            Checkpoints(output / "checkpoints", save_every),
        ]

    def fit(self, **kwargs: Any) -> None:
        """`Trainer.fit`, for which "last" is the newest checkpoint that is sound."""
        self._check_fit()
        self.checkpoint_io.record = self.record()
        given, output = self.said("ckpt_path"), self.output
        path = self._checkpoint(given)
        if path is None and self.trainer.is_global_zero and not self.said("trainer").fast_dev_run:
            if given is not None:
                print(f"mmtx: {output / 'checkpoints'}: no checkpoint to go on with, so this run begins anew", file=sys.stderr)
            elif found := by_age(output / "checkpoints"):
                print(f"mmtx: {output}: this run begins anew and replaces the one that was at {found[-1].stem}; "
                      "--ckpt_path last would go on with it", file=sys.stderr)
            elif (output / "model").exists():
                print(f"mmtx: {output}: this run begins anew and replaces the model that is there", file=sys.stderr)
        self.trainer.fit(**kwargs, ckpt_path=path)

    def validate(self, **kwargs: Any) -> None:
        """Print the figures of the finished model in `--output`, or of a checkpoint, and write nothing."""
        self.trainer.validate(**self._held_out(kwargs))

    def test(self, **kwargs: Any) -> None:
        """The same on `data.test`."""
        self.trainer.test(**self._held_out(kwargs))

    def predict(self, **kwargs: Any) -> None:
        """Write captions of the validation samples to `OUTPUT/predictions.jsonl`."""
        if self.trainer.world_size > 1:
            raise InputError(f"trainer.devices: found {self.trainer.world_size} processes, expected 1 for mmtx predict")
        batches = self.trainer.predict(**{**self._held_out(kwargs), "return_predictions": True})
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for batch in batches for row in batch]
        path = self.output / PREDICTIONS
        write_file(path, "".join(lines).encode(errors="backslashreplace"))  # a name that is no UTF-8: JSON's own escape
        print(f"{path}: {len(lines)} captions")

    def _held_out(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments for a method of the trainer that does not train, with the weights that are meant."""
        step, name = STEPS[self.word], type(self.model).__name__
        if getattr(type(self.model), step) is getattr(LightningModule, step):
            raise InputError(f"model: found {name}, which has no {step}, expected another for mmtx {self.word}")
        self._check_workers()
        self._check_precision()
        if isinstance(self.trainer.strategy, Sharded):
            raise InputError(f'trainer.strategy: found "sharded", expected "auto" or "ddp" for mmtx {self.word}')
        path = self._checkpoint(self.said("ckpt_path"))
        weights = path or self._finished()
        if path is None:
            if not hasattr(self.model, "restore"):
                raise InputError(f"ckpt_path: found none, expected a checkpoint, for {name} cannot `restore` a finished model")
            self.model.restore(weights)
        self.checkpoint_io.record = self.record()
        private.before_restoring(self.trainer, lambda found: check_weights(
            found["state_dict"], self.model.state_dict(), str(path)))
        private.on_sigterm(self.trainer, lambda number, *_: sys.exit(status(number)))
        if self.trainer.is_global_zero:
            print(f"mmtx: {self.word}: weights of {weights}", file=sys.stderr)
        return {**kwargs, "ckpt_path": path}

    def _finished(self) -> Path:
        """The finished model of the run or, if there is none, the one that it was to start from."""
        folder = self.output / "model"
        init_from = self.config[self.word].get("model.init_args.init_from") or self.config[self.word].get("model.init_args.refine")
        if not folder.is_dir() and init_from is None:
            raise InputError(f"output: {folder}: no such folder, expected a finished model, or --ckpt_path with a checkpoint")
        return folder if folder.is_dir() else find_model(init_from)

    def _checkpoint(self, path: str | None) -> Path | None:
        """The file that `--ckpt_path` means."""
        if path is None:
            return None
        if path == "last":
            folder = self.output / "checkpoints"
            if (found := newest(folder)) is None and self.word != "fit":
                raise InputError(f"ckpt_path: {folder}: no checkpoint")
            self.checkpoint_io.sound = found
            return found
        if not (file := user_path(path)).is_file():
            raise InputError(f'ckpt_path: {path}: no such file, expected a checkpoint or "last"')
        return file

    def _check_precision(self) -> None:
        precision = self.trainer.precision
        if isinstance(self.model, CodecModule | VocoderModule) and precision in ("16-true", "bf16-true", "64-true"):
            raise InputError(f'trainer.precision: found "{precision}", expected "32-true", "bf16-mixed" or "16-mixed" for '
                             "tokenizers, whose spectrograms and codes are computed in float32")

    def _check_workers(self) -> None:
        within("data.num_workers", getattr(self.datamodule, "num_workers", 0), 0, MOST_WORKERS)

    def _check_fit(self) -> None:
        # The text tokenizer is no optimizer's work and counts no steps.
        if self.model.automatic_optimization:
            within("trainer.max_steps", self.trainer.max_steps, 1, LARGEST_OPTION)
        within("trainer.accumulate_grad_batches", self.trainer.accumulate_grad_batches, 1, LARGEST_OPTION)
        within("trainer.log_every_n_steps", self.trainer.log_every_n_steps, 0, LARGEST_OPTION)  # type: ignore[attr-defined]
        every, clip = self.said("trainer").val_check_interval, self.trainer.gradient_clip_val
        if isinstance(every, int | float) and every <= 0:
            raise InputError(f"trainer.val_check_interval: found {every}, expected more than 0 (limit_val_batches 0: no validation)")
        if clip is not None and not clip >= 0:  # neither is what is no number
            raise InputError(f"trainer.gradient_clip_val: found {clip}, expected 0 or more")
        within("model.z_loss", getattr(self.model, "z_loss", 0), 0, LARGEST_OPTION)
        within("data.seed", getattr(self.datamodule, "seed", 0), 0, 2**64 - 1)
        self._check_workers()
        self._check_precision()
        strategy = self.trainer.strategy
        launch_uninterrupted(strategy.launcher)
        if isinstance(strategy, Sharded):
            self._check_sharded()
        elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError(f'trainer.strategy: found {type(strategy).__name__}, expected "ddp" or "sharded", whose '
                             "checkpoints a kill cannot damage")

    def _check_sharded(self) -> None:
        if not isinstance(self.model, DecoderModule):
            raise InputError('trainer.strategy: found "sharded", which shares out decoders only, expected "ddp"')
        if self.said("ema") is not None:
            raise InputError('ema: found an average of the weights, expected none with trainer.strategy "sharded"')
        if self.model.optimizer_config.muon_lr is not None:
            raise InputError(f"model.init_args.optimizer.muon_lr: found {self.model.optimizer_config.muon_lr}, expected none "
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


def is_first_rank() -> bool:
    """Whether this is the only or the first process of a run, as those that start ranks say it in the environment.

    Lightning reads that when it is imported, which may have been before.
    """
    return all(os.environ.get(name, "0") in ("", "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def as_list(value: Any) -> list:
    """None, one value or several as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def one_line(message: str) -> str:
    """The key, what was expected and what was found, out of a message of jsonargparse."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    if keys[-1:] and keys[-1] in SOURCES and "DataSource'" not in message:  # or it is one of them that is wrong
        given = scrub(re.findall(r"(?:Got value: |\bval=|class_path (?='))(.*)", message)[-1].rstrip(":)"))
        return f"{'.'.join(keys)}: found {given:.80}, expected a list of sources, as in [{{paths: [FILE]}}]"
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
    """Build all that a command line names and, with `run`, do it: then its first word says what."""
    jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))  # of text that is no YAML
    return FitCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        save_config_callback=SaveConfig,
        auto_configure_optimizers=False,
        args=arguments,
        run=run,
        word=arguments[0] if run else "fit",
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


def main(word: str, arguments: list[str]) -> None:
    """Run `mmtx WORD ARGUMENTS`. Raises InputError for a mistake in the configuration or the data."""
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
        jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*TRUSTED, *PLUGINS])
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        with ExitStack() as held:
            command_line([word, *shipped_configs(arguments)], True, held)
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
        raise InputError(f"data.num_workers: {ended[0].rstrip('.')} (out of memory?); the same command with --ckpt_path last "
                         "goes on") from None
    except (KeyboardInterrupt, SystemExit) as stop:
        # The trainer makes a status of its own of Ctrl-C.
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from None
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)
