"""Is a resumed run the run that was interrupted? SIGKILL at random moments, resume, compare every row and weight.

    python benchmarks/resume_kills.py --kills 50
    python benchmarks/resume_kills.py --kills 20 --ranks 2

A tiny decoder on starter samples, with augmentation, validation, averaged weights and 2 workers a process; two ranks
are gloo processes that accumulate two batches. Kills come at moments uniform over the time of an uninterrupted run.
Prints the mismatches; status 1 if there are any.
"""

import argparse
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import runs  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as root:
        config = runs.prepare(Path(root), options.steps)
        config = runs.two_ranks(config) if options.ranks == 2 else config
        begin = time.monotonic()
        status = runs.fit(config, Path(root) / "whole", ranks=options.ranks)
        assert set(status) == {0}, (Path(root) / "whole.log").read_text()
        seconds, expected = time.monotonic() - begin, runs.results(Path(root) / "whole")
        rows = expected[0].count("\n") - 1
        print(f"uninterrupted: {options.steps} steps, {seconds:.1f} s, {rows} rows of metrics", flush=True)
        outputs = runs.killed_and_resumed(config, Path(root) / "killed", seconds, options.kills,
                                          random.Random(options.seed), options.ranks,
                                          lambda line: print(line, flush=True))
        different = [output.name for output in outputs if runs.results(output) != expected]
        print(f"{options.kills} kills in {len(outputs)} runs of {options.ranks} rank(s): {len(different)} mismatches "
              f"{different or ''}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
