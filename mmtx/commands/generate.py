"""`mmtx generate`: answer a prompt with text, a picture or a sound, or go on with a text."""

import argparse

from mmtx.commands.arguments import (
    add_model_options,
    add_precision_options,
    add_sampling_options,
    add_server_option,
    count,
    load_model,
    sampling_of,
)
from mmtx.commands.media import parts_of, write_media
from mmtx.errors import InputError, escape
from mmtx.files import user_path
from mmtx.modality.registry import MODALITIES

# Of what the captioning model does not generate.
DEFAULT_MODELS = {"image": "demos/generate", "audio": "demos/generate", "document": "demos/prose"}


def add(commands) -> None:
    parser = commands.add_parser("generate", help="answer a prompt with text, an image or a sound")
    parser.add_argument("parts", nargs="*", help="text, and paths or URLs of images and sounds, in order")
    parser.add_argument("--out", choices=(*MODALITIES, "document"), default="text", help="what to answer with; document: no "
                        "answer, but what comes next after a text, as in the texts of training; default: text")
    parser.add_argument("--file", type=user_path, help="file for the image or sound; its extension selects the format: "
                        ".png, .jpg, .webp or another that Pillow writes, .wav, .flac, .ogg, .mp3, .aiff, .au, .caf or .w64")
    parser.add_argument("--begin", metavar="FILE", help="image to complete, or sound to continue")
    parser.add_argument("--rows", type=count(0), help="pixel rows to keep of the --begin image, in the tokenizer's size and a "
                        "multiple of its patch; default: the upper half")
    parser.add_argument("--seconds", type=float, help="most seconds to add to the --begin sound, instead of --max_new_tokens; "
                        "default: 1")
    add_server_option(parser)
    add_model_options(parser, default="demos/generate for an image or audio, demos/prose for a document, demos/starter for text "
                      "and with --server; all come with mmtx")
    add_precision_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--guidance_scale", type=float, default=1.0,
                        help="strength of classifier-free guidance, which makes the answer follow the prompt more closely, for "
                        "models trained with cond_drop_prob; default: 1 (off)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if not options.parts and options.begin is None:
        raise InputError("the following arguments are required: parts (see mmtx generate --help)")
    printed = options.out in ("text", "document")
    if not printed and options.file is None:
        raise InputError(f"--file: found none, expected the file to write the {options.out} to")
    if options.begin is not None and options.out not in ("image", "audio"):
        raise InputError(f"--begin: found --out {options.out}, expected --out image or --out audio")
    if printed and options.file is not None:
        raise InputError(f"--file: found --out {options.out}, which is printed, expected --out image or --out audio")
    for name, out in (("rows", "image"), ("seconds", "audio")):
        if getattr(options, name) is not None and (options.begin is None or options.out != out):
            raise InputError(f"--{name}: found without --begin or with --out {options.out}, expected --begin and --out {out}")
    if options.model is None and options.server is None and options.out in DEFAULT_MODELS:
        from mmtx.shipped_files import shipped

        options.model = shipped(DEFAULT_MODELS[options.out])
    model, parts = load_model(options), parts_of(options.parts)
    sampling = {**sampling_of(options), "guidance_scale": options.guidance_scale}
    if printed:
        for piece in model.stream(parts, options.out, **sampling):
            # A document may go on with an image or a sound.
            print(escape(piece, keep="\n\t") if isinstance(piece, str) else f"<{type(piece).__name__}>", end="", flush=True)
        print()
        return
    if options.begin is None:
        result = model.generate(parts, out=options.out, **sampling)
    elif options.out == "image":
        result = model.outpaint(options.begin, options.rows, parts, **sampling)
    else:
        del sampling["max_new_tokens"]  # set by --seconds
        result = model.continue_audio(options.begin, 1.0 if options.seconds is None else options.seconds, parts, **sampling)
    write_media(result, options.file)
    print(options.file)
