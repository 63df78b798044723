"""Is a resumed run the same as an uninterrupted one? SIGKILL at random moments, resume, compare every row and weight.

    python benchmarks/resume_kills.py --kills 50
    python benchmarks/resume_kills.py --kills 20 --ranks 2

A tiny decoder on starter samples, with augmentation, validation, averaged weights and 2 workers per process; two ranks
are gloo processes that accumulate two batches. Every second kill comes at a time uniform over the duration of an
uninterrupted run, the others soon after a randomly chosen future checkpoint has been written. Prints mismatches, and
writes results/resume_kills-RANKS.json; exits with 1 if there are any.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from measure import RESULTS, machine, versions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        config = runs.prepare(Path(root), options.steps)
        config = runs.two_ranks(config) if options.ranks == 2 else config
        begin = time.monotonic()
        status = runs.fit(config, Path(root) / "whole", ranks=options.ranks)
        assert set(status) == {0}, (Path(root) / "whole.log").read_text()
        seconds, expected = time.monotonic() - begin, runs.results(Path(root) / "whole")
        rows = expected[0].count("\n") - 1
        print(f"uninterrupted: {options.steps} steps, {seconds:.1f} s, {rows} rows of metrics", flush=True)
        outputs, kills = runs.killed_and_resumed(config, Path(root) / "killed", seconds, options.kills,
                                                 random.Random(options.seed), options.ranks,
                                                 lambda line: print(line, flush=True))
        different = [output.name for output in outputs if runs.results(output) != expected]
    further = sum(kill.step > kill.began for kill in kills)
    first = sum(kill.step == 0 for kill in kills)
    print(f"{options.kills} kills in {len(outputs)} runs of {options.ranks} rank(s), {first} before the first checkpoint "
          f"and {further} after one that the killed process had written: {len(different)} mismatches {different or ''}")
    result = {
        "name": f"resume_kills-{options.ranks}", "date": date.today().isoformat(), "mismatches": len(different),
        "runs": len(outputs), "kills": options.kills, "before_the_first_checkpoint": first,
        "after_a_checkpoint_of_their_process": further,
        "checkpoint_at_start_and_at_kill_and_seconds": [list(kill) for kill in kills],
        "uninterrupted_seconds": round(seconds, 1), "rows_compared": rows, "settings": vars(options),
        "machine": machine(), "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['name']}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
