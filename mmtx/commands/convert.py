"""`mmtx convert`: make a model from a pretrained language model."""

import argparse


def add(commands) -> None:
    parser = commands.add_parser("convert", help="make a model folder from a pretrained language model: Llama, Qwen2 or Qwen3")
    parser.add_argument("--from", dest="source", required=True, metavar="FOLDER|FILE.gguf|NAME",
                        help="a transformers folder, a GGUF file, or user/model on the Hugging Face hub")
    parser.add_argument("--output", required=True, help="model folder to write")
    parser.add_argument("--image", metavar="TOKENIZER", help="folder of an image tokenizer, whose codes get ids; default: no images")
    parser.add_argument("--audio", metavar="TOKENIZER", help="folder of an audio tokenizer, whose codes get ids; default: no sounds")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from mmtx.interop.convert import convert
    from mmtx.saved_folder import check_target

    check_target(options.output)  # before anything is fetched
    media = {kind: folder for kind in ("image", "audio") if (folder := getattr(options, kind)) is not None}
    model = convert(options.source, media)
    model.save(options.output)
    v = model.vocabulary
    turns = "its chat template" if v.chat_format is not None else "the tags of the stream (it has no chat template)"
    told = ", ".join(f"{kind} {len(v.range(kind)):,}" for kind in ("text", "special", *v.kinds[1:]))
    print(f"{options.output}: {sum(p.numel() for p in model.decoder.parameters()):,} parameters; ids: {told}; turns by {turns}")
