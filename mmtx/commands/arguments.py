"""Shared by several commands: their options, loading what these name, and reporting errors."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence

from mmtx.errors import InputError, escape

MAX_BAD_HELP = ("share of a source's rows, selected or not, that may be unusable, like data.max_bad of mmtx fit; default: "
                "that of --config, else 0.01")


def print_error(error: InputError) -> None:
    """Print an error in one line on stderr; with MMTX_DEBUG=1, after its traceback and those of its causes."""
    if os.environ.get("MMTX_DEBUG", "0") not in ("", "0"):
        behind: BaseException | None = error
        while behind is not None:
            behind.__suppress_context__ = False
            behind = behind.__cause__ or behind.__context__
        traceback.print_exception(error)
    print(f"mmtx: error: {error}", file=sys.stderr)


def count(least: int, most: int | None = None) -> Callable[[str], int]:
    """Whole numbers from `least` to `most`, as the type of an option."""
    def number(word: str) -> int:
        try:
            if (value := int(word)) >= least and (most is None or value <= most):
                return value
        except ValueError:
            pass
        bound = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"found {word!r}, expected a whole number {bound}")
    return number


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Options for reading sources on the command line, like the fields of a `DataSource` in a configuration."""
    parser.add_argument("--trusted", action="store_true", help="let rows of a source at a URL name local files, and URLs at any "
                        "address; default: only what lies below the source's own address, and public https URLs")
    add_fields_option(parser)
    parser.add_argument("--follow_links", action="store_true", help="also follow links in a folder that lead outside it")


def add_fields_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fields", nargs="+", type=_field, default=None, metavar="FIELD=NAME", help="names of the fields in "
                        "the rows, e.g. image=img_path text=label; FIELD= for a field that is not to be read")


def _field(word: str) -> tuple[str, str | None]:
    field, equals, name = word.partition("=")
    if not field or not equals:
        raise argparse.ArgumentTypeError(f"found {word!r}, expected FIELD=NAME")
    return field, name or None


def check_source_options(options: argparse.Namespace) -> None:
    """Raise InputError for sources together with --config, and for options that belong in the configuration."""
    if not options.config:
        return
    if getattr(options, "sources", None):
        raise InputError("found both sources and --config, expected one of them")
    for name in ("fields", "follow_links", "reader", "variants", "train", "tokenizers", "features"):
        if getattr(options, name, None):
            raise InputError(f"--{name}: found with --config, expected it in {options.config}")


def data_source(options: argparse.Namespace, paths: Sequence[str]):
    from mmtx.data.collection import DataSource

    fields = None if options.fields is None else dict(options.fields)
    return DataSource(list(paths), trusted=options.trusted, fields=fields, follow_links=options.follow_links)


def add_model_options(parser: argparse.ArgumentParser, model: bool = True, default: str = "the one that comes with mmtx") -> None:
    if model:
        parser.add_argument("--model", default=None, help=f"model folder, or user/model on the Hugging Face hub; default: {default}")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default: the GPU if there is one")


def add_precision_options(parser: argparse.ArgumentParser, load_in_8bit: bool = True) -> None:
    """Options for the number formats of a model; `load_in_8bit` for commands that generate with an engine."""
    parser.add_argument("--dtype", default=None, help="dtype of the decoder's weights: float32, bfloat16 or float16, of which the "
                        "last two take half the memory; default: float32")
    if load_in_8bit:
        parser.add_argument("--load_in_8bit", action="store_true", help="decode with 8-bit weights, on a CPU only: long answers are "
                            "faster, and now and then a different id scores best")


def add_server_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", metavar="URL", help="run the decoder in llama.cpp's server at this address, which must serve the "
                        "GGUF file that mmtx export made from --model; media are encoded and decoded here")


def load_model(options: argparse.Namespace):
    load_in_8bit, dtype = getattr(options, "load_in_8bit", False), getattr(options, "dtype", None)
    if getattr(options, "server", None) is not None:
        for name, given, what in (("load_in_8bit", load_in_8bit, "weights"), ("dtype", dtype, "weights"),
                                  ("device", options.device, "device")):
            if given:
                raise InputError(f"--{name}: found with --server, which chooses its {what} itself")
        from mmtx.interop.remote import connect

        return connect(options.server, options.model)
    from mmtx.pipeline import load

    return load(options.model, options.device, load_in_8bit, dtype or "float32")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; default: 0 (greedy)")
    parser.add_argument("--top_k", type=count(1), default=None,
                        help="when sampling, consider only the k most likely ids; default: all")
    parser.add_argument("--top_p", type=float, default=None, help="when sampling, consider only the fewest ids whose "
                        "probabilities add up to p; default: all")
    parser.add_argument("--max_new_tokens", type=count(1), default=256,
                        help="most ids to generate, though an image is always completed; default: 256")
    parser.add_argument("--seed", type=count(0, 2**64 - 1), default=None,
                        help="random seed of the sampling; default: a new one each time")


def sampling_of(options: argparse.Namespace) -> dict:
    names = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")
    return {name: getattr(options, name) for name in names}


def print_answers(asked: Sequence[str], files: Sequence, answers: Iterable) -> None:
    """Print captions or transcripts (`Captioned`) as they come, after the names of the files, or alone for a single file.

    Exits with status 1 if some failed, 2 if all did.
    """
    from mmtx.data.storage import display

    alone, done, failed = len(files) == 1 and list(files) == list(asked), 0, 0
    for name, answer, error in answers:
        if error is None:
            done += 1
            print(escape(answer) if alone else f"{display(name)}\t{escape(answer)}", flush=True)
        else:
            failed += 1
            print_error(error)
    if failed:
        sys.exit(1 if done else 2)
