"""How many files a second does the shipped model caption, a folder at once against one file at a time?

    python benchmarks/captions_speed.py

End to end: `caption` of 1,000 pictures or sounds of the starter data, from files to strings; the same calls one file
each; and the command `mmtx caption` once a file, as a loop of the shell makes it, over the first --commands files.
Captions must be the same. --model names another model folder. OMP_NUM_THREADS chooses the threads.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from measure import interleave, report

import mmtx
from mmtx.pipeline import DEFAULT_MODEL

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"
SOURCES = {
    "pictures": [STARTER / "images-test-unseen-style.tar.gz"],
    "sounds": [STARTER / "sounds-test-unseen-notes.tar.gz", *sorted(STARTER.glob("sounds-train-*.tar.gz"))],
}
BAR = 8.0


def unpack(kind: str, count: int, folder: Path) -> list[Path]:
    """Write `count` pictures or sounds of the starter data to a folder -> their paths."""
    def members():
        for source in SOURCES[kind]:
            with tarfile.open(source) as tar:
                for member in tar:
                    if member.isfile() and not member.name.endswith(".json"):
                        yield member.name, tar.extractfile(member).read()

    folder.mkdir()
    paths = []
    for name, content in islice(members(), count):
        paths.append(folder / Path(name).name)
        paths[-1].write_bytes(content)
    return paths


def measure(kind: str, folder: Path, options: argparse.Namespace) -> None:
    files = [str(path) for path in unpack(kind, options.files, folder / kind)]
    model, captions = mmtx.load(options.model), {}

    def at_once() -> float:
        start = time.perf_counter()
        captions["at once"] = model.caption(files)
        return len(files) / (time.perf_counter() - start)

    def one_by_one() -> float:
        start = time.perf_counter()
        captions["one by one"] = [model.caption(file) for file in files]
        return len(files) / (time.perf_counter() - start)

    def commands() -> float:
        start = time.perf_counter()
        for file in files[:options.commands]:
            subprocess.run([sys.executable, "-m", "mmtx", "caption", "--model", options.model, file], check=True,
                           capture_output=True)
        return options.commands / (time.perf_counter() - start)

    model.caption(files[:2])
    results = interleave({"at once": at_once, "one file at a time": one_by_one, "one command a file": commands},
                         options.rounds)
    same = sum(a == b for a, b in zip(captions["at once"], captions["one by one"], strict=True))
    assert same == len(files), f"{len(files) - same} captions differ"
    report(f"captions_speed_{kind}", "files/s", results, "at once", {"one file at a time": BAR, "one command a file": BAR},
           {"files": len(files), "model": options.model, "threads": torch.get_num_threads()}, options.short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--commands", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    if options.short:
        options.files, options.commands, options.rounds = 4, 1, 1
    with tempfile.TemporaryDirectory() as folder:
        for kind in SOURCES:
            measure(kind, Path(folder), options)


if __name__ == "__main__":
    main()
