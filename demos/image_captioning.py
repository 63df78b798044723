"""Caption pictures: on the terminal, or on a web page.

    python demos/image_captioning.py                                   # a page: files, camera, examples (needs mmtx[serve])
    python demos/image_captioning.py cat.png photos/                   # one line per picture
    python demos/image_captioning.py cat.png --attention read.png      # and what each word attends to (needs mmtx[plot])

`demos/caption.py` writes pictures and sounds with their captions as one HTML page.
"""

import argparse
import sys

import mmtx
from mmtx.cli import main as command


def main() -> None:
    parser = argparse.ArgumentParser(description="Say what pictures show.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="files, folders or URLs of pictures; none: open the page")
    parser.add_argument("--model", help="model folder, default: the one that comes with mmtx")
    parser.add_argument("--attention", metavar="FILE", help="write what each word of the last caption read of its picture")
    options = parser.parse_args()
    if not options.files:
        return command(["demo", *(["--model", options.model] if options.model else [])])

    status, last = 0, None
    try:
        model = mmtx.load(options.model)
        files = list(mmtx.find_media(options.files, "image"))
        for name, caption, error in mmtx.caption_files(model, files):
            if error is not None:
                print(f"error: {error}", file=sys.stderr)
                status = 1
            else:
                print(f"{mmtx.display(name)}\t{mmtx.escape(caption)}", flush=True)
                last = name, caption
        if options.attention and last:
            model.attention([mmtx.Image(last[0])], last[1]).plot(options.attention, rollout=True)
    except mmtx.InputError as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    main()
