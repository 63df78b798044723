"""Does `mmtx prepare` lose or duplicate samples when it is killed? SIGKILL at random moments, the same command again, compare.

    python benchmarks/prepare_kills.py --kills 30

Pictures, notes and speech of the starter data with the shipped tokenizers, in shards of 32 rows, by 2 processes. Each kill
comes after a number of finished shards that is uniform between the number that the process finds and all. All folders must be
the same byte for byte, and no process may outlive its parent. Writes results/prepare_kills.json; exits with 1 if a folder
differs.
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

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import test_prepare as test

SHARDS = ("images-train-004", "sounds-train-001", "speech-train-000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sources = [str(test.STARTER / f"{name}.tar.gz") for name in SHARDS]
    folders = [str(ROOT / "tokenizers" / kind) for kind in ("text", "image", "audio")]
    with tempfile.TemporaryDirectory() as name:
        root, begin = Path(name), time.monotonic()
        process = test.start(folders, root / "one", *sources, "--rows", "32", "--num_workers", "1")
        assert process.wait() == 0, (root / "one.log").read_text()
        seconds, expected = time.monotonic() - begin, test.content(root / "one")
        facts = json.loads(expected["prepared.json"])
        rate = facts["rows"] / seconds
        print(f"undisturbed: {facts['documents']} documents in {seconds:.1f} s, {rate:.0f} rows/s, {facts['shards']} shards",
              flush=True)
        outputs, partial = test.killed_and_finished(folders, root, sources, facts["shards"], options.kills,
                                                    random.Random(options.seed), "--rows", "32", "--num_workers", "2")
        different = [output.name for output in outputs if test.content(output) != expected]
    print(f"{options.kills} kills of {len(outputs)} runs, at {sorted(partial)} finished shards: {len(different)} folders differ")
    result = {
        "name": "prepare_kills", "date": date.today().isoformat(), "kills": options.kills, "runs": len(outputs),
        "different": len(different), "documents": facts["documents"], "shards": facts["shards"],
        "finished_shards_at_kills": sorted(partial), "undisturbed_seconds": round(seconds, 1), "seed": options.seed,
        "machine": machine(), "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "prepare_kills.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
