"""Models on the Hugging Face hub: downloaded by name, uploaded with a card (extra `hub`)."""

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmtx import __version__
from mmtx.config import DecoderConfig
from mmtx.errors import InputError
from mmtx.extras import require
from mmtx.shipped_files import find_shipped
from mmtx.vocabulary import Vocabulary

NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)  # of a model, and of a branch, tag or commit
# The files of a folder of mmtx or of transformers that are read here: no pickles, no copies for other engines.
READ = [f"{folder}*.{ending}" for folder in ("", "*/") for ending in ("json", "safetensors", "jinja", "model")]
CARD = "README.md"
MARK = "<!-- written by mmtx: a later push writes it anew, unless this line is taken away -->"


def find_model(name: str | Path) -> Path:
    """The folder of a model, or its GGUF file: a local one, one that comes with mmtx, or else one of the hub.

    A model of the hub ("user/model", "user/model@revision") is downloaded, and kept in the library's cache.
    """
    try:
        return find_shipped(name)
    except InputError:
        if not NAME.fullmatch(str(name)) or str(name).endswith(".gguf"):
            raise
    return fetch(str(name))


def fetch(name: str) -> Path:
    """Download a model of the hub -> its folder. Raises InputError with the reason if that fails."""
    repository, _, revision = name.partition("@")
    failed = f"{name}: no such folder here, and not fetched from the hub"
    return Path(_asked(failed, "snapshot_download", repository, revision=revision or None, allow_patterns=READ))


def push(name: str, save: Callable[[Path], None], card: str, private: bool | None = None) -> str:
    """Upload a model to the hub, in one commit -> its URL. An existing card that mmtx did not write is kept.

    Args:
        name: "user/model"; created if there is none.
        save: writes the folder.
        private: whether a new one is private; None: as in the user's settings.
    """
    if not NAME.fullmatch(name) or "@" in name:
        raise InputError(f"push_to_hub: found the name {name[:80]!r}, expected one like user/model")
    failed = f"{name}: not sent to the hub"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save(folder)
        url = _asked(failed, "create_repo", name, private=private, exist_ok=True)
        known = _asked(failed, "file_exists", name, CARD) and Path(_asked(failed, "hf_hub_download", name, CARD)).read_text("utf-8")
        if not known or MARK in known:
            (folder / CARD).write_text(card, "utf-8")
        _asked(failed, "upload_folder", repo_id=name, folder_path=folder, commit_message=f"A model of mmtx {__version__}")
    return str(url)


def _asked(failed: str, function: str, *arguments: Any, **options: Any) -> Any:
    """Call a function of the library. Its errors become an InputError that begins with `failed`."""
    library = require("huggingface_hub", "hub", failed)
    from huggingface_hub.errors import HFValidationError, HTTPError
    try:
        return getattr(library, function)(*arguments, **options)
    except (HTTPError, HFValidationError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{failed} ({type(error).__name__}: {said})") from None


def model_card(name: str, config: DecoderConfig, vocabulary: Vocabulary, parameters: int, pretrained: bool) -> str:
    """A model card of the hub: what a model is, and how to use it. It has no figures, since these depend on unknown data."""
    kinds = vocabulary.media
    ids = "\n".join(f"| {kind} | {len(vocabulary.range(kind)):,} |" for kind in ("text", "special", *kinds))
    inputs = [f"{kind}: {'continuous features, and codes' if kind in config.features else 'codes'}" for kind in kinds]
    example = "\n".join(['model.caption("photo.jpg")'] * ("image" in kinds) + ['model.caption("sound.wav")'] * ("audio" in kinds)
                        + ['model.generate("a question", max_new_tokens=64)'])
    return f"""---
library_name: mmtx
pipeline_tag: {"any-to-any" if kinds else "text-generation"}
tags: [{", ".join(("mmtx", *kinds))}]
---
{MARK}

# {name.rpartition("/")[2]}

One decoder over one stream of tokens for {_listed(("text", *kinds))}: {parameters:,} parameters, width {config.width}, depth \
{config.depth}{", over the vocabulary of a pretrained language model" if pretrained else ""}.

```python
import mmtx

model = mmtx.load("{name}")
{example}
```

| ids | |
| --- | --- |
{ids}

Inputs: {"; ".join(("text", *inputs))}. What it was trained on, how well it does and what it must not be used for is to be said here.
"""


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
