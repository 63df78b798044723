"""`mmtx transcribe`: transcribe the speech in sounds."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mmtx.commands.arguments import add_fields_option, add_model_options, add_precision_options, load_model, print_answers
from mmtx.errors import InputError
from mmtx.files import write_file
from mmtx.subtitles import FORMATS

if TYPE_CHECKING:
    from mmtx.captioning import Captioned

MODEL = "demos/speech"
CAPTIONS = ("txt", "json")  # of files beside a sound from which models are trained


def add(commands) -> None:
    parser = commands.add_parser("transcribe", help="transcribe speech")
    parser.add_argument("files", nargs="+", help="sound files, videos, folders of sounds, URLs, or manifests and tars with rows "
                        "of them, of which a row may cut a sound out of a recording")
    add_fields_option(parser)
    parser.add_argument("--chunk_length_s", type=float, default=None, help="cut longer sounds at pauses into chunks of at most this "
                        "many seconds; best is the length of most training sounds; default: 3.5")
    parser.add_argument("--output_dir", type=Path, metavar="FOLDER", help="also write the transcript of each file there, under the "
                        "file's name")
    parser.add_argument("--output_format", choices=FORMATS, default=None, help="with --output_dir: subtitles (srt, vtt), "
                        "a JSON object with the begin and end of each chunk in seconds, or plain text; default: srt")
    add_model_options(parser, default=f"{MODEL}, which comes with mmtx")
    add_precision_options(parser, load_in_8bit=False)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from mmtx.captioning import find_media, transcribe_files
    from mmtx.data.collection import quiet_in_logs
    from mmtx.shipped_files import shipped

    options.model = options.model or shipped(MODEL)
    files = list(find_media(options.files, "audio", fields=dict(options.fields or [])))
    if options.output_format and options.output_dir is None:
        raise InputError(f"--output_format: found {options.output_format} without --output_dir, expected both")
    form = options.output_format or "srt"
    paths = None if options.output_dir is None else _paths(files, options.output_dir, form)
    given = {} if options.chunk_length_s is None else {"chunk_length_s": options.chunk_length_s}
    model = load_model(options)
    with tqdm(desc="seconds of speech", unit="s", unit_scale=True, leave=False, **quiet_in_logs()) as bar:
        answers = transcribe_files(model, files, return_timestamps=True, progress=bar.update, **given)
        print_answers(options.files, files, _written(answers, paths, form, bar))


def _paths(files: Iterable, folder: Path, suffix: str) -> dict[str, Path]:
    """Where the transcript of each file goes. Raises InputError, before any work, if there is no such place for one."""
    from mmtx.data.storage import display
    from mmtx.data.urls import is_url

    paths: dict[str, Path] = {}
    for file in files:
        if isinstance(file, InputError):
            continue
        if not isinstance(file, str):
            raise InputError(f"--output_dir: found {file.name}, a sound of a row, expected files, after which transcripts are named")
        path = folder / f"{PurePosixPath(urlsplit(file).path if is_url(file) else file).stem}.{suffix}"
        if (other := next((name for name, taken in paths.items() if taken == path), None)) not in (None, file):
            raise InputError(f"--output_dir: found {display(other)} and {display(file)}, whose transcripts would both be {path}; "
                             "expected files of different names")
        beside = not is_url(file) and Path(file).resolve().parent == folder.resolve()
        if beside and suffix in CAPTIONS and path.exists():
            raise InputError(f"--output_dir: found {path} beside {display(file)}, which may be its caption; expected another folder")
        paths[file] = path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from None
    return paths


def _written(answers: "Iterable[Captioned]", paths: dict[str, Path] | None, format: str, bar) -> "Iterator[Captioned]":
    """The answers with their texts alone; their transcripts are written."""
    for answer in answers:
        if answer.error is None:
            if paths is not None:
                write_file(paths[answer.name], FORMATS[format](answer.caption).encode())
            answer = answer._replace(caption=answer.caption["text"])
        bar.clear()  # of the terminal's line, on which the answer is printed
        yield answer
