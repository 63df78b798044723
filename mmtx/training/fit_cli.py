"""Lightning's command line with the options and checks that every run needs."""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import jsonargparse
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mmtx.data.output import check_output, lock_folder
from mmtx.data.storage import recorded
from mmtx.data.workers import uninterrupted
from mmtx.errors import InputError
from mmtx.files import user_path, write_file
from mmtx.hub import find_model
from mmtx.schema import within
from mmtx.training import private
from mmtx.training.callbacks import EMAWeightAveraging, ProgressBar, SaveModel, ShowSamples
from mmtx.training.checkpoint import AtomicCheckpointIO, Checkpoints, by_age, leaves, may_change, newest
from mmtx.training.checkpoint_check import check_weights
from mmtx.training.guard import SkipNonFinite
from mmtx.training.loggers import Metrics, TensorBoard
from mmtx.training.parser import Parser, input_error_in, refused
from mmtx.training.run_checks import LARGEST_OPTION, check_fit, check_run
from mmtx.training.sharding import Sharded
from mmtx.training.signals import status
from mmtx.training.text import TextModule

# Options of `trainer` in which a resumed run must agree with the run that it continues.
RESUMED_TRAINER = ("max_steps", "accumulate_grad_batches", "precision", "gradient_clip_val", "gradient_clip_algorithm")
# Defaults that differ from Lightning's. All other callbacks and loggers of ours depend on our own options.
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
PREDICTIONS = "predictions.jsonl"
MOST_SEED = 2**32 - 1  # of NumPy's global generator, which a run seeds too


class FitCLI(private.PlainCLI):
    """Lightning's command line plus `--output`, the folder of the run, which stays locked while `held` is open.

    `word` is the subcommand.
    """

    def __init__(self, *args: Any, word: str, held: ExitStack, **kwargs: Any):
        self.word, self.held = word, held
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static there, and called on the instance
        """Only the requested one, without Lightning's `--ckpt_path`: the parser of each takes as long to build."""
        return {self.word: {*super().subcommands()[self.word], "ckpt_path"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER.items()})
        parser.add_argument("--output", type=str, required=True,
                            help="folder of the run: model, checkpoints, samples, metrics, and tensorboard unless trainer.logger is "
                                 "false or names other loggers")
        parser.add_argument("--ckpt_path", type=str | None, default=None,
                            help='checkpoint of this run: a file, or "last" for the newest in --output. mmtx fit resumes from it '
                                 '(with "last", it starts from the beginning if there is none); validate, test and predict use its '
                                 "weights, by default those of the finished model")
        parser.add_argument("--save_every", type=int, default=500, help="steps between checkpoints to resume from")
        parser.add_argument("--samples", type=int, default=16,
                            help="held-out samples to write to samples/ after each validation, 0 for none")
        parser.add_argument("--ema", type=float | None, default=None,
                            help="decay of a running average of the weights, which is validated and saved in their place; "
                                 "e.g. 0.999, which averages about the last 1,000 steps")
        parser.add_argument("--max_skipped", type=int, default=10,
                            help="consecutive steps with a non-finite loss or gradient after which the run stops; each is skipped")
        parser.add_argument("--trusted_only", type=bool, default=False,
                            help="for a configuration from somebody else: refuse classes from outside mmtx, Lightning and --plugin "
                                 "files before importing them, and any `variants` and perceptual.network; only on the command line")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse as Lightning does, and check that no value is missing and that the seed fits in 32 bits."""
        super().parse_arguments(parser, args)
        cast(Parser, parser).refuse_null(self.config)
        seed = self.config.get(str(self.config.get("subcommand")), self.config)["seed_everything"]
        if not isinstance(seed, bool):
            within("seed_everything", seed, 0, MOST_SEED)

    @property
    def parsed(self) -> jsonargparse.Namespace:
        """The options of the subcommand, from the command line and its files."""
        return self.config.get(str(self.subcommand), self.config)

    def said(self, name: str) -> Any:
        """The value of an option in `parsed`, with the classes that it names instantiated."""
        return self.config_init.get(str(self.subcommand), self.config_init).get(name)

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return user_path(self.said("output"))

    def before_instantiate_classes(self) -> None:
        config = self.parsed
        perceptual = config.get("model.init_args.perceptual")
        called = {"model.init_args.perceptual.network": perceptual and perceptual.network}
        for name in ("train", "validation", "test"):
            sources = config.get(f"data.init_args.{name}") or ()
            called |= {f"data.init_args.{name}.{i}.variants": source.variants for i, source in enumerate(sources)}
        for name, found in called.items():
            if config["trusted_only"] and found is not None:
                raise InputError(f"{name}: found {found}, which would be called, expected none with --trusted_only true")

    def instantiate_classes(self) -> None:
        """Instantiate as Lightning does; arguments that a class of the trainer rejects or lacks are errors of its option."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            trainer = vars(self.parsed["trainer"])
            named = [name for name, value in trainer.items() if str(error).endswith(f"Given value: {value}")]
            if input_error_in(error) is not None or not named:
                raise
            raise InputError(f"trainer.{named[0]}: {refused(str(error))}") from error

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
            kwargs["check_val_every_n_epoch"] = 1  # a fraction of an epoch, which is the whole run
        if not self.model.automatic_optimization:
            kwargs["gradient_clip_val"] = None
        if isinstance(self.model, TextModule):  # which is trained in a single step
            kwargs |= {"max_epochs": 1, "max_steps": -1}
        kwargs |= {"plugins": [*as_list(trainer.plugins), self.checkpoint_io], "logger": loggers, "default_root_dir": str(output)}
        try:
            made = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise InputError(f"trainer: {' '.join(str(error).split())}") from None
        if private.copies_this_process(made.strategy):
            raise InputError('trainer.strategy: found one that spawns or forks its processes, expected "ddp" or "sharded"')
        private.load_only_what_is_given(made)
        return made

    def _callbacks(self, output: Path) -> list[Callback]:
        """The callbacks of `--output`, `--save_every`, `--samples`, `--ema` and `--max_skipped`."""
        samples, save_every, max_skipped, ema = map(self.said, ("samples", "save_every", "max_skipped", "ema"))
        for name, value, least in (("samples", samples, 0), ("save_every", save_every, 1), ("max_skipped", max_skipped, 1)):
            within(name, value, least, LARGEST_OPTION)
        if ema is not None and not 0 < ema < 1:
            raise InputError(f"ema: found {ema}, expected a number between 0 and 1")
        average = [] if ema is None else [EMAWeightAveraging(decay=ema, use_buffers=False)]
        if self.said("trainer").fast_dev_run:  # a rehearsal, which leaves the folder alone
            return [*average, SkipNonFinite(max_skipped)]
        return [
            # ShowSamples must run before the average is swapped out after a validation, SaveModel after it replaces the weights.
            ShowSamples(output, samples),
            *average,
            SaveModel(output),
            SkipNonFinite(max_skipped),
            Checkpoints(output / "checkpoints", save_every),
        ]

    def fit(self, **kwargs: Any) -> None:
        """`Trainer.fit`, where "last" is the newest sound checkpoint."""
        check_fit(self.trainer, self.said("trainer"), self.model, self.datamodule, self.said("ema"))
        # Until the first step, other ranks end with the one that started them, which would be killed if they ended first.
        private.launch_within(self.trainer.strategy.launcher, uninterrupted)
        self.checkpoint_io.record = self.record()
        given, output = self.said("ckpt_path"), self.output
        path = self._checkpoint(given)
        if path is None and self.trainer.is_global_zero and not self.said("trainer").fast_dev_run:
            if given is not None:
                print(f"mmtx: {output / 'checkpoints'}: found no checkpoint to resume from, so training starts from the beginning",
                      file=sys.stderr)
            elif found := by_age(output / "checkpoints"):
                print(f"mmtx: {output}: training starts from the beginning and replaces the run that was at {found[-1].stem}; "
                      "--ckpt_path last would resume it", file=sys.stderr)
            elif (output / "model").exists():
                print(f"mmtx: {output}: training starts from the beginning and replaces the existing model", file=sys.stderr)
        self.trainer.fit(**kwargs, ckpt_path=path)
        step, steps = self.trainer.global_step, self.trainer.max_steps
        if step == 0 and self.trainer.fit_loop.epoch_loop.total_batch_idx < 0:
            raise InputError("trainer: found no step trained, expected one before trainer.max_time or a callback ends the run")
        if step < steps and self.trainer.is_global_zero and not self.said("trainer").fast_dev_run:
            print(f"mmtx: {output}: training ended at step {step} of {steps}, by trainer.max_time or a callback", file=sys.stderr)

    def validate(self, **kwargs: Any) -> None:
        """Print the figures of the finished model in `--output`, or of a checkpoint, and write nothing."""
        self.trainer.validate(**self._held_out(kwargs))

    def test(self, **kwargs: Any) -> None:
        """As `validate`, on `data.test`."""
        self.trainer.test(**self._held_out(kwargs))

    def predict(self, **kwargs: Any) -> None:
        """Write captions of the validation samples to `OUTPUT/predictions.jsonl`."""
        if self.trainer.world_size > 1:
            raise InputError(f"trainer.devices: found {self.trainer.world_size} processes, expected 1 for mmtx predict")
        batches = self.trainer.predict(**{**self._held_out(kwargs), "return_predictions": True})
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for batch in batches for row in batch]
        path = self.output / PREDICTIONS
        write_file(path, "".join(lines).encode(errors="backslashreplace"))  # names that are not UTF-8 become JSON escapes
        print(f"{path}: {len(lines)} captions")

    def _held_out(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Load the weights to evaluate -> arguments for the trainer's `validate`, `test` or `predict`."""
        step, name = STEPS[self.word], type(self.model).__name__
        if getattr(type(self.model), step) is getattr(LightningModule, step):
            raise InputError(f"model: found {name}, which has no {step}, expected another for mmtx {self.word}")
        check_run(self.trainer, self.model, self.datamodule)
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
        end = lambda number, *_: sys.exit(status(number))
        private.on_signals(self.trainer, end, end)
        if self.trainer.is_global_zero:
            begun = "" if path or weights == self.output / "model" else f", with which the run begins: {self.output} has no model yet"
            print(f"mmtx: {self.word}: weights of {weights}{begun}", file=sys.stderr)
        return {**kwargs, "ckpt_path": path}

    def _finished(self) -> Path:
        """The folder of the run's finished model or, if there is none, of the model that it starts from."""
        folder = self.output / "model"
        init_from = self.parsed.get("model.init_args.init_from") or self.parsed.get("model.init_args.refine")
        if not folder.is_dir() and init_from is None:
            raise InputError(f"output: {folder}: no such folder, expected a finished model, or --ckpt_path with a checkpoint")
        return folder if folder.is_dir() else find_model(init_from)

    def _checkpoint(self, path: str | None) -> Path | None:
        """The file that `--ckpt_path` refers to."""
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

    def record(self) -> dict[str, Any]:
        """All settings that determine the batches and the model, as plain values by name."""
        config = self.parsed.as_dict()
        tokenizers = getattr(self.datamodule, "tokenizers", {})
        record = leaves({
            **{name: config[name] for name in ("seed_everything", "ema", "model", "data")},
            "trainer": {name: config["trainer"][name] for name in RESUMED_TRAINER},
            "tokenizers": {kind: tokenizer.fingerprint for kind, tokenizer in tokenizers.items()},
            "processes": self.trainer.world_size,
            **({"sharded": True} if isinstance(self.trainer.strategy, Sharded) else {}),
        })
        return {name: value if isinstance(value, bool | int | float | None) else recorded(str(value))
                for name, value in record if not may_change(name)}


def is_first_rank() -> bool:
    """Whether this is the only or the first process of a run, according to the environment that launchers set.

    Lightning reads it on import, which may have happened earlier.
    """
    return all(os.environ.get(name, "0") in ("", "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def as_list(value: Any) -> list:
    """None, one value or several as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
