"""How many codes per second come from raw media, compared with the slowest single stage alone?

    python benchmarks/media_speed.py

Stages: reading and decoding files, preprocessing (fitting and cutting pictures, spectrograms of sounds), and the encoder,
each alone on one thread; then `Model.encode_parts`, which does all of them, several batches at a time in one thread each.
Media are those of the starter data. OMP_NUM_THREADS sets the number of threads.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from captions_speed import SOURCES, unpack
from measure import interleave, report

import mmtx
from mmtx.data.media import load_audio, load_image
from mmtx.modality.image import to_float

BAR = 0.85


def measure(kind: str, folder: Path, options: argparse.Namespace) -> None:
    files = [str(path) for path in unpack(kind, options.files, folder / kind)]
    model = mmtx.load()
    if kind == "pictures":
        tokenizer, mark = model.tokenizers["image"], mmtx.Image
        read = load_image
        prepare = lambda picture: [tokenizer._to_grid(to_float(tokenizer.fit(picture)))]
    else:
        tokenizer, mark = model.tokenizers["audio"], mmtx.Audio
        read = lambda file: load_audio(file, tokenizer.rate)
        prepare = lambda sound: tokenizer._to_grid(tokenizer.spectrogram(sound)).split(tokenizer.config.chunk)
    media = [read(file) for file in files]
    grids = [grid for medium in media for grid in prepare(medium)]
    codes = sum(grid.shape[0] * grid.shape[1] for grid in grids)

    def rate(run: Callable[[], object], threads: int = 1) -> Callable[[], float]:
        def timed() -> float:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            run()
            return codes / (time.perf_counter() - start)
        return timed

    most = torch.get_num_threads()

    candidates = {
        "raw media to codes": rate(lambda: model.encode_parts([mark(file) for file in files]), most),
        "decode alone": rate(lambda: [read(file) for file in files]),
        "prepare alone": rate(lambda: [prepare(medium) for medium in media]),
        "encoder alone": rate(lambda: tokenizer.embed_grids(grids)),
    }
    interleave(candidates, 1)
    results = interleave(candidates, options.rounds)
    torch.set_num_threads(most)
    slowest = min(list(results)[1:], key=lambda name: sorted(results[name])[options.rounds // 2])
    report(f"media_speed_{kind}", "codes/s", results, "raw media to codes", {slowest: BAR},
           {"files": len(files), "codes": codes, "threads": torch.get_num_threads()}, options.short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    if options.short:
        options.files, options.rounds = 4, 1
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for kind in SOURCES:
            measure(kind, Path(folder), options)


if __name__ == "__main__":
    main()
