"""What a process of training frees stays its own."""

import subprocess
import sys

import pytest

from mmtx.training import run

PROGRAM = """
import resource, sys, torch
from mmtx.training.memory import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
for step in range(40):
    if step == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


GIVEN_BACK = """
import pathlib, torch
from mmtx.training.memory import releasing_memory, keep_memory


def held():
    return next(int(line.split()[1]) for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))


keep_memory()
torch.ones(8)
held_at = [held()]
with releasing_memory():
    block, small = torch.ones(2 ** 26), torch.ones(2 ** 16)
    del block
    held_at.append(held())
block = torch.ones(2 ** 26)
del block
held_at.append(held())
print(held_at[1] - held_at[0], held_at[2] - held_at[1])
"""


def faults(way: str) -> int:
    """Pages that the system had to give for ten blocks of 128 MB, one after another, once thirty such were freed.

    Thirty, since a small allocation that lies beside a freed block can keep the next from fitting into it: in ten runs
    the heap grew for up to eight blocks and then no more.
    """
    return int(subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is promised")
def test_a_block_that_was_freed_is_used_again():
    assert 2 * faults("kept") < faults("given back")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is promised")
def test_what_loading_frees_goes_back_to_the_system():
    """A block of 256 MB that was needed on the way is not held; then blocks are kept again."""
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    within, after = map(int, done.stdout.split())
    assert within < 2**16 < 2**17 < after  # kB


def test_mmtx_fit_keeps_memory(monkeypatch):
    called = []
    monkeypatch.setattr(run, "keep_memory", lambda: called.append(True))
    monkeypatch.setattr(run, "command_line", lambda *arguments, **more: None)
    run.main("fit", [])
    assert called
