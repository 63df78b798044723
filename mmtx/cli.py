"""The command `mmtx`. Each subcommand imports what it needs, so that `mmtx --help` answers at once."""

import argparse
import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from mmtx import __version__, limit_openmp_spin
from mmtx.errors import InputError, escape
from mmtx.modality.modality import MODALITIES, PLUGINS, load_plugin

INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for a command that Ctrl-C ended
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
DESCRIPTION = "One model for text, pictures and sound: train it, ask it, look inside."
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+|data:\S+,\S*")  # "see https://example.org" is text
MAX_BAD_HELP = ("share of all rows of a source, selected or not, that may be unusable, as data.max_bad of mmtx fit; default: "
                "that of --config, else 0.01")
TRAINING = {  # by mmtx.training.run
    "fit": "train a tokenizer or the decoder: mmtx fit --config FILE --output FOLDER",
    "validate": "the figures of a finished model, or of a checkpoint, on data.validation",
    "test": "the same on data.test",
    "predict": "captions of data.validation, to predictions.jsonl in the output folder",
}


@limit_openmp_spin()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line. A user's mistake ends with one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names that are no UTF-8, and letters that the encoding of the terminal lacks, are shown escaped.
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(arguments)
    except InputError as error:
        _tell(error)
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
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and (error.errno not in NO_ROOM or error.filename is not None):
            raise
        # What Python still holds for a reader that has gone (head, less), or a full disk, must not become an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        raise InputError(f"standard output: cannot be written ({error.strerror})") from None


def _with_plugins(arguments: list[str]) -> list[str]:
    """Import each `--plugin FILE`, before anything that depends on which modalities there are -> the other arguments."""
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            return [*rest, word, *words]
        if word == "--plugin" and (file := next(words, None)) is None:
            raise InputError("argument --plugin: expected one argument")
        if word == "--plugin":
            load_plugin(file)
        elif word.startswith("--plugin="):
            load_plugin(word.partition("=")[2])
        else:
            rest.append(word)
    return rest


def _tell(error: InputError) -> None:
    """One line on stderr; with MMTX_DEBUG=1, before it, where the error comes from and what is behind it."""
    if os.environ.get("MMTX_DEBUG", "0") not in ("", "0"):
        behind: BaseException | None = error
        while behind is not None:
            behind.__suppress_context__ = False
            behind = behind.__cause__ or behind.__context__
        traceback.print_exception(error)
    print(f"mmtx: error: {error}", file=sys.stderr)


def _count(least: int, most: int | None = None) -> Callable[[str], int]:
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


def _amount(word: str) -> float:
    """A number above 0."""
    try:
        if 0 < (value := float(word)) < float("inf"):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"found {word!r}, expected a number above 0, as 1e18")


def _part(word: str) -> tuple[int, int]:
    """ "3/8" -> (3, 8)."""
    found = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", word, re.ASCII)
    if found is None or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"found {word!r}, expected K/N with K from 1 to N, as 3/8")
    return int(found[1]), int(found[2])


class Parser(argparse.ArgumentParser):
    """Tells mistakes in the arguments as any other mistake of the user."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("mmtx", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"mmtx {__version__}")
    parser.add_argument("--plugin", metavar="FILE", help="import a Python file that registers a modality; of every command")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    for word, help in TRAINING.items():
        commands.add_parser(word, help=help, add_help=False)

    caption = commands.add_parser("caption", help="say what pictures and sounds are")
    caption.add_argument("files", nargs="+", help="files, folders or URLs of files")
    _server_option(caption)
    _model_options(caption)
    _8bit_option(caption)
    _sampling_options(caption)
    caption.set_defaults(run=_caption)

    generate = commands.add_parser("generate", help="answer a prompt with text, a picture or a sound")
    generate.add_argument("parts", nargs="*", help="text, and paths of pictures and sounds, in order")
    generate.add_argument("--out", choices=tuple(MODALITIES), default="text", help="default: text")
    generate.add_argument("--file", type=Path, help="where a picture or a sound goes, e.g. out.png, out.wav")
    generate.add_argument("--begin", metavar="FILE", help="a picture to be completed, or a sound that shall go on")
    generate.add_argument("--rows", type=_count(0), help="pixel rows that are kept of that picture, default: the upper half")
    generate.add_argument("--seconds", type=float, default=1.0, help="the most that is added to that sound, default: 1")
    _server_option(generate)
    _model_options(generate)
    _8bit_option(generate)
    _sampling_options(generate)
    generate.add_argument("--guidance_scale", type=float, default=1.0,
                          help="strength of classifier-free guidance: how closely the answer "
                          "follows the prompt, default: 1 (off)")
    generate.set_defaults(run=_generate)

    tokenize = commands.add_parser("tokenize", help="print the ids of text, pictures and sounds")
    tokenize.add_argument("parts", nargs="+", help="text, and paths of pictures and sounds, in order")
    tokenize.add_argument("--format", choices=("document", "chat"), default="document", help="chat: the prompt that generate "
                          "would answer, for engines that take ids; default: document")
    tokenize.add_argument("--out", choices=tuple(MODALITIES), default="text", help="what that answer is to be, default: text")
    _model_options(tokenize)
    tokenize.set_defaults(run=_tokenize)

    detokenize = commands.add_parser("detokenize", help="make text, pictures and sounds of ids, such as an engine answers")
    detokenize.add_argument("ids", nargs="*", metavar="ID", help="an answer, a prompt with its answer, of which the answer is shown, "
                            "or a document; default: those on standard input, as numbers or in JSON")
    detokenize.add_argument("--output", type=Path, metavar="FOLDER", help="where pictures and sounds go, as 1.png, 2.wav")
    _model_options(detokenize)
    detokenize.set_defaults(run=_detokenize)

    inspect = commands.add_parser("inspect", help="show documents as coloured ids, and which of them train")
    inspect.add_argument("sources", nargs="+", help="manifests, folders or shards")
    inspect.add_argument("--rows", type=_count(1), default=1, help="documents to show, default: 1")
    _model_options(inspect)
    _source_options(inspect)
    inspect.set_defaults(run=_inspect)

    prepare = commands.add_parser("prepare", help="turn media into tokenized shards, from which the decoder trains faster",
                                  description="Turn media into tokenized shards. A source of a training configuration may "
                                  "name the folder in place of the media; every view of a sample is then the same, so "
                                  "the augmentation of a prepared medium must be null.")
    prepare.add_argument("sources", nargs="*", help="manifests, folders, shards or Hugging Face datasets")
    prepare.add_argument("--output", required=True, help="a new folder, or one of a run that did not end")
    prepare.add_argument("--config", help="take sources, tokenizers and --features from this training configuration; each "
                                          "source gets a folder of its own in --output")
    prepare.add_argument("--tokenizers", nargs="+", metavar="FOLDER", help="default: those that come with mmtx")
    prepare.add_argument("--features", action="store_true", help="also store what decoders with continuous_inputs: true take, 2 "
                         "bytes a number: 16 kB a picture of 64 codes with the tokenizer that comes with mmtx")
    prepare.add_argument("--num_workers", type=_count(1), default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                         else os.cpu_count(), help="processes, default: one a core")
    prepare.add_argument("--rows", type=_count(1), default=2048, help="rows of a shard, default: 2048")
    prepare.add_argument("--part", type=_part, metavar="K/N", help="only part K of N, for as many machines; the same command "
                         "without --part joins all parts that are in --output, and makes what is missing")
    prepare.add_argument("--max_bad", type=float, help=MAX_BAD_HELP)
    _source_options(prepare)
    prepare.set_defaults(run=_prepare)

    convert = commands.add_parser("convert", help="make a model of a pretrained language model: Llama, Qwen2 or Qwen3")
    convert.add_argument("--from", dest="source", required=True, metavar="FOLDER|FILE.gguf|NAME",
                         help="a folder of transformers, a GGUF file, or user/model on the Hugging Face hub")
    convert.add_argument("--output", required=True, help="the model folder to write")
    convert.add_argument("--image", metavar="TOKENIZER", help="give its codes ids; default: no pictures")
    convert.add_argument("--audio", metavar="TOKENIZER", help="give its codes ids; default: no sounds")
    convert.set_defaults(run=_convert)

    export = commands.add_parser("export", help="write a model for transformers, vLLM or llama.cpp")
    export.add_argument("--to", choices=("transformers", "gguf"), required=True)
    export.add_argument("--output", required=True, help="a new folder, or a new file for gguf")
    export.add_argument("--max_seq_len", type=_count(1, 2**24), default=8192, help="longest stream in tokens, default: 8192")
    _model_options(export)
    export.set_defaults(run=_export)

    evaluate = commands.add_parser("evaluate", help="caption held-out samples and compare with the true captions")
    evaluate.add_argument("sources", nargs="*", help="held-out manifests, folders or shards")
    evaluate.add_argument("--train", nargs="+", default=[], metavar="SOURCE",
                          help="training samples, for the nearest-neighbour control and for what only they can tell of a "
                               "caption")
    evaluate.add_argument("--config", help="take both from the data of this training configuration")
    evaluate.add_argument("--reader", default=None, metavar="FILE:FUNCTION", help="what reads the fields of a caption, so that each "
                          "is scored; as `reader` of a source in --config")
    evaluate.add_argument("--max_bad", type=float, help=MAX_BAD_HELP)
    evaluate.add_argument("--show", type=_count(0), default=8, help="examples to print, default: 8")
    _model_options(evaluate)
    _8bit_option(evaluate)
    _source_options(evaluate)
    evaluate.set_defaults(run=_evaluate)
    report = commands.add_parser("report", help="a finished run on one HTML page: curves, figures, samples, configuration")
    report.add_argument("folder", help="the output folder of mmtx fit")
    report.add_argument("--file", type=Path, default=None, help="where the page goes, default: report.html in that folder")
    report.add_argument("--evaluate", action="store_true", help="caption the run's data.validation as mmtx evaluate does, with "
                        "controls; what that tells is kept as evaluation.txt in the folder and is part of later reports, too")
    _model_options(report, model=False)
    report.set_defaults(run=_report)

    plan = commands.add_parser("plan", help="which size to train for how long with a budget of compute",
                               description="Which size to train for how long: by Hoffmann et al. 2022, by Kaplan et al. 2020, and "
                               "by a fit of your own runs. The budget is --flops, or --hours at a measured --rate.")
    plan.add_argument("--flops", type=_amount, help="floating-point operations of the training, e.g. 1e18")
    plan.add_argument("--hours", type=_amount, help="hours of the training")
    plan.add_argument("--rate", type=_amount, help="FLOPs a second that the machine was measured to train at, e.g. 3e14")
    plan.add_argument("--tokens_per_batch", type=_count(1), default=8192, help="tokens of a step, default: 8192")
    plan.add_argument("--max_seq_len", type=_count(1), default=1024, help="tokens of a document, default: 1024")
    plan.add_argument("--unique_tokens", type=_amount, help="tokens of the data before they repeat")
    plan.add_argument("--runs", metavar="FOLDER", help="a folder of finished runs, at least 6 of 3 sizes and 3 numbers of tokens")
    plan.add_argument("--file", type=Path, help="where a plot of the losses of equal compute goes, e.g. plan.png")
    plan.add_argument("--model", help="whose vocabulary and head width the plan is for, default: the one that comes with mmtx")
    plan.set_defaults(run=_plan)

    for word, help in (("serve", "answer over HTTP in the form of OpenAI's API"),
                       ("demo", "a page to try a model with: files, camera, microphone")):
        serve = commands.add_parser(word, help=help, description=f"{help[0].upper()}{help[1:]}. The environment variable "
                                    "MMTX_API_KEY, if set, holds the key that callers need.")
        serve.add_argument("--host", default="127.0.0.1", help="address to listen at, default: 127.0.0.1, this machine only")
        serve.add_argument("--port", type=_count(0, 65535), default=8000, help="default: 8000; 0 takes a free one")
        serve.add_argument("--name", default=None, help="what callers call the model, default: the name of its folder")
        for option, what, default in (("requests", "requests in the house, others are told to come again", 64),
                                      ("megabytes", "megabytes of a request", 16), ("pixels", "pixels of a picture", 25_000_000),
                                      ("seconds", "seconds of a sound", 60), ("tokens", "tokens of prompt and answer", 4096),
                                      ("timeout", "seconds until an answer is whole", 120)):
            serve.add_argument(f"--max_{option}", type=_count(1), default=default, help=f"{what}, default: {default}")
        _model_options(serve)
        _8bit_option(serve)
        if word == "demo":
            serve.add_argument("--generate_model", metavar="FOLDER", help="what draws, plays and goes on, default: --model, and with "
                               "the model that comes with mmtx the one that comes along for that")
            serve.add_argument("--examples", nargs="*", metavar="FILE", help="pictures and sounds to try, files or folders; default: "
                               "five that come with mmtx")
            serve.add_argument("--train", nargs="+", default=[], metavar="SOURCE", help="training samples, of which the nearest are "
                               "shown beside an answer")
            _source_options(serve)
        serve.set_defaults(run=_serve, page=word == "demo")
    for command in commands.choices.values():  # taken away before anything is parsed, see `_with_plugins`
        command.add_argument("--plugin", metavar="FILE", help="import a Python file that registers a modality")
    return parser


def _source_options(parser: argparse.ArgumentParser) -> None:
    """How sources of the command line are read, as the fields of a `DataSource` say it in a configuration."""
    parser.add_argument("--trusted", action="store_true", help="let rows of a source at a URL name local files and private "
                        "addresses; default: what lies below its own address, and public https")
    parser.add_argument("--fields", nargs="+", type=_field, default=None, metavar="FIELD=NAME", help="names under which rows "
                        "have what is read: image=img_path text=label; FIELD= for one that shall not be read")
    parser.add_argument("--follow_links", action="store_true", help="read also what links in a folder lead to outside of it")


def _field(word: str) -> tuple[str, str | None]:
    field, equals, name = word.partition("=")
    if not field or not equals:
        raise argparse.ArgumentTypeError(f"found {word!r}, expected FIELD=NAME")
    return field, name or None


def _check_source_options(options: argparse.Namespace) -> None:
    """Raise InputError for what the sources of --config say themselves."""
    for name in ("fields", "follow_links", "reader"):
        if options.config and getattr(options, name, None):
            raise InputError(f"--{name.replace('_', '-')}: found with --config, expected it in the sources of {options.config}")


def _source(options: argparse.Namespace, paths: Sequence[str]):
    from mmtx.data.collection import DataSource

    fields = None if options.fields is None else dict(options.fields)
    return DataSource(list(paths), trusted=options.trusted, fields=fields, follow_links=options.follow_links)


def _model_options(parser: argparse.ArgumentParser, model: bool = True) -> None:
    if model:
        parser.add_argument("--model", default=None, help="model folder, or user/model on the Hugging Face hub; default: the one "
                            "that comes with mmtx")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default: the GPU if there is one")


def _8bit_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load_in_8bit", action="store_true", help="write ids with 8 bits a weight, on a CPU: faster, and now and "
                        "then another id is the best")


def _server_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", metavar="URL", help="answer with llama.cpp's server at this address, which runs what mmtx export "
                        "made of --model: ids are sent, and ids come back")


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the best id")
    parser.add_argument("--top_k", type=_count(1), default=None, help="sample from the best K ids")
    parser.add_argument("--top_p", type=float, default=None, help="sample from the ids that hold this probability")
    parser.add_argument("--max_new_tokens", type=_count(1), default=256, help="default: 256")
    parser.add_argument("--seed", type=_count(0, 2**64 - 1), default=None, help="fixes the random choices")


def _load(options: argparse.Namespace):
    load_in_8bit = getattr(options, "load_in_8bit", False)
    if getattr(options, "server", None) is not None:
        if load_in_8bit:
            raise InputError("--load_in_8bit: found with --server, which chooses its weights itself")
        from mmtx.interop.remote import connect

        return connect(options.server, options.model)
    from mmtx.pipeline import load

    return load(options.model, options.device, load_in_8bit)


def _sampling(options: argparse.Namespace) -> dict:
    names = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")
    return {name: getattr(options, name) for name in names}


def _parts(names: Sequence[str]) -> list:
    """Words of the command line: files and URLs are media, the rest is text."""
    from mmtx.data.sample import kind_of
    from mmtx.pipeline import Medium

    def part(name: str):
        if URL.fullmatch(name):
            return Medium(kind_of(name) or "image", name)
        try:
            if Path(name).is_file():
                return Path(name)
        except (OSError, ValueError):  # too long for a name, or with a NUL: text
            return name
        if kind_of(name):
            raise InputError(f"{name}: no such file")
        return name

    return [part(name) for name in names]


def _caption(options: argparse.Namespace) -> None:
    from mmtx.captioning import caption_files, find_media
    from mmtx.data.storage import display

    files = list(find_media(options.files))
    alone, done, failed = len(files) == 1 and files == options.files, 0, 0
    for name, caption, error in caption_files(_load(options), files, **_sampling(options)):
        if error is None:
            done += 1
            print(escape(caption) if alone else f"{display(name)}\t{escape(caption)}", flush=True)
        else:
            failed += 1
            _tell(error)
    if failed:
        sys.exit(1 if done else 2)


def _generate(options: argparse.Namespace) -> None:
    if not options.parts and options.begin is None:
        raise InputError("the following arguments are required: parts (see mmtx generate --help)")
    if options.out != "text" and options.file is None:
        raise InputError(f"--file is missing: where shall the {options.out} go?")
    if options.out == "text" and options.begin is not None:
        raise InputError("--begin: found --out text, expected --out image or --out audio")
    if options.model is None and options.server is None and options.out in ("image", "audio"):
        from mmtx.files import shipped

        options.model = shipped("demos/generate")  # the model for captions neither draws nor plays
    model, parts, sampling = _load(options), _parts(options.parts), {**_sampling(options), "guidance_scale": options.guidance_scale}
    if options.out == "text":
        for piece in model.stream(parts, **sampling):
            print(escape(piece, keep="\n\t"), end="", flush=True)
        print()
        return
    if options.begin is None:
        result = model.generate(parts, out=options.out, **sampling)
    elif options.out == "image":
        result = model.outpaint(options.begin, options.rows, parts, **sampling)
    elif options.out != "audio":
        raise InputError(f"--begin: found --out {options.out}, expected --out image or --out audio")
    else:
        del sampling["max_new_tokens"]  # --seconds say it
        result = model.continue_audio(options.begin, options.seconds, parts, **sampling)
    _write(result, options.file)
    print(options.file)


def _write(result, path: Path, option: str = "--file") -> None:
    """Save what was generated, which appears whole or not at all: what has a method `save`, or an array."""
    import numpy as np

    special = path.exists() and not path.is_file()  # a pipe or a device gets it straight
    part = path if special else path.with_name(f".{path.stem[:64]}.{os.getpid()}{path.suffix}")
    try:
        if hasattr(result, "save"):
            result.save(part)
        else:
            with open(part, "wb") as file:
                np.save(file, result)
        if not special:
            os.replace(part, path)
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # of what the extension chose
        raise InputError(f"{option} {path}: cannot be written ({str(error).replace(str(part), str(path))})") from None
    finally:
        if not special:
            part.unlink(missing_ok=True)


def _tokenize(options: argparse.Namespace) -> None:
    model = _load(options)
    print(*model.tokenize(_parts(options.parts), options.format, options.out))
    if options.format == "chat":
        _tell_engines(model)


def _tell_engines(model) -> None:
    from mmtx.interop.export import cannot

    for sentence in cannot(model):
        print(f"mmtx: note: {sentence}", file=sys.stderr)


def _detokenize(options: argparse.Namespace) -> None:
    from mmtx.interop.remote import answer_in, finish

    words = options.ids or re.sub(r"[\[\],]", " ", sys.stdin.read()).split()
    try:
        ids = list(map(int, words))
    except ValueError as error:
        raise InputError(f"ids: {error}") from None
    model = _load(options)
    parts = model._to_media(finish(answer_in(ids, model.vocabulary), model.vocabulary))
    media = [part for part in parts if not isinstance(part, str)]
    if media and options.output is None:
        raise InputError("--output is missing: where shall pictures and sounds go?")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts, 1):
        if isinstance(part, str):
            print(escape(part, keep="\n\t"))
            continue
        ending = "png" if hasattr(part, "getpixel") else "wav" if hasattr(part, "rate") else "npy"
        file = options.output / f"{number}.{ending}"
        _write(part, file, "--output")
        print(file)


def _inspect(options: argparse.Namespace) -> None:
    from mmtx.data.collection import to_stderr
    from mmtx.data.sources import SkipCounter, scan
    from mmtx.data.tokens import usable
    from mmtx.sequence import render

    model = _load(options)
    colours = {"special": "90", **{kind: modality.colour for kind, modality in MODALITIES.items()}}
    v, coloured = model.vocabulary, sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))

    def paint(text: str, kind: str, trained: bool) -> str:
        if not coloured:
            return f"{text}*" if trained else text
        return f"\033[{colours[kind]}{';1;4' if trained else ''}m{text}\033[0m"

    legend = ", ".join(paint(kind, kind, False) for kind in colours)
    legend += f"; trained ids are {'underlined' if coloured else 'marked *'}\n"
    reading = _source(options, options.sources)
    for source in reading.paths:
        skipped, left = SkipCounter(1.0), options.rows  # a few rows tell no share, so each bad one is told
        for row in scan(source, options.trusted, reading.fields, options.follow_links):
            if not left:
                break
            skipped.rows += 1
            if isinstance(row, InputError):
                skipped.skip(row)
                continue
            for sample, document in usable([row], model.tokenizers, skipped, patches=model.decoder.config.encoders):
                left -= 1
                rendered = render(document, v)
                print(f"{legend}\n{sample.where}: {len(rendered.ids)} ids, {int(rendered.loss_mask.sum())} trained")
                legend = ""
                words = []
                for ident, trained in zip(rendered.ids.tolist(), rendered.loss_mask.tolist(), strict=True):
                    kind = v.kind(ident)
                    word = {"special": v.name, "text": model.tokenizers["text"].piece}.get(kind, str)(ident)
                    words.append(paint(word, kind, trained))
                print(" ".join(words))
        if skipped.rows and skipped.count == skipped.rows:
            raise InputError(f"no sample can be used: {skipped.summary()}")
        skipped.tell(to_stderr)


def _prepare(options: argparse.Namespace) -> None:
    from dataclasses import asdict, replace

    import yaml

    from mmtx.data.collection import DataSource, read_config
    from mmtx.data.output import check_output
    from mmtx.data.prepare import prepare
    from mmtx.data.sources import MAX_BAD
    from mmtx.files import find_shipped, shipped
    from mmtx.modality.base import load_tokenizer

    options.tokenizers = options.tokenizers or [shipped(f"tokenizers/{kind}") for kind, modality in MODALITIES.items()
                                                if modality.shipped]
    if bool(options.sources) == bool(options.config):
        raise InputError("found both sources and --config, expected one of them" if options.config
                         else "found neither sources nor --config, expected one of them")
    folders, features, sources = options.tokenizers, options.features, [_source(options, options.sources)]
    max_bad, frozen = MAX_BAD, ""
    outputs = [options.output]
    _check_source_options(options)
    if options.config:
        config = read_config(find_shipped(options.config))
        sources, folders, features, max_bad = config.train, config.tokenizers, config.continuous_inputs, config.max_bad
        # Shards hold what encoders made, and not what an encoder that is trained along would read.
        frozen = " --model.train_encoder false" if config.train_encoder else ""
        # The same samples are prepared once, however often they are used.
        read = [repr((source.paths, source.select, source.fields, source.follow_links)) for source in sources]
        outputs = [check_output(options.output) / str(list(dict.fromkeys(read)).index(what)) for what in read]
        if options.trusted:
            sources = [replace(source, trusted=True) for source in sources]
    loaded = {tokenizer.kind: tokenizer for tokenizer in (load_tokenizer(find_shipped(folder)) for folder in folders)}
    tokenizers = {kind: loaded[kind] for kind in MODALITIES if kind in loaded}
    done = set()
    for source, output in zip(sources, outputs, strict=True):
        if output not in done:
            facts = prepare(source, tokenizers, output, features=features, rows=options.rows, num_workers=options.num_workers,
                            max_bad=max_bad if options.max_bad is None else options.max_bad, part=options.part)
            if options.part:
                print(f"{output}: part {options.part[0]} of {options.part[1]}: {facts['shards']:,} shards, {facts['rows']:,} rows; "
                      "the same command without --part joins the parts", flush=True)
                done.add(output)
                continue
            print(f"{output}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, {facts['shards']:,} shards, "
                  f"{facts['skipped']:,} of {facts['rows']:,} rows skipped", flush=True)
        done.add(output)
    if options.part:
        return
    default = asdict(DataSource([]))
    # The command line goes on from each source of the configuration: a `select` that has done its work must be undone.
    done_with = ("select", "fields", "follow_links")
    train = [{"paths": [str(output)], **{name: default[name] if name in done_with else value
                                         for name, value in asdict(source).items()
                                         if name not in ("paths", "trusted") and value != default[name]}}
             for source, output in zip(sources, outputs, strict=True)]
    train = yaml.safe_dump(train, default_flow_style=True, sort_keys=False, width=10**6).strip()
    plugins = "".join(f"--plugin {path} " for path in PLUGINS.values())
    print(f"mmtx fit {plugins}--config {options.config or 'FILE'} --data.train '{train}' "
          "--data.image_augmentation null --data.audio_augmentation null" + frozen)


def _convert(options: argparse.Namespace) -> None:
    from mmtx.interop.convert import convert

    media = {kind: folder for kind in ("image", "audio") if (folder := getattr(options, kind)) is not None}
    model = convert(options.source, media)
    model.save(options.output)
    v = model.vocabulary
    turns = "its chat template" if v.chat_format is not None else "the tags of the stream (it has no chat template)"
    told = ", ".join(f"{kind} {len(v.range(kind)):,}" for kind in ("text", "special", *v.kinds[1:]))
    print(f"{options.output}: {sum(p.numel() for p in model.decoder.parameters()):,} parameters; ids: {told}; turns by {turns}")


def _export(options: argparse.Namespace) -> None:
    from mmtx.interop.export import export

    model = _load(options)
    export(model, options.to, options.output, options.max_seq_len)
    _tell_engines(model)
    print(options.output)


def _evaluate(options: argparse.Namespace) -> None:
    for section in _evaluation(options):
        print(section, flush=True)


def _evaluation(options: argparse.Namespace) -> Iterator[str]:
    from dataclasses import replace

    from mmtx.data.collection import read_config
    from mmtx.data.sources import MAX_BAD
    from mmtx.files import find_shipped
    from mmtx.report import report

    _check_source_options(options)
    if options.config:
        config = read_config(find_shipped(options.config))
        train, held_out = ([source for source in sources if source.task == "caption"]
                           for sources in (config.train, config.validation))
        max_bad = config.max_bad
        if options.trusted:
            train, held_out = ([replace(source, trusted=True) for source in sources] for sources in (train, held_out))
    else:
        max_bad = MAX_BAD
        train = [_source(options, options.train)] if options.train else []
        held_out = [replace(_source(options, [source]), reader=options.reader) for source in options.sources]
    if not held_out:
        raise InputError("found neither held-out sources nor --config, expected one of them")
    if options.max_bad is not None:
        max_bad = options.max_bad
    yield from report(_load(options), held_out, train, options.show, max_bad)


def _serve(options: argparse.Namespace) -> None:
    try:
        from mmtx.serving.app import serve
    except ImportError as error:
        raise InputError(f'serving needs {error.name}: pip install "mmtx[serve]"') from None
    from mmtx.serving.limits import Limits

    limits = Limits(**{name: getattr(options, f"max_{name}") for name in Limits.__dataclass_fields__})
    name = options.name or (Path(options.model).resolve().name if options.model else "starter")
    model = _load(options)
    serve(model, name, options.host, options.port, limits, os.environ.get("MMTX_API_KEY") or None,
          _page(options, model) if options.page else None)


def _page(options: argparse.Namespace, model):
    """What puts the page of `mmtx demo` on a server."""
    from functools import partial

    from mmtx.captioning import find_media
    from mmtx.files import shipped
    from mmtx.pipeline import load
    from mmtx.serving.nearest import Nearest
    from mmtx.serving.page import add_page

    folder = options.generate_model or (None if options.model else shipped("demos/generate"))
    examples: list[str] = []
    for found in find_media([str(shipped("demos/examples"))] if options.examples is None else options.examples):
        if isinstance(found, InputError):
            raise found
        examples.append(found)
    nearest = Nearest(model, [_source(options, options.train)]) if options.train else None
    return partial(add_page, maker=load(folder, options.device) if folder else None, examples=examples, nearest=nearest)


def _plan(options: argparse.Namespace) -> None:
    from mmtx.files import find_shipped, shipped
    from mmtx.pipeline import read_model_config
    from mmtx.scaling import EPOCHS, RESAMPLES, fit, held_out, isoflop_plot, plans, read_runs, worth_of

    if (options.flops is None) == (options.hours is None) or (options.hours is None) != (options.rate is None):
        raise InputError("found another budget, expected --flops, or --hours with --rate")
    if options.file and not options.runs:
        raise InputError("--file: found no --runs, expected the folder of runs to plot")
    budget = options.flops or options.hours * 3600 * options.rate
    config = read_model_config(Path(find_shipped(options.model) if options.model else shipped("demos/starter")))
    runs = read_runs(options.runs) if options.runs else []
    unique = options.unique_tokens
    if repeated := [run for run in runs if unique is not None and run.tokens > unique]:
        print(f"mmtx: note: {len(repeated)} of {len(runs)} runs repeat data, {max(run.tokens for run in repeated) / unique:.1f} "
              "epochs at most: their tokens count for the new ones that they are worth", file=sys.stderr)
        runs = [run._replace(tokens=worth_of(run.tokens, unique)) for run in runs]
    law = fit(runs) if runs else None
    print(f"budget: {budget:.4g} FLOPs")
    kinds = sorted({name for run in runs for name in run.losses if all(name in each.losses for each in runs)})
    for what in kinds:
        found = law if what == "loss" else fit(runs, what)
        print(f"{what} = {found.e:.4g} + {found.a:.4g} / N^{found.alpha:.3f} + {found.b:.4g} / D^{found.beta:.3f}; 90 %: " +
              ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in found.intervals.items()))
    for what in kinds:
        try:
            run, others = held_out(runs, what, RESAMPLES)
        except InputError as error:  # enough for a fit, and too few without the largest
            print(f"mmtx: note: nothing held out: {error}", file=sys.stderr)
            break
        point, measured = (run.parameters, run.tokens), run.losses[what]
        told, (low, high) = others.loss(*point), others.interval(*point)
        print(f"held out {run.name}: {what} foretold {told:.4f} [{low:.4f}, {high:.4f}], measured {measured:.4f} "
              f"({told / measured - 1:+.1%})")
    print("| by | parameters | width x depth | tokens | steps | GB of state | " + "hours | " * bool(options.rate) + "loss |")
    print("| --- | --- | --- | --- | --- | --- | " + "--- | " * bool(options.rate) + "--- |")
    for each in plans(config, budget, options.tokens_per_batch, options.max_seq_len, law, unique):
        hours = f"{budget / options.rate / 3600:.3g} | " if options.rate else ""
        loss = "-" if each.loss is None else f"{each.loss:.3f}"
        print(f"| {each.source} | {each.cost.parameters:,} | {each.config.width} x {each.config.depth} | {each.tokens:,.0f} | "
              f"{each.steps:,} | {each.gigabytes:.3g} | {hours}{loss} |")
        if each.epochs is not None and each.epochs > EPOCHS:
            print(f"mmtx: note: {each.source}: {each.epochs:.1f} epochs of the same data are worth {each.worth:,.0f} new tokens; "
                  f"more than {EPOCHS} pay little", file=sys.stderr)
    if options.file:
        isoflop_plot(law, runs, config, options.tokens_per_batch, options.max_seq_len, budget, options.file)
        print(options.file)


def _report(options: argparse.Namespace) -> None:
    from mmtx.files import write_whole
    from mmtx.run_page import EVALUATION, run_page

    folder = Path(options.folder)
    files = {}
    if options.evaluate:
        asked = argparse.Namespace(config=str(folder / "metrics" / "config.yaml"), model=str(folder / "model"), device=options.device,
                                   trusted=False, fields=None, follow_links=False, max_bad=None, show=16)
        files[folder / EVALUATION] = "\n".join(_evaluation(asked)).strip("\n") + "\n"
    files[options.file or folder / "report.html"] = run_page(folder, files.get(folder / EVALUATION))
    for file, text in files.items():
        try:
            write_whole(file, text.encode())
        except OSError as error:
            raise InputError(f"{file}: cannot be written ({error.strerror})") from None
        print(file)
