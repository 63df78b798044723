"""Captions of long sounds and large photographs in bounded memory, in processes of their own that load the shipped model."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

PROGRAM = """
import re, sys, numpy, torch, mmtx
def told(what):
    return int(re.search(rf"{what}:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
torch.set_num_threads(1)
model, noise = mmtx.load(device="cpu"), numpy.random.default_rng(0)
model.caption(mmtx.Image(numpy.zeros((40, 40, 3), numpy.uint8)))
model.caption(mmtx.Audio(0.1 * noise.standard_normal(16000)))
before = told("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak from now on
model.caption(sys.argv[1:], max_new_tokens=4)
print(told("VmHWM") - before)
"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")]


def megabytes(paths: list[Path]) -> float:
    """How much more memory captions took than the model that was loaded."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, paths)], capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


LONG = pytest.mark.skipif("MMTX_LONG" not in os.environ, reason="minutes: make test-long")


@pytest.mark.parametrize(("seconds", "most"), [(120, 250), pytest.param(600, 600, marks=LONG)])
def test_a_long_sound(tmp_path, seconds, most):
    time, random = np.arange(44_100) / 44_100, np.random.default_rng(0)
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 44_100, 2) as file:
        for second in range(seconds):
            tone = 0.3 * np.sin(2 * np.pi * (220 + 10 * (second % 40)) * time)
            file.write(tone[:, None] + 0.01 * random.standard_normal((44_100, 2)))
    taken = megabytes([tmp_path / "a.flac"])
    print(f"captions of {seconds} s: {taken:.0f} MB above the model")
    assert taken < most


@pytest.mark.parametrize(("count", "most"), [(3, 350), pytest.param(32, 600, marks=LONG)])
def test_photographs(tmp_path, count, most):
    """Of 24 megapixels each, with grain, as cameras write them: some are progressive, and some lie on their side."""
    random, paths = np.random.default_rng(0), []
    grain = random.integers(-12, 13, (4000, 6000, 1), dtype=np.int16)
    for number, (progressive, orientation) in enumerate([(False, 1), (True, 1), (True, 6), (False, 6)][:count]):
        scene = Image.fromarray(random.integers(20, 236, (40, 60, 3), dtype=np.uint8)).resize((6000, 4000), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = orientation
        paths.append(tmp_path / f"{number}.jpg")
        Image.fromarray((scene + grain).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90, progressive=progressive, exif=exif)
    taken = megabytes([paths[number % len(paths)] for number in range(count)])
    print(f"captions of {count} photographs, {[path.stat().st_size >> 20 for path in paths]} MB: {taken:.0f} MB above the model")
    assert taken < most
