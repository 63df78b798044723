"""The command `mmtx`. Each subcommand imports what it needs, so that `mmtx --help` answers at once."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mmtx.errors import InputError

DESCRIPTION = "One model for text, pictures and sound: train it, ask it, look inside."
COLOURS = {"special": "90", "text": "32", "image": "34", "audio": "35"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line. A user's mistake ends with one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["fit"]:
            from mmtx.training.run import fit

            fit(arguments[1:])
            return
        options = _parser().parse_args(arguments)
        options.run(options)
    except InputError as error:
        print(f"mmtx: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mmtx: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) has gone: what Python still holds for it must not become an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class Parser(argparse.ArgumentParser):
    """Tells mistakes in the arguments as any other mistake of the user."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("mmtx", description=DESCRIPTION)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    commands.add_parser("fit", help="train a tokenizer or the decoder: mmtx fit --config FILE --output FOLDER",
                        add_help=False)

    caption = commands.add_parser("caption", help="say what pictures and sounds are")
    caption.add_argument("files", nargs="+", help="files, folders or URLs of files")
    _model_options(caption)
    _sampling_options(caption)
    caption.set_defaults(run=_caption)

    generate = commands.add_parser("generate", help="answer a prompt with text, a picture or a sound")
    generate.add_argument("parts", nargs="*", help="text, and paths of pictures and sounds, in order")
    generate.add_argument("--out", choices=("text", "image", "audio"), default="text", help="default: text")
    generate.add_argument("--file", type=Path, help="where a picture or a sound goes, e.g. out.png, out.wav")
    generate.add_argument("--begin", metavar="FILE", help="a picture to be completed, or a sound that shall go on")
    generate.add_argument("--rows", type=int, help="pixel rows that are kept of that picture, default: the upper half")
    generate.add_argument("--seconds", type=float, default=1.0, help="the most that is added to that sound, default: 1")
    _model_options(generate)
    _sampling_options(generate)
    generate.add_argument("--guidance", type=float, default=1.0, help="how much the prompt counts, default: 1 (not more)")
    generate.set_defaults(run=_generate)

    tokenize = commands.add_parser("tokenize", help="print the ids of text, pictures and sounds")
    tokenize.add_argument("parts", nargs="+", help="text, and paths of pictures and sounds, in order")
    _model_options(tokenize)
    tokenize.set_defaults(run=_tokenize)

    inspect = commands.add_parser("inspect", help="show documents as coloured ids, and which of them train")
    inspect.add_argument("sources", nargs="+", help="manifests, folders or shards")
    inspect.add_argument("--rows", type=int, default=1, help="documents to show, default: 1")
    _model_options(inspect)
    inspect.set_defaults(run=_inspect)

    prepare = commands.add_parser("prepare", help="turn media into tokenized shards, from which the decoder trains faster",
                                  description="Turn media into tokenized shards. A source of a training configuration may "
                                  "name the folder in place of the media; every view of a sample is then the same, so "
                                  "the augmentation of a prepared medium must be null.")
    prepare.add_argument("sources", nargs="*", help="manifests, folders, shards or Hugging Face datasets")
    prepare.add_argument("--output", required=True, help="a new folder, or one of a run that did not end")
    prepare.add_argument("--config", help="take sources, tokenizers and --features from this training configuration; each "
                                          "source gets a folder of its own in --output")
    prepare.add_argument("--tokenizers", nargs="+", metavar="FOLDER", help="default: those that come with mmtx",
                         default=["tokenizers/text", "tokenizers/image", "tokenizers/audio"])
    prepare.add_argument("--features", action="store_true", help="also store what decoders with continuous: true take, 2 "
                         "bytes a number: 16 kB a picture of 64 codes with the tokenizer that comes with mmtx")
    prepare.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                         else os.cpu_count(), help="processes, default: one a core")
    prepare.add_argument("--rows", type=int, default=2048, help="rows of a shard, default: 2048")
    prepare.add_argument("--max-bad", type=float, default=0.01, help="share of rows that may be unusable, default: 0.01")
    prepare.set_defaults(run=_prepare)

    evaluate = commands.add_parser("evaluate", help="caption held-out samples and compare with the true captions")
    evaluate.add_argument("sources", nargs="*", help="held-out manifests, folders or shards")
    evaluate.add_argument("--train", nargs="+", default=[], metavar="SOURCE",
                          help="training samples, for the nearest-neighbour control")
    evaluate.add_argument("--config", help="take both from the data of this training configuration")
    evaluate.add_argument("--show", type=int, default=8, help="examples to print, default: 8")
    _model_options(evaluate)
    evaluate.set_defaults(run=_evaluate)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=None, help="model folder, default: the one that comes with mmtx")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default: the GPU if there is one")


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the best id")
    parser.add_argument("--top-k", type=int, default=None, help="sample from the best K ids")
    parser.add_argument("--top-p", type=float, default=None, help="sample from the ids that hold this probability")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")
    parser.add_argument("--seed", type=int, default=None, help="fixes the random choices")


def _load(options: argparse.Namespace):
    from mmtx.pipeline import DEFAULT_MODEL, load

    return load(options.model or DEFAULT_MODEL, options.device)


def _sampling(options: argparse.Namespace) -> dict:
    names = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")
    return {name: getattr(options, name) for name in names}


def media_files(names: Sequence[str]) -> list[str]:
    """Files, URLs, and all pictures and sounds in folders. Raises InputError on a missing or empty one."""
    from mmtx.data.sample import kind_of
    from mmtx.data.storage import is_url

    found = []
    for name in names:
        if is_url(name) or Path(name).is_file():
            found.append(name)
        elif Path(name).is_dir():
            inside = sorted(str(path) for path in Path(name).rglob("*") if path.is_file() and kind_of(path.name))
            if not inside:
                raise InputError(f"{name}: found no pictures or sounds in this folder")
            found += inside
        else:
            raise InputError(f"{name}: no such file or folder")
    return found


def _parts(names: Sequence[str]) -> list:
    """Words of the command line: existing files and URLs are media, the rest is text."""
    from mmtx.data.sample import kind_of
    from mmtx.data.storage import is_url

    def part(name: str):
        if is_url(name) or Path(name).is_file():
            return Path(name) if not is_url(name) else _marked(name)
        if kind_of(name):
            raise InputError(f"{name}: no such file")
        return name

    def _marked(url: str):
        from mmtx.pipeline import Audio, Image

        return Audio(url) if kind_of(url) == "audio" else Image(url)

    return [part(name) for name in names]


def _caption(options: argparse.Namespace) -> None:
    files = media_files(options.files)
    for file, caption in zip(files, _load(options).caption(files, **_sampling(options)), strict=True):
        print(f"{file}\t{caption}" if len(files) > 1 else caption)


def _generate(options: argparse.Namespace) -> None:
    if not options.parts and options.begin is None:
        raise InputError("the following arguments are required: parts (see mmtx generate --help)")
    if options.out != "text" and options.file is None:
        raise InputError(f"--file is missing: where shall the {options.out} go?")
    if options.out == "text" and options.begin is not None:
        raise InputError("--begin: found --out text, expected --out image or --out audio")
    model, parts, sampling = _load(options), _parts(options.parts), {**_sampling(options), "guidance": options.guidance}
    if options.out == "text":
        for piece in model.stream(parts, **sampling):
            print(piece, end="", flush=True)
        print()
        return
    if options.begin is None:
        result = model.generate(parts, out=options.out, **sampling)
    elif options.out == "image":
        result = model.complete(options.begin, options.rows, parts, **sampling)
    else:
        del sampling["max_new_tokens"]  # --seconds say it
        result = model.extend(options.begin, options.seconds, parts, **sampling)
    try:
        result.save(options.file)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"--file {options.file}: cannot be written ({error})") from None
    print(options.file)


def _tokenize(options: argparse.Namespace) -> None:
    print(*_load(options).tokenize(_parts(options.parts)))


def _inspect(options: argparse.Namespace) -> None:
    from itertools import islice

    from mmtx.data.sources import open_source
    from mmtx.data.tokens import to_documents
    from mmtx.sequence import render

    model = _load(options)
    v, coloured = model.vocabulary, sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))

    def paint(text: str, kind: str, trained: bool) -> str:
        if not coloured:
            return f"{text}*" if trained else text
        return f"\033[{COLOURS[kind]}{';1;4' if trained else ''}m{text}\033[0m"

    legend = ", ".join(paint(kind, kind, False) for kind in COLOURS)
    legend += f"; trained ids are {'underlined' if coloured else 'marked *'}\n"
    for source in options.sources:
        for sample in islice(open_source(source), options.rows):
            rendered = render(to_documents([sample], model.tokenizers)[0], v)
            print(f"{legend}\n{sample.where}: {len(rendered.ids)} ids, {int(rendered.trained.sum())} trained")
            legend = ""
            words = []
            for ident, trained in zip(rendered.ids.tolist(), rendered.trained.tolist(), strict=True):
                kind = v.kind(ident)
                word = {"special": v.name, "text": model.tokenizers["text"].piece}.get(kind, str)(ident)
                words.append(paint(word, kind, trained))
            print(" ".join(words))


def _prepare(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    import yaml

    from mmtx.data.collection import DataSource, read_config
    from mmtx.data.output import check_output
    from mmtx.data.prepare import prepare
    from mmtx.modality.base import load_tokenizer
    from mmtx.files import find_shipped
    from mmtx.vocabulary import KINDS

    if bool(options.sources) == bool(options.config):
        raise InputError("found both sources and --config, expected one of them" if options.config
                         else "found neither sources nor --config, expected one of them")
    folders, features, sources = options.tokenizers, options.features, [DataSource(options.sources)]
    outputs = [options.output]
    if options.config:
        config = read_config(find_shipped(options.config))
        sources, folders, features = config.train, config.tokenizers, config.continuous
        # The same samples are prepared once, however often they are used.
        distinct = {repr((source.paths, source.select)): source for source in sources}
        outputs = [check_output(options.output) / str(list(distinct).index(repr((s.paths, s.select)))) for s in sources]
    loaded = {tokenizer.kind: tokenizer for tokenizer in (load_tokenizer(find_shipped(folder)) for folder in folders)}
    tokenizers = {kind: loaded[kind] for kind in KINDS if kind in loaded}
    done = set()
    for source, output in zip(sources, outputs, strict=True):
        if output not in done:
            facts = prepare(source, tokenizers, output, features=features, rows=options.rows, workers=options.workers,
                            max_bad=options.max_bad)
            print(f"{output}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, {facts['shards']:,} shards, "
                  f"{facts['skipped']:,} of {facts['rows']:,} rows skipped", flush=True)
        done.add(output)
    default = asdict(DataSource([]))
    # The command line goes on from each source of the configuration: a `select` that has done its work must be undone.
    train = [{"paths": [str(output)], **{name: None if name == "select" else value
                                         for name, value in asdict(source).items()
                                         if name != "paths" and value != default[name]}}
             for source, output in zip(sources, outputs, strict=True)]
    train = yaml.safe_dump(train, default_flow_style=True, sort_keys=False, width=10**6).strip()
    print(f"mmtx fit --config {options.config or 'FILE'} --data.train '{train}' "
          "--data.image_augmentation null --data.audio_augmentation null")


def _evaluate(options: argparse.Namespace) -> None:
    from mmtx.data.collection import DataSource, read_config
    from mmtx.report import report

    if options.config:
        config = read_config(options.config)
        train, held_out = ([source for source in sources if source.task == "caption"]
                           for sources in (config.train, config.validation))
    else:
        train, held_out = [DataSource(options.train)] if options.train else [], [DataSource([s]) for s in options.sources]
    if not held_out:
        raise InputError("found neither held-out sources nor --config, expected one of them")
    for section in report(_load(options), held_out, train, options.show):
        print(section, flush=True)
