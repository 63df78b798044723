"""`mmtx evaluate`: caption held-out samples and compare with the true captions."""

import argparse
from collections.abc import Iterator

from mmtx.commands.arguments import (
    MAX_BAD_HELP,
    add_model_options,
    add_precision_options,
    add_source_options,
    check_source_options,
    count,
    data_source,
    load_model,
)
from mmtx.commands.transcribe import MODEL
from mmtx.errors import InputError


def add(commands) -> None:
    parser = commands.add_parser("evaluate", help="caption held-out samples and compare them with the true captions")
    parser.add_argument("sources", nargs="*", help="held-out manifests, folders, shards or Hugging Face datasets")
    parser.add_argument("--train", nargs="+", default=[], metavar="SOURCE",
                        help="training samples, for nearest-neighbour controls, and for the fields that --reader can tell "
                             "only with them")
    parser.add_argument("--config", help="take sources and --train from data.validation and data.train of this training "
                        "configuration (those with task: caption)")
    parser.add_argument("--reader", default=None, metavar="FILE:FUNCTION", help="function in a Python file that splits captions "
                        "into fields, each of which is scored; with --config, set it as `reader` of a source there")
    parser.add_argument("--variants", default=None, metavar="FILE:FUNCTION",
                        help="function in a Python file that returns the samples to use in place of each sample, held out or of "
                        "--train, such as other questions; with --config, set it as `variants` of a source there")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--transcribe", action="store_true",
                         help="transcribe sounds, as mmtx transcribe does, instead of captioning them")
    instead.add_argument("--closed_set", action="store_true", help="choose each answer among the captions of the same source, as "
                         "mmtx classify does, instead of generating it")
    parser.add_argument("--per_class", action="store_true", help="also show for each caption, or each value of a field of --reader, "
                        "how many answers are right, and which mistake is the most frequent")
    parser.add_argument("--max_bad", type=float, help=MAX_BAD_HELP)
    parser.add_argument("--show", type=count(0), default=8, help="examples to print per source; default: 8")
    add_model_options(parser, default=f"demos/starter, or {MODEL} with --transcribe; both come with mmtx")
    add_precision_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    for section in evaluation(options):
        print(section, flush=True)


def evaluation(options: argparse.Namespace) -> Iterator[str]:
    from dataclasses import replace

    from mmtx.data.collection import read_config
    from mmtx.data.patterns import expand
    from mmtx.data.skip_counter import MAX_BAD
    from mmtx.data.sources import is_prepared
    from mmtx.data.storage import display
    from mmtx.report import report
    from mmtx.shipped_files import find_shipped, shipped

    check_source_options(options)
    if options.transcribe:
        options.model = options.model or shipped(MODEL)
    if options.config:
        config = read_config(find_shipped(options.config))
        train, held_out = ([source for source in sources if source.task == "caption"]
                           for sources in (config.train, config.validation))
        if not held_out:
            raise InputError(f"{options.config}: found no source to caption in data.validation, expected one with task: caption")
        max_bad = config.max_bad
        prepared = [source for source in train if any(is_prepared(path) for pattern in source.paths for path in expand(pattern))]
        train = [source for source in train if source not in prepared]
        yield from (f"left out of the control: {display(path)} (shards of mmtx prepare, which hold no media to compare with)"
                    for source in prepared for path in source.paths)
        if options.trusted:
            train, held_out = ([replace(source, trusted=True) for source in sources] for sources in (train, held_out))
    elif options.sources:
        max_bad = MAX_BAD
        train = [replace(data_source(options, options.train), variants=options.variants)] if options.train else []
        held_out = [replace(data_source(options, [source]), reader=options.reader, variants=options.variants)
                    for source in options.sources]
    else:
        raise InputError("found neither held-out sources nor --config, expected one of them")
    if options.max_bad is not None:
        max_bad = options.max_bad
    yield from report(load_model(options), held_out, train, options.show, max_bad, options.transcribe, options.closed_set,
                      options.per_class)
