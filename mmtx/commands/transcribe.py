"""`mmtx transcribe`: transcribe the speech in sounds."""

import argparse

from mmtx.commands.arguments import add_fields_option, add_model_options, add_precision_options, load_model, print_answers

MODEL = "demos/speech"


def add(commands) -> None:
    parser = commands.add_parser("transcribe", help="transcribe speech")
    parser.add_argument("files", nargs="+", help="sound files, folders of them, URLs, or manifests and tars with rows "
                        "of them, of which a row may cut a sound out of a recording")
    add_fields_option(parser)
    parser.add_argument("--chunk_length_s", type=float, default=None, help="cut longer sounds at pauses into chunks of at most this "
                        "many seconds; best is the length of most training sounds; default: 3.5")
    add_model_options(parser, default=f"{MODEL}, which comes with mmtx")
    add_precision_options(parser, load_in_8bit=False)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from mmtx.captioning import find_media, transcribe_files
    from mmtx.shipped_files import shipped

    options.model = options.model or shipped(MODEL)
    files = list(find_media(options.files, "audio", fields=dict(options.fields or [])))
    given = {} if options.chunk_length_s is None else {"chunk_length_s": options.chunk_length_s}
    print_answers(options.files, files, transcribe_files(load_model(options), files, **given))
