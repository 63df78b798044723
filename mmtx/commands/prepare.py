"""`mmtx prepare`: turn media into tokenized shards."""

import argparse
import os
import re
import shlex

from mmtx.commands.arguments import MAX_BAD_HELP, add_source_options, check_source_options, count, data_source
from mmtx.errors import InputError
from mmtx.modality.registry import MODALITIES, PLUGINS


def add(commands) -> None:
    parser = commands.add_parser("prepare", help="turn media into tokenized shards, from which the decoder trains faster",
                                 description="Turn media into tokenized shards. A source of a training configuration may "
                                 "name the output folder in place of the media. As a sample is then the same in every "
                                 "epoch, the augmentation of its kind of media must be null.")
    parser.add_argument("sources", nargs="*", help="manifests, folders, shards or Hugging Face datasets")
    parser.add_argument("--output", required=True, help="new folder, or that of an interrupted run, which then continues")
    parser.add_argument("--config", help="take the sources of data.train, the tokenizers and --features from this training "
                        "configuration; each source gets a folder of its own in --output")
    parser.add_argument("--tokenizers", nargs="+", metavar="FOLDER", help="tokenizer folders; default: those that come with mmtx")
    parser.add_argument("--features", action="store_true", help="also store the features that decoders with continuous_inputs: true "
                        "read, in float16: 16 kB per image of 64 codes with the tokenizer that comes with mmtx")
    parser.add_argument("--num_workers", type=count(1), default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                        else os.cpu_count(), help="worker processes; default: one per core")
    parser.add_argument("--rows", type=count(1), default=2048, help="rows per shard; default: 2048")
    parser.add_argument("--part", type=_part, metavar="K/N", help="make only part K of N, so that several machines can share the "
                        "work; the same command without --part joins all parts in --output and makes what is missing")
    parser.add_argument("--max_bad", type=float, help=MAX_BAD_HELP)
    add_source_options(parser)
    parser.set_defaults(run=run)


def _part(word: str) -> tuple[int, int]:
    """ "3/8" -> (3, 8)."""
    found = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", word, re.ASCII)
    if found is None or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"found {word!r}, expected K/N with K from 1 to N, as 3/8")
    return int(found[1]), int(found[2])


def run(options: argparse.Namespace) -> None:
    from dataclasses import asdict, replace

    import yaml

    from mmtx.data.collection import DataSource, read_config, require_sources
    from mmtx.data.output import check_output
    from mmtx.data.prepare import prepare
    from mmtx.data.skip_counter import MAX_BAD
    from mmtx.modality.base import Tokenizer, load_tokenizer
    from mmtx.shipped_files import find_shipped, shipped

    check_source_options(options)
    if not options.sources and not options.config:
        raise InputError("found neither sources nor --config, expected one of them")
    folders = options.tokenizers or [shipped(f"tokenizers/{kind}") for kind, modality in MODALITIES.items() if modality.shipped]
    features, sources = options.features, [data_source(options, options.sources)]
    max_bad, frozen = MAX_BAD, ""
    outputs = [options.output]
    if options.config:
        config = read_config(find_shipped(options.config))
        sources, folders = require_sources(config.train, "train"), config.tokenizers
        features, max_bad = config.continuous_inputs, config.max_bad
        # Shards hold the outputs of encoders, not the inputs of an encoder that is trained along.
        frozen = "".join(f" --model.{name} {'false' if name == 'train_encoder' else 'null'}" for name in config.encoders)
        # The same samples are prepared once, however often they are used.
        read = [repr((source.paths, source.selection, source.fields, source.follow_links, source.variants)) for source in sources]
        outputs = [check_output(options.output) / str(list(dict.fromkeys(read)).index(what)) for what in read]
        if options.trusted:
            sources = [replace(source, trusted=True) for source in sources]
    loaded: dict[str, Tokenizer] = {}
    for folder in folders:
        tokenizer = load_tokenizer(find_shipped(folder))
        if loaded.setdefault(tokenizer.kind, tokenizer) is not tokenizer:
            raise InputError(f"{folder}: found a second {tokenizer.kind} tokenizer, expected one of each kind")
    tokenizers = {kind: loaded[kind] for kind in MODALITIES if kind in loaded}
    for output in dict.fromkeys(outputs):
        facts = prepare(sources[outputs.index(output)], tokenizers, output, features=features, rows=options.rows,
                        num_workers=options.num_workers, max_bad=max_bad if options.max_bad is None else options.max_bad,
                        part=options.part)
        if options.part:
            print(f"{output}: part {options.part[0]} of {options.part[1]}: {facts['shards']:,} shards, {facts['rows']:,} rows; "
                  "the same command without --part joins the parts", flush=True)
        else:
            print(f"{output}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, {facts['shards']:,} shards, "
                  f"{facts['skipped']:,} of {facts['rows']:,} rows skipped", flush=True)
    if options.part:
        return
    default = asdict(DataSource([]))
    # The printed command is merged into the sources of the configuration: fields already applied, such as `select`, are reset.
    done_with = ("select", "split", "split_by", "fields", "follow_links", "variants")
    train = [{"paths": [str(output)], **{name: default[name] if name in done_with else value
                                         for name, value in asdict(source).items()
                                         if name not in ("paths", "trusted") and value != default[name]}}
             for source, output in zip(sources, outputs, strict=True)]
    train = yaml.safe_dump(train, default_flow_style=True, sort_keys=False, width=10**6).strip()
    plugins = "".join(f"--plugin {shlex.quote(str(path))} " for path in PLUGINS.values())
    print(f"mmtx fit {plugins}--config {shlex.quote(options.config or 'FILE')} --data.train {shlex.quote(train)} "
          "--data.image_augmentation null --data.audio_augmentation null" + frozen)
