"""Caption pictures and sounds: on the terminal, and on an HTML page.

    python demos/caption.py cat.png trumpet.wav folder/ https://example.org/dog.jpg --page captions.html

The page is one self-contained file with pictures, sounds and spectrograms. A file that cannot be captioned is reported in
one line on stderr, and the others continue; the exit status is then 1.
"""

import argparse
import base64
import html
import io
import os
import sys
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageOps

import mmtx

INLINE = 1_000_000      # bytes; larger files are downscaled or cut for the page
SIDE = 640              # pixels: longest side of a downscaled picture
EXCERPT = 20            # seconds of a long sound that the page plays
COLUMNS, ROWS = 480, 112  # pixels of a spectrogram
TONES = (60, 8000)      # Hz: its lowest and highest row
DEPTH = 70              # dB between its brightest and darkest colour
COLOURS = np.array([(12, 10, 35), (74, 28, 110), (168, 50, 108), (240, 110, 70), (252, 220, 150)])  # quiet to loud
# Formats that browsers show or play; anything else is converted.
PICTURES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp"}
SOUNDS = {"OGG": "audio/ogg", "WAV": "audio/wav", "WAVEX": "audio/wav", "FLAC": "audio/flac", "MP3": "audio/mpeg",
          "MPEG": "audio/mpeg"}
FAVICON = ("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E"
           "%3Ccircle cx='4' cy='4' r='3' fill='%234a63c8'/%3E%3C/svg%3E")

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Captions</title>
<link rel="icon" href="{icon}">
<style>
:root {{ color-scheme: light dark; --page: #f4f4f1; --card: #fff; --ink: #1c1c22; --faint: #6d6d78; --line: #e2e2dc;
  --wrong: #b3261e; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #15151a; --card: #202027; --ink: #ececf1; --faint: #9a9aa6;
  --line: #33333d; --wrong: #ff8a80; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 78rem; padding: 2rem 1.5rem 3rem; background: var(--page); color: var(--ink);
  font: 16px/1.4 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }}
h1 {{ margin: 0; font-size: 1.6rem; }}
header p, figcaption small, li {{ color: var(--faint); font-size: .85rem; }}
header p {{ margin: .2rem 0 1.6rem; }}
h2 {{ margin: 1.8rem 0 .8rem; font-size: 1.05rem; }}
section {{ display: grid; gap: 1rem; }}
.pictures {{ grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }}
.sounds {{ grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }}
figure {{ margin: 0; display: flex; flex-direction: column; overflow: hidden; background: var(--card);
  border: 1px solid var(--line); border-radius: .7rem; }}
.pictures img {{ width: 100%; height: 10.5rem; padding: .8rem; object-fit: contain; background: #fff; }}
.sounds img {{ width: 100%; height: 7rem; background: #0c0a23; }}
audio {{ width: calc(100% - 1.2rem); height: 2.4rem; margin: .6rem .6rem 0; }}
figcaption {{ padding: .6rem .8rem .7rem; border-top: 1px solid var(--line); flex: 1; }}
.sounds figcaption {{ border: 0; }}
figcaption b, figcaption small {{ display: -webkit-box; -webkit-box-orient: vertical; overflow: hidden;
  overflow-wrap: anywhere; }}
figcaption b {{ -webkit-line-clamp: 5; }}
figcaption small {{ -webkit-line-clamp: 2; margin-top: .15rem; }}
li {{ margin: .2rem 0; color: var(--wrong); overflow-wrap: anywhere; }}
</style>
</head>
<body>
<header>
<h1>Captions</h1>
<p>{summary}</p>
</header>
{body}
</body>
</html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Caption pictures and sounds.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="files, folders or URLs of files")
    parser.add_argument("--model", help="model folder, default: the one that comes with mmtx")
    parser.add_argument("--page", type=Path, default=Path("captions.html"), help="default: captions.html")
    options = parser.parse_args()
    if options.page.is_dir() or not options.page.absolute().parent.is_dir():
        parser.error(f"--page {options.page}: cannot be written, expected a file in a folder that exists")
    try:
        model = mmtx.load(options.model) if options.model else mmtx.load()
    except mmtx.InputError as error:
        sys.exit(f"error: {error}")

    page = Page(by=f"model {html.escape(options.model)}" if options.model else "the model that comes with mmtx")
    try:
        for name, caption, error in mmtx.caption_files(model, mmtx.find_media(options.files)):
            if error is not None:
                page.report(str(error))
                continue
            print(f"{mmtx.display(name)}\t{mmtx.escape(caption)}", flush=True)
            page.add(name, caption)
    except KeyboardInterrupt:
        page.report("interrupted: the files that follow have no captions")
    finally:  # write the captions so far, whatever ends the run
        page.write(options.page)
    sys.exit(1 if page.errors else 0)


# The page.


class Page:
    """Cards of captioned files, and the errors of the others."""

    def __init__(self, by: str):
        self.by = by
        self.cards: dict[str, list[str]] = {"pictures": [], "sounds": []}
        self.errors: list[str] = []

    def report(self, line: str) -> None:
        """Report an error, on the page and on stderr."""
        self.errors.append(line)
        print(f"error: {line}", file=sys.stderr)

    def add(self, name: str, caption: str) -> None:
        """Add the card of a captioned file, which is read again for it."""
        try:
            kind, media = media_html(mmtx.read(name))
        except (mmtx.InputError, OSError, soundfile.SoundFileError) as error:  # it was removed or changed between the two reads
            self.report(f"{mmtx.display(name)}: not on the page ({type(error).__name__})")
            return
        caption, path = html.escape(mmtx.escape(caption)) or "(empty)", html.escape(mmtx.display(name))
        self.cards[kind].append(f'<figure>{media}<figcaption><b title="{caption}">{caption}</b>'
                                f'<small title="{path}">{path.rsplit("/", 1)[-1]}</small></figcaption></figure>')

    def write(self, path: Path) -> None:
        """Write the page, replacing an earlier one atomically."""
        part = path.with_name(f".{path.name[:64]}.{os.getpid()}")
        try:
            part.write_text(self.html(), encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            sys.exit(f"error: --page {path}: cannot be written ({error.strerror})")
        finally:
            part.unlink(missing_ok=True)
        print(f"page: {path}", file=sys.stderr)

    def html(self) -> str:
        counts = [f"{len(found)} {kind if len(found) > 1 else kind[:-1]}" for kind, found in self.cards.items() if found]
        body = [f'<h2>{kind.capitalize()}</h2>\n<section class="{kind}">\n' + "\n".join(found) + "\n</section>"
                for kind, found in self.cards.items() if found]
        if self.errors:
            body.append("<h2>Not captioned</h2>\n<ul>\n"
                        + "\n".join(f"<li>{html.escape(line)}</li>" for line in self.errors) + "\n</ul>")
        return PAGE.format(icon=FAVICON, summary=f"{' and '.join(counts) or 'nothing'}, captioned by {self.by}",
                           body="\n".join(body))


def media_html(data: bytes) -> tuple[str, str]:
    """"pictures" or "sounds", and the HTML that shows the medium."""
    try:
        picture = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        return "sounds", sound_html(data)
    return "pictures", f'<img alt="" src="{picture_uri(picture, data)}">'


def uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def picture_uri(picture: Image.Image, data: bytes) -> str:
    """The picture unchanged, or a downscaled copy if it is large or in a format that browsers do not show."""
    if picture.format in PICTURES and len(data) <= INLINE:
        return uri(data, PICTURES[picture.format])
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip
        picture = Image.fromarray((np.asarray(picture).astype(int) // 257).astype(np.uint8))
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=85)
    return uri(file.getvalue(), PICTURES["WEBP"])


def sound_html(data: bytes) -> str:
    """A spectrogram above a player, which has only the beginning of a large file."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        rate, form = file.samplerate, file.format
        samples = file.read(dtype="float32", always_2d=True)  # (S, C)
    media_type = SOUNDS.get(form)
    if media_type is None or len(data) > INLINE:
        cut, media_type = io.BytesIO(), "audio/wav"
        soundfile.write(cut, samples[:EXCERPT * rate].mean(1), rate, format="WAV", subtype="PCM_16")
        data = cut.getvalue()
    loudest = samples[:, np.square(samples).mean(0).argmax()]
    file = io.BytesIO()
    Image.fromarray(spectrogram(loudest, rate)).save(file, "PNG")
    return (f'<img alt="spectrogram, {len(samples) / rate:.1f} s" src="{uri(file.getvalue(), "image/png")}">'
            f'<audio controls preload="metadata" src="{uri(data, media_type)}"></audio>')


def spectrogram(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples (S,) -> picture, uint8 (ROWS, COLUMNS, 3): time to the right, log frequency upwards, loud is bright."""
    window = rate // 16
    starts = np.linspace(0, max(0, len(samples) - 1), COLUMNS).astype(int)
    padded = np.pad(samples, (window // 2, window))
    frames = padded[starts[:, None] + np.arange(window)] * np.hanning(window)  # (COLUMNS, window)
    power = np.square(np.abs(np.fft.rfft(frames)))
    places = np.geomspace(TONES[0], min(TONES[1], rate / 2), ROWS)[::-1] * window / rate
    rows = np.stack([np.interp(places, np.arange(power.shape[1]), column) for column in power], axis=1)
    level = 10 * np.log10(np.maximum(rows, 1e-9))
    shade = np.clip((level - level.max()) / DEPTH + 1, 0, 1) if level.max() > -80 else np.zeros_like(level)
    steps = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(shade, steps, COLOURS[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


if __name__ == "__main__":
    main()
