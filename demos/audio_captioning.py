"""Caption sounds: on the terminal, or on a web page.

    python demos/audio_captioning.py                                   # a page: files, microphone, examples (needs mmtx[serve])
    python demos/audio_captioning.py trumpet.wav recordings/           # one line per sound
    python demos/audio_captioning.py speech.wav --every 2              # one line per two seconds

`demos/caption.py` writes pictures and sounds with their captions as one HTML page.
"""

import argparse
import sys

import mmtx
from mmtx.cli import main as command
from mmtx.data.media import load_audio


def main() -> None:
    parser = argparse.ArgumentParser(description="Say what sounds are.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="files, folders or URLs of sounds; none: open the page")
    parser.add_argument("--model", help="model folder, default: the one that comes with mmtx")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="caption pieces of this length; default: whole sounds")
    options = parser.parse_args()
    if options.every is not None and not 0.1 <= options.every <= 600:
        parser.error(f"--every: found {options.every:g}, expected 0.1 to 600 seconds")
    if not options.files:
        return command(["demo", *(["--model", options.model] if options.model else [])])

    status = 0
    try:
        model = mmtx.load(options.model)
        files = list(mmtx.find_media(options.files, "audio"))
        found = mmtx.caption_files(model, files) if options.every is None else pieces(model, files, options.every)
        for name, caption, error in found:
            if error is not None:
                print(f"error: {error}", file=sys.stderr)
                status = 1
            else:
                print(f"{mmtx.display(name)}\t{mmtx.escape(caption)}", flush=True)
    except mmtx.InputError as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


def pieces(model: mmtx.Model, files: list, seconds: float):
    """Caption sounds piece by piece -> name and start of each piece in seconds, its caption, or the error of the file."""
    rate = model.tokenizers["audio"].rate
    for file in files:
        try:
            if isinstance(file, mmtx.InputError):
                raise file
            parts = load_audio(file, rate).split(round(seconds * rate))
            captions = model.caption([mmtx.Audio(part) for part in parts])
        except mmtx.InputError as error:
            yield str(file), None, error
        else:
            yield from ((f"{file} {seconds * n:g}s", caption, None) for n, caption in enumerate(captions))


if __name__ == "__main__":
    main()
