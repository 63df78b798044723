"""Is there always a sound newest checkpoint? SIGKILL during writes, and disks that fill up at ten points.

    python benchmarks/write_kills.py --kills 100
    TMPDIR=/dev/shm python benchmarks/write_kills.py --kills 100 --folder .    # temporary files on another filesystem

Files have 8 MB. The full disk is a small filesystem in memory, which requires permission to mount one. Writes
results/write_kills.json, or write_kills-elsewhere.json if temporary files are on another filesystem; exits with 1 if any
checkpoint was lost.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from measure import RESULTS, machine, versions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_checkpoint as test

from mmtx.errors import InputError
from mmtx.training.checkpoint import newest


def full_disk(root: Path) -> list[str]:
    """Write a second checkpoint with room for ten different shares of it -> the errors; empty if no such disk can be mounted."""
    root.mkdir()
    size = test.write(root, 1).stat().st_size
    mount = ["mount", "-t", "tmpfs", "-o", f"size={3 * size}", "tmpfs", root]
    if subprocess.run(mount, capture_output=True).returncode:
        return []
    messages = []
    try:
        before = test.write(root, 1)
        for tenth in range(10):
            (root / "ballast").unlink(missing_ok=True)
            room = shutil.disk_usage(root).free - size * tenth // 10
            (root / "ballast").write_bytes(bytes(room))
            try:
                test.write(root, 2)
            except InputError as error:
                messages.append(str(error))
            assert newest(root) == before and test.check(before) == 1
            assert sorted(path.name for path in root.iterdir()) == ["ballast", before.name]
    finally:
        subprocess.run(["umount", root], check=True)
    assert len(messages) == 10 and all("step-000000002.ckpt" in line and str(size) in line for line in messages)
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="that come within a write")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    test.NUMBERS = 2_000_000
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        folder = Path(root) / "checkpoints"
        kills, within = test.kill_while_writing(folder, options.kills, 10 * options.kills, random.Random(options.seed))
        assert within == options.kills, f"only {within} of {kills} kills came within a write"
        elsewhere = os.stat(tempfile.gettempdir()).st_dev != os.stat(root).st_dev
        messages = full_disk(Path(root) / "small")
    print(f"{kills} kills, {within} of them within a write; temporary files on {'another' if elsewhere else 'the same'} "
          "filesystem: always a sound newest checkpoint")
    print(f"full disk at ten levels: the one before loads each time; for example: {messages[5]}" if messages else
          "full disk: skipped, no right to mount a small filesystem")
    result = {
        "name": "write_kills-elsewhere" if elsewhere else "write_kills", "date": date.today().isoformat(),
        "kills": kills, "within_a_write": within, "lost": 0, "temporary_files_elsewhere": elsewhere,
        "full_disk_levels": len(messages), "seed": options.seed, "machine": machine(), "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['name']}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
