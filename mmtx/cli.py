"""The command `mmtx`. Each subcommand imports what it needs, so that `mmtx --help` answers at once."""

import argparse
import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from mmtx import __version__, limit_openmp_spin
from mmtx.commands import (
    caption,
    classify,
    convert,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    prepare,
    report,
    serve,
    tokens,
    transcribe,
)
from mmtx.commands.arguments import print_error
from mmtx.errors import InputError
from mmtx.modality.registry import load_plugin

INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for a command that Ctrl-C ended
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
DESCRIPTION = "One model for text, images and sound: train it, ask it, look inside."
TRAINING = {  # by mmtx.training.run
    "fit": "train a tokenizer or the decoder: mmtx fit --config FILE --output FOLDER",
    "validate": "compute the metrics of a finished model, or of a checkpoint, on data.validation",
    "test": "the same on data.test",
    "predict": "caption data.validation, to predictions.jsonl in the output folder",
}
# In the order of --help.
COMMANDS = (caption, classify, transcribe, generate, tokens, inspect, prepare, convert, export, evaluate, report, plan, serve)


@limit_openmp_spin()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line. A user's mistake ends with one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell closed it (>&-)
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names that are not UTF-8, and characters that the terminal's encoding lacks, are shown escaped.
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(arguments)
    except InputError as error:
        print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mmtx: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _run(arguments: list[str]) -> None:
    try:
        arguments = _with_plugins(arguments)
        if arguments and arguments[0] in TRAINING:
            from mmtx.training import run

            run.main(arguments[0], arguments[1:])
        else:
            options = _parser().parse_args(arguments)
            options.run(options)
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and (error.errno not in NO_ROOM or error.filename is not None):
            raise
        # Output that is still buffered for a closed pipe (head, less) or a full disk must not raise an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        raise InputError(f"standard output: cannot be written ({error.strerror})") from None


def _with_plugins(arguments: list[str]) -> list[str]:
    """Import each `--plugin FILE`, before anything that depends on the registered modalities -> the other arguments."""
    parser = Parser("mmtx", add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", action="append", default=[])
    options, rest = parser.parse_known_args(arguments)
    for file in options.plugin:
        load_plugin(file)
    return rest


class Parser(argparse.ArgumentParser):
    """Reports mistakes in the arguments like any other mistake of the user."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("mmtx", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"mmtx {__version__}")
    parser.add_argument("--plugin", metavar="FILE", help="import a Python file that registers a modality (all commands)")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    for word, help in TRAINING.items():
        commands.add_parser(word, help=help, add_help=False)
    for command in COMMANDS:
        command.add(commands)
    for each in commands.choices.values():  # for --help only: `_with_plugins` removes it before parsing
        each.add_argument("--plugin", metavar="FILE", help="import a Python file that registers a modality")
    return parser
