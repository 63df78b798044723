"""`mmtx inspect`: show documents as coloured ids, and which ids are trained."""

import argparse
import os
import sys

from mmtx.commands.arguments import add_model_options, add_source_options, count, data_source, load_model
from mmtx.errors import InputError
from mmtx.modality.registry import MODALITIES


def add(commands) -> None:
    parser = commands.add_parser("inspect", help="print documents as coloured ids, and mark those that are trained on")
    parser.add_argument("sources", nargs="+", help="manifests, folders, shards or Hugging Face datasets")
    parser.add_argument("--rows", type=count(1), default=1, help="documents to print per source; default: 1")
    add_model_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from mmtx.data.collection import to_stderr
    from mmtx.data.skip_counter import SkipCounter
    from mmtx.data.sources import scan
    from mmtx.data.tokens import usable
    from mmtx.sequence import render

    model = load_model(options)
    colours = {"special": "90", **{kind: modality.colour for kind, modality in MODALITIES.items()}}
    v, coloured = model.vocabulary, sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))

    def paint(text: str, kind: str, trained: bool) -> str:
        if not coloured:
            return f"{text}*" if trained else text
        return f"\033[{colours[kind]}{';1;4' if trained else ''}m{text}\033[0m"

    legend = ", ".join(paint(kind, kind, False) for kind in colours)
    legend += f"; trained ids are {'underlined' if coloured else 'marked *'}\n"
    reading = data_source(options, options.sources)
    for source in reading.paths:
        skipped, left = SkipCounter(1.0), options.rows  # a share of a few rows means nothing, so bad rows are only reported
        for row in scan(source, options.trusted, reading.fields, options.follow_links, to_stderr):
            if not left:
                break
            skipped.rows += 1
            if isinstance(row, InputError):
                skipped.skip(row)
                continue
            found = usable(row.pair, model.tokenizers, skipped, patches=model.decoder.config.encoders)
            left -= bool(found)
            for sample, document in found:
                rendered = render(document, v)
                rejected = ", rejected" if sample.turns == row.rejected else ""
                print(f"{legend}\n{sample.where}{rejected}: {len(rendered.ids)} ids, {int(rendered.loss_mask.sum())} trained")
                legend = ""
                words = []
                for ident, trained in zip(rendered.ids.tolist(), rendered.loss_mask.tolist(), strict=True):
                    kind = v.kind(ident)
                    word = {"special": v.name, "text": model.tokenizers["text"].piece}.get(kind, str)(ident)
                    words.append(paint(word, kind, trained))
                print(" ".join(words))
        if skipped.rows and skipped.count == skipped.rows:
            raise InputError(f"no sample can be used: {skipped.summary()}")
        skipped.finish(to_stderr)
