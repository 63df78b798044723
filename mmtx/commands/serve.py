"""`mmtx serve` and `mmtx demo`: answers over HTTP, and a page to try a model with."""

import argparse
import os
from pathlib import Path

from mmtx.commands.arguments import (
    add_model_options,
    add_precision_options,
    add_source_options,
    count,
    data_source,
    load_model,
)
from mmtx.errors import InputError

# The models that are served without --model, each with the routes that it was trained for, by their last word.
SHIPPED = {"starter": ("chat", "embeddings", "transcriptions"), "generate": ("images", "speech"),
           "speech": ("chat", "transcriptions"), "prose": ("completions", "embeddings")}


def add(commands) -> None:
    for word, help in (("serve", "serve a model over HTTP for clients of OpenAI's API"),
                       ("demo", "serve a page to try a model with: files, camera, microphone")):
        serve = commands.add_parser(word, help=help, description=f"{help[0].upper()}{help[1:]}. If the environment variable "
                                    "MMTX_API_KEY is set, it is the key that requests need, except for / and /health.")
        serve.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only")
        serve.add_argument("--port", type=count(0, 65535), default=8000, help="port to listen on, 0 for any free one; default: 8000")
        serve.add_argument("--name", default=None, help="name of the model in the API; default: that of its folder, or of the "
                           "folder above if it is called model")
        for option, what, default in (("requests", "concurrent requests; others are refused with status 429", 64),
                                      ("megabytes", "size of a request in MiB", 16), ("pixels", "pixels per image", 25_000_000),
                                      ("seconds", "seconds per sound", 60), ("tokens", "tokens of prompt and answer together", 4096),
                                      ("timeout", "seconds for a request to arrive, and then for its answer", 120)):
            serve.add_argument(f"--max_{option}", type=count(1), default=default, help=f"{what}; default: {default}")
        add_model_options(serve, default=f"those that come with mmtx: {', '.join(_served(word == 'demo'))}")
        add_precision_options(serve)
        serve.add_argument("--allowed_origins", nargs="+", default=[], metavar="ORIGIN", help="origins of web pages that may call "
                           "the server, such as https://example.com; * for all; default: the server's own")
        if word == "demo":
            serve.add_argument("--generate_model", metavar="FOLDER", help="model that generates images and sounds; default: --model, "
                               "or demos/generate if --model is not given")
            serve.add_argument("--transcribe_model", metavar="FOLDER", help="model that transcribes speech; default: --model if it "
                               "was trained to, or demos/speech if --model is not given")
            serve.add_argument("--examples", nargs="*", metavar="FILE", help="images and sounds to try, files or folders; default: "
                               "six that come with mmtx")
            serve.add_argument("--train", nargs="+", default=[], metavar="SOURCE", help="training samples; those most similar to an "
                               "image or sound are shown beside its caption")
            add_source_options(serve)
        serve.set_defaults(run=run, page=word == "demo")


def run(options: argparse.Namespace) -> None:
    try:
        from mmtx.serving.app import make_app, serve
    except ImportError as error:
        raise InputError(f'serving needs {error.name}: pip install "mmtx[serve]"') from None
    from mmtx.serving.limits import LOOPBACK, Limits
    from mmtx.shipped_files import shipped

    key = _key()
    limits = Limits(**{name: getattr(options, f"max_{name}") for name in Limits.__dataclass_fields__})
    if options.model:
        models, learned = {options.name or _name(options.model): load_model(options)}, {}
    elif options.name:
        models, learned = {options.name: load_model(options)}, {options.name: SHIPPED["starter"]}
    else:
        models, learned = {name: load_model(argparse.Namespace(**{**vars(options), "model": shipped(f"demos/{name}")}))
                           for name in _served(options.page)}, SHIPPED
    app = make_app(models, limits, key, options.host in LOOPBACK, learned, options.allowed_origins)
    if options.page:
        _page(options, models)(app)
    serve(app, options.host, options.port)


def _served(page: bool) -> list[str]:
    return [name for name in SHIPPED if name != "prose" or not page]


def _name(model: str) -> str:
    """The name of a model in the API: its folder's or, for the model of a run, the run's."""
    path = Path(model).resolve()
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _key() -> str | None:
    """The key that callers need, if any. Raises InputError, without showing the key, if it is empty or no header can hold it."""
    key = os.environ.get("MMTX_API_KEY")
    if key == "":
        raise InputError("MMTX_API_KEY: found an empty key, expected a key; unset it for a server without one")
    if key and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise InputError("MMTX_API_KEY: found a key that no header can hold, expected printable ASCII without blanks around it")
    return key


def _page(options: argparse.Namespace, models):
    """A function that adds the page of `mmtx demo` to a server."""
    from functools import partial

    from mmtx.captioning import find_media
    from mmtx.pipeline import load
    from mmtx.serving.nearest import NearestNeighbours
    from mmtx.serving.page import add_page
    from mmtx.shipped_files import shipped

    def other(given: str | None, along: str):
        if given is None and options.model:
            return None
        if given is None and not options.name:
            return models[along]
        return load(given or shipped(f"demos/{along}"), options.device)

    maker, transcriber = other(options.generate_model, "generate"), other(options.transcribe_model, "speech")
    if transcriber and not transcriber.transcribes:
        raise InputError(f"--transcribe_model: found {options.transcribe_model}, which does not transcribe, expected a model "
                         "that was trained with model.ctc")
    examples: list[str] = []
    for found in find_media([str(shipped("demos/examples"))] if options.examples is None else options.examples):
        if isinstance(found, InputError):
            raise found
        if not isinstance(found, str):
            raise InputError(f"--examples: found {found.name}, a medium of a row, expected files or folders")
        examples.append(found)
    nearest = NearestNeighbours(next(iter(models.values())), [data_source(options, options.train)]) if options.train else None
    return partial(add_page, maker=maker, transcriber=transcriber, examples=examples, nearest=nearest)
