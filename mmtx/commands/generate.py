"""`mmtx generate`: answer a prompt with text, a picture or a sound."""

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


def add(commands) -> None:
    parser = commands.add_parser("generate", help="answer a prompt with text, a picture or a sound")
    parser.add_argument("parts", nargs="*", help="text, and paths of pictures and sounds, in order")
    parser.add_argument("--out", choices=tuple(MODALITIES), default="text", help="default: text")
    parser.add_argument("--file", type=user_path, help="where a picture or a sound goes; the extension chooses the format: "
                        ".png, .jpg, .webp or another that Pillow writes, .wav, .flac, .ogg, .mp3, .aiff, .au, .caf or .w64")
    parser.add_argument("--begin", metavar="FILE", help="a picture to be completed, or a sound that shall go on")
    parser.add_argument("--rows", type=count(0), help="pixel rows that are kept of that picture, default: the upper half")
    parser.add_argument("--seconds", type=float, help="the most that is added to that sound, default: 1")
    add_server_option(parser)
    add_model_options(parser, default="demos/starter for text, demos/generate for pictures and sounds, which come with mmtx")
    add_precision_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--guidance_scale", type=float, default=1.0,
                        help="strength of classifier-free guidance: how closely the answer "
                        "follows the prompt, default: 1 (off)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if not options.parts and options.begin is None:
        raise InputError("the following arguments are required: parts (see mmtx generate --help)")
    if options.out != "text" and options.file is None:
        raise InputError(f"--file is missing: where shall the {options.out} go?")
    if options.out == "text" and options.begin is not None:
        raise InputError("--begin: found --out text, expected --out image or --out audio")
    if options.out == "text" and options.file is not None:
        raise InputError("--file: found --out text, which is printed, expected --out image or --out audio")
    for name, out in (("rows", "image"), ("seconds", "audio")):
        if getattr(options, name) is not None and (options.begin is None or options.out != out):
            raise InputError(f"--{name}: found none of what it is for, expected it with --begin and --out {out}")
    if options.model is None and options.server is None and options.out in ("image", "audio"):
        from mmtx.files import shipped

        options.model = shipped("demos/generate")  # the captioning model generates neither pictures nor sounds
    model, parts = load_model(options), parts_of(options.parts)
    sampling = {**sampling_of(options), "guidance_scale": options.guidance_scale}
    if options.out == "text":
        for piece in model.stream(parts, **sampling):
            print(escape(piece, keep="\n\t"), end="", flush=True)
        print()
        return
    if options.begin is None:
        result = model.generate(parts, out=options.out, **sampling)
    elif options.out == "image":
        result = model.outpaint(options.begin, options.rows, parts, **sampling)
    elif options.out != "audio":
        raise InputError(f"--begin: found --out {options.out}, expected --out image or --out audio")
    else:
        del sampling["max_new_tokens"]  # set by --seconds
        result = model.continue_audio(options.begin, 1.0 if options.seconds is None else options.seconds, parts, **sampling)
    write_media(result, options.file)
    print(options.file)
