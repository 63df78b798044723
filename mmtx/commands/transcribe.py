"""`mmtx transcribe`: write down what is said in sounds."""

import argparse

from mmtx.commands.arguments import add_model_options, load_model, print_answers

MODEL = "demos/speech"


def add(commands) -> None:
    parser = commands.add_parser("transcribe", help="write down what is said in sounds")
    parser.add_argument("files", nargs="+", help="files, folders or URLs of files")
    add_model_options(parser, default=f"{MODEL}, which comes with mmtx")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from mmtx.captioning import find_media, transcribe_files
    from mmtx.files import shipped

    options.model = options.model or shipped(MODEL)
    files = list(find_media(options.files, "audio"))
    print_answers(options.files, files, transcribe_files(load_model(options), files))
