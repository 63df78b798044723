"""`mmtx classify`: say which of some labels fits pictures and sounds best."""

import argparse

from mmtx.commands.arguments import (
    add_fields_option,
    add_model_options,
    add_precision_options,
    count,
    load_model,
    print_answers,
)


def add(commands) -> None:
    parser = commands.add_parser("classify", help="say which of some labels fits images and sounds best")
    parser.add_argument("files", nargs="+", help="image and sound files, folders of them, URLs, or manifests and tars with rows "
                        "of them, of which a row may cut a sound out of a recording")
    add_fields_option(parser)
    parser.add_argument("--candidate_labels", nargs="+", required=True, metavar="LABEL", help="the possible answers, best those that "
                        "the model was trained to give")
    parser.add_argument("--question", default=None, help="asked about each file, as in training; default: none, as in mmtx caption")
    parser.add_argument("--top", type=count(1), default=1, help="labels to print for each file, with their probabilities; default: 1")
    add_model_options(parser)
    add_precision_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from mmtx.captioning import classify_files, find_media

    files = list(find_media(options.files, fields=dict(options.fields or [])))
    answers = classify_files(load_model(options), files, options.candidate_labels, options.question, options.top)
    print_answers(options.files, files, answers)
