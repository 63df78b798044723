"""Plant each bug of this folder in a copy of the tree, and see that the tests named in it fail: `make mutants`.

A patch begins with what it plants, and a line `tests:` with the arguments of pytest that must notice. Names of patches
as arguments choose among them; a run of all is written to benchmarks/results/mutants.json.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATCHES = sorted(Path(__file__).parent.glob("*.patch"))
LINKED = ("tokenizers", "configs", "demos", "benchmarks", "README.md", "Makefile", "constraints.txt")


def named_by(patch: Path) -> list[str]:
    """The arguments of pytest that a patch names."""
    (line,) = re.findall(r"^tests: (.+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(line)


def copy(folder: Path) -> None:
    """The tree as far as tests need it; what no patch changes is linked."""
    for name in ("mmtx", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)


def run(folder: Path, tests: list[str]) -> tuple[int, str]:
    """Exit status of pytest in a copy, and the test that failed first or else what it said last."""
    threads = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests], cwd=folder,
                          env=threads, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed[0] if failed else " ".join((done.stdout + done.stderr).split())[-200:]


def verdict(patch: Path) -> tuple[bool, str]:
    """Whether a mutant was caught, and by what."""
    with tempfile.TemporaryDirectory() as name:
        copy(Path(name))
        done = subprocess.run(["git", "apply", str(patch)], cwd=name, capture_output=True, text=True)
        if done.returncode != 0:
            return False, f"DOES NOT APPLY: {' '.join(done.stderr.split())}"
        status, told = run(Path(name), named_by(patch))
    return status == 1, {0: "SURVIVED", 1: told}.get(status, f"NO TEST RAN: {told}")


def main(names: list[str]) -> int:
    chosen = [patch for patch in PATCHES if not names or patch.stem in names]
    with tempfile.TemporaryDirectory() as name:
        copy(Path(name))
        status, told = run(Path(name), sorted({test for patch in chosen for test in named_by(patch)}))
    if status != 0:
        print(f"tests fail without any of the bugs: {told}", file=sys.stderr)
        return 1
    table, begin = {}, time.monotonic()
    print("| planted | caught by | seconds |\n| --- | --- | ---: |", flush=True)
    for patch in chosen:
        last = time.monotonic()
        table[patch.stem] = verdict(patch)
        print(f"| {patch.stem} | {table[patch.stem][1]} | {time.monotonic() - last:.0f} |", flush=True)
    caught, seconds = sum(good for good, _ in table.values()), round(time.monotonic() - begin)
    print(f"\n{caught} of {len(chosen)} caught in {seconds} s")
    if not names:
        save({"planted": len(chosen), "caught": caught, "seconds": seconds, "by": {name: by for name, (_, by) in table.items()}})
    return int(caught < len(chosen) or not chosen)


def save(result: dict) -> None:
    """Write a result beside those of the benchmarks, where there are any: not in a source archive."""
    if (ROOT / "benchmarks").is_dir():
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from measure import RESULTS, machine, versions

        result = {"name": "mutants", "date": date.today().isoformat(), **result, "machine": machine(), "versions": versions()}
        (RESULTS / "mutants.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
