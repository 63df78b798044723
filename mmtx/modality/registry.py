"""What a modality is, described once: documents, grammar, data, pipeline, training and reports loop over `MODALITIES`.

A further modality is one more `register(Modality(...))`, also in a file outside of this package: `mmtx COMMAND --plugin FILE`
imports it. Nothing heavy is imported here.
"""

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmtx.errors import InputError
from mmtx.files import PARTS
from mmtx.plugins import import_file

RESERVED = ("special", "any", "document", "video")  # words that mean something else where a kind is named


@dataclass(frozen=True)
class Modality:
    """One kind of media. A class or a function is given itself, or as "module:name", which is imported when it is needed.

    Args:
        kind: one lower-case word; it names the modality everywhere: <kind> and </kind> in the stream, `tokenizers.kind`,
            `out="kind"`.
        layout: how the stream writes its codes. "pieces": as they are (text). "grid": rows and columns, whose numbers stand before
            the codes. "steps": time steps of `bands` codes each, as many as there are.
        tokenizers: the word `kind` in the config.json of a tokenizer -> its class, a `Tokenizer`.
        read: ``(tokenizer, data, name, **options)`` -> the medium that the tokenizer takes. `data` are the bytes of a file, or what
            the caller of Python has; errors call it `name`, which may be None then. Options are `start`, `seconds`
            and `speed` where `cuts`.
        show: (tokenizer, codes) -> what the Python API returns; a method `save(path)` lets `mmtx generate --file` write it. By
            default what `decode` gives, as an array.
        picture: (tokenizer, codes) -> uint8 (3, H, W) to look at in samples of a run; None: it cannot be seen.
        controls: ``(data, name, **options)`` -> name -> features (D,), the ways in which a nearest-neighbour control compares media.
        extensions: of files of this kind, with their dot.
        known: of files that are of this kind but cannot be read.
        sniff: whether a file that begins with these bytes (64 at most) is of this kind.
        fields: names of fields of a row that hold such media, by default the kind and its plural.
        types: of parts of a message that hold one.
        words: patterns of field names that hold one by their look, alone and with an ending.
        cuts: whether a row may mean a piece of a medium, by `start` and `seconds`.
        shipped: whether a tokenizer of it comes with mmtx.
        colour: in `mmtx inspect`, of ANSI.
    """

    kind: str
    layout: Literal["pieces", "grid", "steps"]
    tokenizers: Mapping[str, type | str]
    read: Callable[..., Any] | str | None = None
    show: Callable[..., Any] | str | None = None
    picture: Callable[..., Any] | str | None = None
    controls: Callable[..., Any] | str | None = None
    extensions: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    sniff: Callable[[bytes], bool] | str | None = None
    fields: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    words: tuple[str, str] = ("", "")
    cuts: bool = False
    shipped: bool = False
    colour: str = "36"
    _found: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if not re.fullmatch("[a-z][a-z0-9_]{0,30}", self.kind) or self.kind in RESERVED:
            raise InputError(f"modality: found the kind {self.kind!r:.60}, expected a lower-case word other than "
                             f"{', '.join(RESERVED)}")
        if self.layout not in ("pieces", "grid", "steps") or (self.layout == "pieces") != (self.kind == "text"):
            raise InputError(f"modality {self.kind!r}: found layout {self.layout!r}, expected 'grid' or 'steps'")
        for name, default in (("fields", (self.kind, f"{self.kind}s")), ("words", (self.kind, "")),
                              ("types", (self.kind, f"{self.kind}_url", f"input_{self.kind}"))):
            if not any(getattr(self, name)):
                object.__setattr__(self, name, default)

    def get(self, name: str) -> Any:
        """What a field stands for, imported if it was given as "module:name"; None where it was not given."""
        value = getattr(self, name)
        return self._import(value) if isinstance(value, str) else value

    def tokenizer(self, word: str) -> type:
        """The class of tokenizers whose config.json has this `kind`."""
        found = self.tokenizers[word]
        return self._import(found) if isinstance(found, str) else found

    def _import(self, place: str) -> Any:
        if place not in self._found:
            module, name = place.split(":")
            self._found[place] = getattr(importlib.import_module(module), name)
        return self._found[place]


MODALITIES: dict[str, Modality] = {}  # by kind, text first
PLUGINS: dict[str, str] = {}  # name of each module that `load_plugin` imported -> its path as given


def register(modality: Modality) -> Modality:
    """Make a modality known to all of mmtx, for as long as the process lives.

    Raises InputError for a kind, an extension or a field that another one has, and for a class that does not keep the contract.
    """
    at = f"modality {modality.kind!r}"
    if modality.kind in MODALITIES:
        raise InputError(f"{at}: there already, expected another kind than {', '.join(MODALITIES)}")
    for other in MODALITIES.values():
        for name in ("extensions", "known", "fields", "types", "tokenizers"):
            if clash := sorted(set(getattr(modality, name)) & set(getattr(other, name))):
                raise InputError(f"{at}: found {clash[0]!r} in {name}, which {other.kind!r} has, expected others")
    for name in ("read", "show", "picture", "controls", "sniff"):
        given, needed = getattr(modality, name), name == "read" and modality.layout != "pieces"
        if not callable(given) and not isinstance(given, str) and (needed or given is not None):
            raise InputError(f"{at}: found {name} {given!r:.40}, expected a function")
    for word, cls in modality.tokenizers.items():
        if not isinstance(cls, str):
            _check_class(cls, f"{at}: tokenizer {word!r}", modality)
    if not modality.tokenizers:
        raise InputError(f"{at}: found no tokenizers, expected a class by the word `kind` of its config.json")
    MODALITIES[modality.kind] = modality
    PARTS.add(modality.kind)
    return modality


def _check_class(cls: type, at: str, modality: Modality) -> None:
    from mmtx.modality.base import MediaTokenizer

    if not isinstance(cls, type) or not issubclass(cls, MediaTokenizer):
        raise InputError(f"{at}: found {getattr(cls, '__name__', cls)!r:.60}, expected a class that inherits from "
                         "mmtx.modality.base.MediaTokenizer")
    if lacking := sorted(cls.__abstractmethods__):
        raise InputError(f"{at}: {cls.__name__} lacks {', '.join(lacking)}")
    if getattr(cls, "kind", None) != modality.kind:
        raise InputError(f"{at}: {cls.__name__} has the kind {getattr(cls, 'kind', None)!r:.40}, expected {modality.kind!r}")


def media_kinds() -> tuple[str, ...]:
    """All kinds but text."""
    return tuple(kind for kind, modality in MODALITIES.items() if modality.layout != "pieces")


def unknown(kind: str, where: object) -> InputError:
    """What to say where a file names a kind that nothing is registered for."""
    return InputError(f"{where}: found the modality {ascii(kind)[:40]}, which is none of {', '.join(MODALITIES)}; expected "
                      "--plugin FILE (in Python mmtx.load_plugin) with the file that registers it")


def load_plugin(path: str | Path) -> None:
    """Import a Python file that registers a modality, under the name of the file; a second time nothing happens.

    Raises InputError for a file that cannot be imported, registers no modality, or has the name of another module.
    """
    at, before, known = f"plugin {path}", len(MODALITIES), Path(path).stem in sys.modules
    import_file(path, at)
    if known:
        return
    if len(MODALITIES) == before:
        raise InputError(f"{at}: registered no modality, expected a call of mmtx.modality.registry.register")
    PLUGINS[Path(path).stem] = str(path)


register(Modality(
    "text", "pieces",
    {"text": "mmtx.modality.text:TextTokenizer", "pretrained text": "mmtx.modality.pretrained_text:PretrainedText"},
    words=("text", ""), shipped=True, colour="32"))
register(Modality(
    "image", "grid",
    {"image": "mmtx.modality.image:ImageTokenizer", "pretrained image": "mmtx.modality.pretrained:PretrainedImage"},
    read="mmtx.data.media:read_image",
    show="mmtx.medium:to_pil",
    picture="mmtx.modality.image:to_picture",
    controls="mmtx.report:picture_controls",
    extensions=(".webp", ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"),
    known=(".jxl", ".jp2", ".j2k", ".svg", ".ico", ".icns", ".psd", ".tga", ".dds", ".exr", ".hdr", ".pbm", ".pgm", ".ppm",
           ".pnm", ".jpe", ".apng", ".dib", ".xcf", ".dng", ".cr2", ".cr3", ".nef", ".arw"),
    sniff="mmtx.data.formats:is_image",
    words=("image|img|picture|photo", "pic|frame"),
    shipped=True,
    colour="34",
))
register(Modality(
    "audio", "steps",
    {"audio": "mmtx.modality.audio:AudioTokenizer", "pretrained audio": "mmtx.modality.pretrained:PretrainedAudio"},
    read="mmtx.data.media:read_audio",
    show="mmtx.medium:to_sound",
    controls="mmtx.report:sound_controls",
    # Without .mp4, .mov and .mkv: a folder's videos are not its sounds.
    extensions=(".ogg", ".oga", ".opus", ".wav", ".flac", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".sph",
                ".m4a", ".m4b", ".aac", ".webm", ".weba", ".mka"),
    known=(".spx", ".wma", ".amr", ".snd", ".mp2", ".ac3", ".ape", ".wv", ".rf64", ".mid", ".midi"),
    sniff="mmtx.data.formats:is_audio",
    fields=("audio", "audios", "audio_filepath"),
    words=("audio|sound|wav", "speech|voice|music|song|recording"),
    cuts=True,
    shipped=True,
    colour="35",
))
