"""mmtx: text, pictures and sounds as one stream of tokens for one decoder.

    import mmtx
    model = mmtx.load()
    model.caption("picture.png")

Nothing heavy is imported until it is used.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

__version__ = "0.1.0"

HOMES = {
    "load": "mmtx.pipeline",
    "Model": "mmtx.pipeline",
    "Image": "mmtx.medium",
    "Audio": "mmtx.medium",
    "Medium": "mmtx.medium",
    "load_plugin": "mmtx.modality.registry",
    "Sound": "mmtx.medium",
    "InputError": "mmtx.errors",
    "escape": "mmtx.errors",
    "display": "mmtx.data.storage",
    "read": "mmtx.data.storage",
    "find_media": "mmtx.captioning",
    "caption_files": "mmtx.captioning",
    "transcribe_files": "mmtx.captioning",
}
__all__ = sorted(HOMES)


@contextmanager
def limit_openmp_spin() -> Iterator[None]:
    """If torch is first imported in this block, its threads spin only briefly while they wait for one another.

    On cores shared with other jobs, a spinning thread keeps the core from the thread that it waits for. Steps per second of the
    quickstart's decoder on two cores of an AMD EPYC, alone and next to two busy processes: 6.9 and 1.7 by default, 5.2 to 7.0
    and 2.7 with this limit, 4.0 and 3.3 without any spinning. GNU OpenMP reads the variable once, when it is loaded, so the
    program's environment is restored. A program that imports torch earlier, or submodules of mmtx, must set it itself.
    """
    if "torch" in sys.modules or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "1000"
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module 'mmtx' has no attribute {name!r}")
    with limit_openmp_spin():
        return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
