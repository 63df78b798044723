"""How long does it take to import mmtx, to print its help, and to caption a first picture, each in a new process?

    python benchmarks/startup.py

The first caption is compared with the minimum of any program on torch: `import torch` and reading the model's weights.
`import litgpt` is measured too, if it is installed. The package's files are in the page cache. From times of imports, that
of a Python process that does nothing is subtracted.
"""

import argparse
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from captions_speed import SOURCES
from measure import interleave, report

from mmtx.model_folder import DEFAULT_MODEL
from mmtx.shipped_files import find_shipped

FLOOR = "import torch and read the weights"
READ = """
import torch, safetensors.torch
from pathlib import Path
for path in Path({model!r}).rglob("*.safetensors"):
    safetensors.torch.load_file(path)
"""


def seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    model = str(find_shipped(DEFAULT_MODEL))
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.webp")
        with tarfile.open(SOURCES["pictures"][0]) as tar:
            name = next(member for member in tar if member.name.endswith(picture.suffix))
            picture.write_bytes(tar.extractfile(name).read())
        candidates = {
            "import mmtx": lambda: seconds("-c", "import mmtx") - seconds("-c", ""),
            "mmtx --help": lambda: seconds("-m", "mmtx", "--help"),
            "first caption": lambda: seconds("-m", "mmtx", "caption", str(picture)),
            FLOOR: lambda: seconds("-c", READ.format(model=model)),
            "import torch": lambda: seconds("-c", "import torch"),
        }
        if importlib.util.find_spec("litgpt"):
            candidates["import litgpt"] = lambda: seconds("-c", "import litgpt")
        if not options.short:
            interleave(candidates, 1)
        results = interleave(candidates, 1 if options.short else options.rounds)
    rounds = len(results["import mmtx"])
    for name, peer, bar in (("import mmtx", "0.1 s", 1.0), ("mmtx --help", "0.5 s", 1.0), ("first caption", FLOOR, 1.5)):
        if peer != FLOOR:
            results[peer] = [float(peer.split()[0])] * rounds
        rows = [name, peer] if peer != FLOOR else [row for row in results if "import" in row or row == name]
        report(f"startup_{name.split()[-1].strip('-')}", "s", {row: results[row] for row in rows}, name, {peer: bar},
               {"model": DEFAULT_MODEL}, options.short, less_is_better=True)


if __name__ == "__main__":
    main()
