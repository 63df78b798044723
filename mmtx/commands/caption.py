"""`mmtx caption`: caption pictures and sounds."""

import argparse

from mmtx.commands.arguments import (
    add_fields_option,
    add_model_options,
    add_precision_options,
    add_sampling_options,
    add_server_option,
    load_model,
    print_answers,
    sampling_of,
)


def add(commands) -> None:
    parser = commands.add_parser("caption", help="caption images and sounds")
    parser.add_argument("files", nargs="+", help="image and sound files, folders of them, URLs, or manifests and tars with rows "
                        "of them, of which a row may cut a sound out of a recording")
    add_fields_option(parser)
    add_server_option(parser)
    add_model_options(parser)
    add_precision_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from mmtx.captioning import caption_files, find_media

    files = list(find_media(options.files, fields=dict(options.fields or [])))
    print_answers(options.files, files, caption_files(load_model(options), files, **sampling_of(options)))
