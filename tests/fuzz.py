"""Mutated inputs: each is read, or refused in one line; nothing crashes, hangs or takes memory without a bound.

By hand: `python tests/fuzz.py media --count 100000`, so many mutants of each seed; `--only PNG` for some of them.
A target is one function in TARGETS that returns seeds by name, each with what reads it. Its mutants are read in a
process of their own, so that a crash is an outcome and the run goes on behind it; equal numbers give equal mutants.
"""

import argparse
import json
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

SECONDS = 10  # of processor time, the most that one input may take
PEAK, GROWTH = 1_000, 100  # MB: the most at a time (64 megapixels, several times over), and that stays behind
LINE = 1_000  # the longest message
Seeds = dict[str, tuple[bytes, Callable[[bytes], object]]]
TARGETS: dict[str, Callable[[], Seeds]] = {}


def target(make: Callable[[], Seeds]) -> Callable[[], Seeds]:
    """Register a target under its function's name."""
    TARGETS[make.__name__] = make
    return make


# Mutations.

EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four faults of the kinds that files have or get."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice((_flip, _flip, _byte, _cut, _copy, _drop, _length, _length))(data, rng)
    return bytes(data)


def _place(data: bytearray, rng: random.Random) -> int:
    """Any place, but every second time within the first 200 bytes, where headers are."""
    return rng.randrange(min(len(data), 200) if rng.random() < 0.5 else len(data)) if data else 0


def _flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    data[place : place + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))])


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[_place(data, rng) :]


def _copy(data: bytearray, rng: random.Random) -> None:
    start, size = _place(data, rng), rng.choice((1, 4, 16, 64, 1_024))
    place = _place(data, rng)
    data[place:place] = data[start : start + size] * rng.choice((1, 1, 2, 16))


def _drop(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    del data[place : place + rng.choice((1, 2, 4, 16, 64, 1_024))]


def _length(data: bytearray, rng: random.Random) -> None:
    """A number of one, two, four or eight bytes of either order, as lengths and counts are."""
    size, place = rng.choice((1, 2, 4, 4, 8)), _place(data, rng)
    order = rng.choice(("little", "big"))
    near = int.from_bytes(data[place : place + size], order) + rng.choice((-1, 1))
    value = near if rng.random() < 0.3 else rng.choice(EDGES)
    data[place : place + size] = (value % 256**size).to_bytes(size, order)


# Runs.


def run(name: str, count: int, seed: int = 0, only: str = "") -> tuple[dict[str, Counter], list[str]]:
    """Outcomes by seed file of `count` mutants of each, and all that should not be, in words."""
    outcomes, faults, done = {}, [], 0
    command = [sys.executable, __file__, name, "--count", str(count), "--seed", str(seed), "--only", only, "--begin"]
    while True:
        kind = "start"
        with tempfile.TemporaryFile() as said:  # no pipe: libraries write more to it than it holds
            with subprocess.Popen([*command, str(done)], stdout=subprocess.PIPE, stderr=said, text=True) as child:
                for line in child.stdout:
                    kind, outcome = json.loads(line)
                    outcomes.setdefault(kind, Counter())[outcome.split(":")[0]] += 1
                    if outcome not in ("read", "refused"):
                        faults.append(f"{kind}, mutant {done % count}: {outcome}")
                    done += 1
            said.seek(max(said.tell() - 500, 0))
            last_words = said.read().decode(errors="replace") if kind == "start" else ""
        if not child.returncode:
            return outcomes, faults
        outcomes.setdefault(kind, Counter())["crash"] += 1
        faults.append(f"behind {kind}, mutant {done % count}: ended with {child.returncode} {last_words}")
        if kind == "start":
            return outcomes, faults
        done += 1


def child(name: str, count: int, seed: int, only: str, begin: int) -> None:
    """Read mutants from number `begin` on; for each, print a line of JSON: the seed's name and the outcome."""
    from mmtx.errors import InputError

    warnings.simplefilter("ignore")
    seeds = {kind: seed for kind, seed in TARGETS[name]().items() if only in kind}
    for data, read in seeds.values():
        read(data)  # the seeds are sound, and what is loaded once is not growth
    stayed = memory("VmRSS")
    for number, (kind, (data, read)) in enumerate(seeds.items()):
        for mutant in range(max(begin - number * count, 0), count):
            mutated = mutate(data, random.Random(f"{kind} {seed} {mutant}"))
            signal.alarm(6 * SECONDS)  # ends the process, whatever it is doing
            start = time.process_time()
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
            before = memory("VmHWM")
            try:
                read(mutated)
                outcome = "read"
            except InputError as error:
                text = str(error)
                outcome = "refused" if len(text) <= LINE and text.isprintable() else f"message: {text!r}"
            except Exception as error:
                outcome = f"exception: {type(error).__name__} {error}"
            took, peak, now = time.process_time() - start, memory("VmHWM") - before, memory("VmRSS")
            if took > SECONDS:
                outcome = f"hang: {took:.0f} s"
            elif peak > PEAK or now - stayed > GROWTH:
                outcome = f"memory: {peak:.0f} MB at a time, {now - stayed:.0f} MB stay"
                stayed = max(stayed, now)
            print(json.dumps([kind, outcome]), flush=True)
    signal.alarm(0)


def memory(field: str) -> float:
    """MB of this process as Linux counts them."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


# Targets.


@target
def media() -> Seeds:
    """Pictures and sounds in every format that is accepted."""
    from mmtx.data.media import load_audio, load_image

    def read_sound(data: bytes) -> None:
        load_audio(data, 16_000, "x")
        load_audio(data, 16_000, "x", start=0.1, seconds=0.1)

    pictures = {name: (data, lambda data: load_image(data, "x")) for name, data in picture_seeds().items()}
    return pictures | {name: (data, read_sound) for name, data in sound_seeds().items()}


@target
def rows() -> Seeds:
    """Manifests of all forms, and what a sample of them says when it is read."""
    from mmtx.data.sources import scan

    picture = encoded(seed_picture(), "PNG")

    def read(name: str) -> Callable[[bytes], None]:
        def run(data: bytes) -> None:
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "x.png").write_bytes(picture)
                path = Path(folder, name)
                path.write_bytes(data)
                _all_of(scan(str(path)))
        return run

    chat = [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "a cat"}]
    lines = [{"image": "x.png", "text": "a cat", "n": 1.5}, {"text": "h\u00e4h"}, {"messages": chat, "id": "k"},
             {"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}], "image": "x.png"},
             {"instruction": "say", "input": "", "output": "cat"}, {"file_name": "x.png", "text": "a cat", "more": {"deep": [1, [2]]}}]
    lines = [json.dumps(line) for line in lines]
    table = "file_name,text,more\nx.png,a cat,1\nx.png,\"a, \"\"b\"\"\",\n"
    return {"jsonl": ("\n".join(lines).encode(), read("x.jsonl")), "json": (f"[{', '.join(lines)}]".encode(), read("x.json")),
            "csv": (table.encode(), read("x.csv")), "tsv": (table.replace(",", "\t").encode(), read("x.tsv"))}


@target
def tars() -> Seeds:
    """WebDataset shards, plain and gzipped, of each format of headers."""
    import gzip
    import tarfile

    from mmtx.data.sources import scan

    def read(name: str) -> Callable[[bytes], None]:
        def run(data: bytes) -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, name)
                path.write_bytes(data)
                _all_of(scan(str(path)))
        return run

    def made(form: int) -> bytes:
        file = BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for key in ("a", "b" * 120, "c"):
                for name, content in ((f"{key}.png", encoded(seed_picture(), "PNG")), (f"{key}.txt", b"a cat")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
        return file.getvalue()

    plain = {"ustar with long names of GNU": made(tarfile.GNU_FORMAT), "PAX": made(tarfile.PAX_FORMAT)}
    joined = made(tarfile.GNU_FORMAT) + made(tarfile.PAX_FORMAT)
    return {**{name: (data, read("x.tar")) for name, data in plain.items()}, "joined": (joined, read("x.tar")),
            "gzipped": (gzip.compress(made(tarfile.PAX_FORMAT), mtime=0), read("x.tar.gz"))}


def _all_of(found) -> None:
    """Go through rows as `mmtx prepare` does. Raises the first error of a row, or of the source."""
    import pickle

    from mmtx.data.prepare import stamp_of
    from mmtx.errors import InputError

    errors = []
    for row in found:
        pickle.loads(pickle.dumps(row))
        stamp_of([row])
        if isinstance(row, InputError):
            errors.append(row)
        else:
            assert row.caption.encode() and row.turns and row.where
    if errors:
        raise errors[0]


def picture_seeds() -> dict[str, bytes]:
    """A small picture in every format."""
    import numpy as np
    import pillow_heif
    from PIL import Image

    rgba = seed_picture()
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "a camera", 72.5
    seeds = {
        "PNG": encoded(rgba, "PNG", exif=exif),
        "PNG of 16 bit": encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG"),
        "PNG with a palette": encoded(rgb.quantize(16), "PNG", transparency=0),
        "JPEG": encoded(rgb, "JPEG", exif=exif),
        "JPEG, progressive": encoded(rgb, "JPEG", progressive=True),
        "JPEG of CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "WEBP": encoded(rgb, "WEBP", exif=exif),
        "WEBP, lossless": encoded(rgba, "WEBP", lossless=True),
        "WEBP of frames": encoded(rgb, "WEBP", save_all=True, append_images=[grey.convert("RGB")]),
        "BMP": encoded(rgb, "BMP"),
        "BMP of runs": run_length_bmp(),
        "GIF": encoded(rgb.quantize(16), "GIF", save_all=True, append_images=[grey.quantize(16)], comment=b"x"),
        "TIFF": encoded(rgb, "TIFF", exif=exif),
        "AVIF": encoded(rgb, "AVIF", exif=exif),
    }
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4"):
        picture = rgb.convert("1") if compression == "group4" else rgb
        seeds[f"TIFF {compression}"] = encoded(picture, "TIFF", compression=compression)
    file = BytesIO()
    pillow_heif.from_pillow(rgb).save(file, exif=exif.tobytes())
    return seeds | {"HEIC": file.getvalue()}


def seed_picture() -> "Image.Image":  # noqa: F821
    """What the seeds show, before it is turned."""
    import numpy as np
    from PIL import Image

    smooth = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)  # (H, W, C)
    return Image.fromarray(smooth).resize((48, 32), Image.Resampling.BILINEAR)


def sound_seeds() -> dict[str, bytes]:
    """A short sound in every format."""
    import numpy as np
    import soundfile

    samples = 0.3 * np.sin(np.arange(4_000) / 5)
    kinds = [("WAV", "PCM_16"), ("WAV", "MS_ADPCM"), ("WAV", "ULAW"), ("RF64", "PCM_16"), ("AIFF", "PCM_16"),
             ("AU", "FLOAT"), ("CAF", "ALAC_16"), ("W64", "PCM_24"), ("NIST", "PCM_16"), ("FLAC", "PCM_16"),
             ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
    seeds = {}
    for format, subtype in kinds:
        file = BytesIO()
        soundfile.write(file, samples, 16_000, format=format, subtype=subtype)
        seeds[f"{format} {subtype}"] = file.getvalue()
    for container, codec in (("ipod", "aac"), ("ipod", "alac"), ("mp4", "flac"), ("adts", "aac"), ("webm", "libopus"),
                             ("mp2", "mp2")):
        seeds[f"{container} {codec}"] = ffmpeg_sound(samples, 16_000, container, codec)
    return seeds


def encoded(picture: "Image.Image", format: str, **options: object) -> bytes:  # noqa: F821
    """A picture as bytes."""
    file = BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def ffmpeg_sound(samples: "np.ndarray", rate: int, container: str, codec: str) -> bytes:  # noqa: F821
    """Mono samples as bytes in a format that libsndfile does not write."""
    import av

    file = BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples.astype("float32")[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        context = stream.codec_context
        rate = 48_000 if codec == "libopus" else rate
        size = context.frame_size or 1_024
        pieces = av.AudioResampler(format=context.format, layout="mono", rate=rate, frame_size=size)
        for piece in (*pieces.resample(frame), *pieces.resample(None), None):
            for packet in stream.encode(piece):
                output.mux(packet)
    return file.getvalue()


def run_length_bmp() -> bytes:
    """A BMP of 8 bit, run-length encoded, which Pillow reads and does not write."""
    runs = b"".join(bytes((4, value, 4, 255 - value, 0, 0)) for value in range(8)) + b"\0\1"
    palette = b"".join(bytes((i, i, i, 0)) for i in range(256))
    header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, len(runs), 0, 0, 256, 0) + palette
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(runs), 0, 0, 14 + len(header)) + header + runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--count", type=int, default=1_000, help="mutants of each seed")
    parser.add_argument("--seed", type=int, default=0, help="another gives other mutants")
    parser.add_argument("--only", default="", help="seeds whose name has this in it")
    parser.add_argument("--begin", type=int, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    name = options.pop("target")
    if options["begin"] is not None:
        return child(name, **options)
    del options["begin"]
    outcomes, faults = run(name, **options)
    for kind, counts in outcomes.items():
        print(f"{kind:24}", *(f"{outcome} {number}" for outcome, number in sorted(counts.items())), sep="  ")
    print(*faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
