"""`mmtx export`: write a model for transformers, vLLM or llama.cpp."""

import argparse
import sys

from mmtx.commands.arguments import add_model_options, count, load_model


def add(commands) -> None:
    parser = commands.add_parser("export", help="write a model for transformers, vLLM or llama.cpp")
    parser.add_argument("--to", choices=("transformers", "gguf"), required=True,
                        help="format: a folder for transformers or vLLM, or a GGUF file for llama.cpp")
    parser.add_argument("--output", required=True, help="folder or, for gguf, file to write, which must not exist")
    parser.add_argument("--max_seq_len", type=count(1, 2**24), default=8192,
                        help="context length in tokens, for which engines allocate memory; default: 8192")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from mmtx.interop.export import export

    model = load_model(options)
    export(model, options.to, options.output, options.max_seq_len)
    print_limitations(model)
    print(options.output)


def print_limitations(model) -> None:
    from mmtx.interop.export import limitations

    for sentence in limitations(model):
        print(f"mmtx: note: {sentence}", file=sys.stderr)
