"""`mmtx tokenize` and `mmtx detokenize`: text and media to ids and back."""

import argparse
import re
import sys

from mmtx.commands.arguments import add_model_options, load_model
from mmtx.commands.media import parts_of, write_media
from mmtx.errors import InputError, escape
from mmtx.files import user_path
from mmtx.modality.registry import MODALITIES


def add(commands) -> None:
    parser = commands.add_parser("tokenize", help="print the ids of text, images and sounds")
    parser.add_argument("parts", nargs="+", help="text, and paths or URLs of images and sounds, in order")
    parser.add_argument("--format", choices=("document", "chat"), default="document", help="document, or chat: the prompt that "
                        "mmtx generate would answer, for engines that take ids; default: document")
    parser.add_argument("--out", choices=tuple(MODALITIES), default="text",
                        help="what to answer with, for --format chat; default: text")
    add_model_options(parser)
    parser.set_defaults(run=tokenize)

    parser = commands.add_parser("detokenize", help="decode ids, such as an engine's answer, to text, images and sounds")
    parser.add_argument("ids", nargs="*", metavar="ID", help="ids of an answer, of a prompt with its answer, of which only the "
                        "answer is decoded, or of a document; default: from standard input, as numbers or a JSON list")
    parser.add_argument("--output", type=user_path, metavar="FOLDER", help="folder for images and sounds, numbered as parts of the "
                        "output: 1.png, 2.wav")
    add_model_options(parser)
    parser.set_defaults(run=detokenize)


def tokenize(options: argparse.Namespace) -> None:
    model = load_model(options)
    print(*model.tokenize(parts_of(options.parts), options.format, options.out))
    if options.format == "chat":
        from mmtx.commands.export import print_limitations

        print_limitations(model)


def detokenize(options: argparse.Namespace) -> None:
    from mmtx.interop.remote import answer_in, finish

    words = options.ids or re.sub(r"[\[\],]", " ", sys.stdin.read()).split()
    ids = []
    for word in words:
        try:
            ids.append(int(word))
        except ValueError:
            raise InputError(f"ids: found {word!r:.40}, expected whole numbers") from None
    model = load_model(options)
    parts = model.processor.to_media(finish(answer_in(ids, model.vocabulary), model.vocabulary))
    media = [part for part in parts if not isinstance(part, str)]
    if media and options.output is None:
        raise InputError("--output: found none, expected a folder for images and sounds")
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output {options.output}: no folder can be made there ({error.strerror})") from None
    for number, part in enumerate(parts, 1):
        if isinstance(part, str):
            print(escape(part, keep="\n\t"))
            continue
        ending = "png" if hasattr(part, "getpixel") else "wav" if hasattr(part, "rate") else "npy"
        file = options.output / f"{number}.{ending}"
        write_media(part, file, "--output")
        print(file)
