"""mmtx: text, pictures and sounds as one stream of tokens for one decoder.

    import mmtx
    model = mmtx.load()
    model.caption("picture.png")

Nothing heavy is imported until it is used.
"""

import os
from importlib import import_module

__version__ = "0.1.0"

# torch's threads spin for a while when they wait for one another, which keeps a core that other jobs share from the one they
# wait for. Steps a second of the quickstart's decoder, two cores of an AMD EPYC, alone and beside two busy processes: 6.9 and
# 1.7 as it comes, 5.2 to 7.0 and 2.7 so, 4.0 and 3.3 without any spinning. Read once, when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

HOMES = {
    "load": "mmtx.pipeline",
    "Model": "mmtx.pipeline",
    "Image": "mmtx.pipeline",
    "Audio": "mmtx.pipeline",
    "Sound": "mmtx.pipeline",
    "InputError": "mmtx.errors",
    "escape": "mmtx.errors",
    "display": "mmtx.data.storage",
    "read": "mmtx.data.storage",
    "find_media": "mmtx.captioning",
    "caption_files": "mmtx.captioning",
}
__all__ = sorted(HOMES)


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module 'mmtx' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
