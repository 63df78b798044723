"""mmtx: text, pictures and sounds as one stream of tokens for one decoder.

    import mmtx
    model = mmtx.load()
    model.caption("picture.png")

Nothing heavy is imported until it is used.
"""

from importlib import import_module

__version__ = "0.1.0"

HOMES = {
    "load": "mmtx.pipeline",
    "Model": "mmtx.pipeline",
    "Image": "mmtx.pipeline",
    "Audio": "mmtx.pipeline",
    "Sound": "mmtx.pipeline",
    "InputError": "mmtx.errors",
}
__all__ = sorted(HOMES)


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module 'mmtx' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
