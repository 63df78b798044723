"""`mmtx fit`, `validate`, `test` and `predict`: a command line becomes a run, and what ends it early one line."""

import errno
import logging
import re
import signal
import threading
import warnings
from contextlib import ExitStack
from enum import Enum

import jsonargparse
import yaml
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mmtx.data.yaml_check import read_yaml_text
from mmtx.errors import InputError
from mmtx.modality.registry import PLUGINS
from mmtx.shipped_files import find_shipped
from mmtx.training.callbacks import SaveConfig
from mmtx.training.fit_cli import FitCLI
from mmtx.training.lossy_output import lossy_output
from mmtx.training.memory import keep_memory
from mmtx.training.parser import Parser, input_error_in, load_yaml
from mmtx.training.run_checks import missing_metric
from mmtx.training.signals import follow_launcher

TRUSTED = ["mmtx", "lightning"]  # packages whose classes a configuration from others may name
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def command_line(arguments: list[str], run: bool, held: ExitStack | None = None) -> FitCLI:
    """Build everything that a command line names and, with `run`, run its first word, the subcommand."""
    jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))  # raised for text that is not YAML
    yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_str(str(value.value)))  # defaults of Lightning
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


def is_trusted_only(arguments: list[str]) -> bool:
    """Whether the command line sets `--trusted_only`; configuration files can neither set nor unset it here."""
    said = [value for name, value in zip(arguments, [*arguments[1:], ""]) if name == "--trusted_only"]
    said += [argument.partition("=")[2] for argument in arguments if argument.startswith("--trusted_only=")]
    return any(value.lower() not in ("false", "no", "0") for value in said)


def shipped_configs(arguments: list[str]) -> list[str]:
    """Arguments with each `--config FILE` resolved to a local file or, if there is none, to one shipped with the package."""
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
    read_yaml_text(path)  # so that an error names the file
    return str(path)


def main(word: str, arguments: list[str]) -> None:
    """Run `mmtx WORD ARGUMENTS`. Raises InputError for a mistake in the configuration or the data."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*WeightAveraging callback with a model that overrides.*")
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
    warnings.filterwarnings("ignore", message=".*configure_optimizers` returned `None`.*")  # the text tokenizer has none
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for name in ("callbacks", "profilers"):  # which speak only when they are asked to, with `verbose` or trainer.profiler
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    # `sys.argv` stays as it is: the other processes of a run on several devices are started with it.
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    follow_launcher()
    keep_memory()
    if is_trusted_only(arguments):
        jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*TRUSTED, *PLUGINS])
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        with ExitStack() as held:
            if word == "fit":  # what the others print is their result
                held.enter_context(lossy_output())
            command_line([word, *shipped_configs(arguments)], True, held)
    except MisconfigurationException as error:
        raise InputError(missing_metric(str(error)) or f"trainer: {' '.join(str(error).split())}") from None
    except ValueError as error:
        if (mistake := input_error_in(error)) is None:
            raise
        raise mistake from None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(f"output: {error.filename or ''} cannot be written ({error.strerror})") from None
    except RuntimeError as error:
        if early := missing_metric(str(error)):
            raise InputError(early) from None
        if lost := re.search(r"gloo.*(Connection (?:reset|closed) by peer)", str(error)):
            raise InputError(f"trainer.devices: another process of the run is gone ({lost[1]}; out of memory?); the same command "
                             "with --ckpt_path last goes on") from None
        if not (ended := re.search(r"DataLoader worker \(pid\(?s?\)? ?[\d, ]+\).*", str(error))):
            raise
        raise InputError(f"data.num_workers: {ended[0].rstrip('.')} (out of memory?); the same command with --ckpt_path last "
                         "goes on") from None
    except (KeyboardInterrupt, SystemExit) as stop:
        # The trainer turns Ctrl-C into an exit status of its own.
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from None
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)
