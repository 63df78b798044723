"""`mmtx caption`: say what pictures and sounds are."""

import argparse
import sys

from mmtx.commands.arguments import (
    add_8bit_option,
    add_model_options,
    add_sampling_options,
    add_server_option,
    load_model,
    sampling_of,
    tell,
)
from mmtx.errors import escape


def add(commands) -> None:
    parser = commands.add_parser("caption", help="say what pictures and sounds are")
    parser.add_argument("files", nargs="+", help="files, folders or URLs of files")
    add_server_option(parser)
    add_model_options(parser)
    add_8bit_option(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from mmtx.captioning import caption_files, find_media
    from mmtx.data.storage import display

    files = list(find_media(options.files))
    alone, done, failed = len(files) == 1 and files == options.files, 0, 0
    for name, caption, error in caption_files(load_model(options), files, **sampling_of(options)):
        if error is None:
            done += 1
            print(escape(caption) if alone else f"{display(name)}\t{escape(caption)}", flush=True)
        else:
            failed += 1
            tell(error)
    if failed:
        sys.exit(1 if done else 2)
