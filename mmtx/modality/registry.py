"""Modalities, each described once: documents, grammar, data, pipeline, training and reports loop over `MODALITIES`.

To add one, call `register(Modality(...))`; a file outside the package, imported with `mmtx COMMAND --plugin FILE`, may do so,
too. Nothing heavy is imported here.
"""

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmtx.errors import InputError
from mmtx.plugins import import_file
from mmtx.saved_folder import PARTS
from mmtx.schema import typed

RESERVED = ("special", "any", "document", "video")  # words with another meaning where a kind is expected


@typed
@dataclass(frozen=True)
class Modality:
    """One kind of media. Classes and functions are given directly, or as "module:name", which is imported on first use.

    Args:
        kind: one lower-case word; it names the modality everywhere: <kind> and </kind> in the stream, `tokenizers.kind`,
            `out="kind"`.
        layout: how the stream arranges its codes. "pieces": as they are (text). "grid": rows and columns, preceded by their
            numbers. "steps": any number of time steps of `bands` codes each.
        tokenizers: the word `kind` in a tokenizer's config.json -> its class, a `Tokenizer`.
        read: ``(tokenizer, data, name, **options)`` -> the medium as the tokenizer takes it. `data` is the bytes of a file, or an
            object passed to the Python API; errors call it `name`, which may be None for objects. Options are `start`, `seconds`,
            `speed` and `semitones` if `cuts`.
        show: (tokenizer, codes) -> what the Python API returns; if that has a method `save(path)`, `mmtx generate --file` can
            write it. By default the result of `decode` as an array.
        picture: (tokenizer, codes) -> uint8 (3, H, W) to show in samples of a run; None: it cannot be shown.
        controls: ``(data, name, **options)`` -> {name: features (D,)}, by which nearest-neighbour controls compare media.
        extensions: of files of this kind, with their dot.
        known: extensions of files of this kind that cannot be read.
        sniff: whether a file that begins with these bytes (64 at most) is of this kind.
        fields: names of row fields that hold such media; by default the kind and its plural.
        types: types of message parts that hold such a medium.
        words: regular expressions of words in names of fields that probably hold such media: those that suffice alone, and those
            that need an ending such as "_path".
        cuts: whether a row may select a piece of a medium with `start` and `seconds`.
        shipped: whether mmtx comes with a tokenizer for it.
        colour: ANSI colour code in `mmtx inspect`.
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
        if (self.layout == "pieces") != (self.kind == "text"):
            raise InputError(f"modality {self.kind!r}: found layout {self.layout!r}, expected 'grid' or 'steps'")
        at = f"modality {self.kind!r}"
        for extension in (*self.extensions, *self.known):
            if extension in (".txt", ".json"):
                raise InputError(f"{at}: found the extension {extension!r}, which captions have, expected another")
            if not extension.startswith(".") or extension != extension.lower():
                raise InputError(f"{at}: found the extension {extension!r:.40}, expected one in lower case with its dot")
        for name, default in (("fields", (self.kind, f"{self.kind}s")), ("words", (self.kind, "")),
                              ("types", (self.kind, f"{self.kind}_url", f"input_{self.kind}"))):
            if not any(getattr(self, name)):
                object.__setattr__(self, name, default)

    def get(self, name: str) -> Any:
        """The value of a field, imported if it was given as "module:name"; None if it was not given."""
        value = getattr(self, name)
        return self._import(value) if isinstance(value, str) else value

    def tokenizer(self, word: str) -> type:
        """The tokenizer class for this word as `kind` in config.json."""
        found = self.tokenizers[word]
        return self._import(found) if isinstance(found, str) else found

    def _import(self, place: str) -> Any:
        if place not in self._found:
            module, name = place.split(":")
            self._found[place] = getattr(importlib.import_module(module), name)
        return self._found[place]


MODALITIES: dict[str, Modality] = {}  # by kind, text first
PLUGINS: dict[str, str] = {}  # name of each module that `load_plugin` imported -> its path as given


@typed
def register(modality: Modality) -> Modality:
    """Make a modality known to all of mmtx, for the lifetime of the process.

    Raises InputError if another modality has its kind or one of its extensions, fields, types or tokenizers, or if a class does not
    implement the contract.
    """
    at = f"modality {modality.kind!r}"
    if modality.kind in MODALITIES:
        raise InputError(f"{at}: there already, expected another kind than {', '.join(MODALITIES)}")
    for other in MODALITIES.values():
        for name in ("extensions", "known", "fields", "types", "tokenizers"):
            if clash := sorted(set(getattr(modality, name)) & set(getattr(other, name))):
                raise InputError(f"{at}: found {clash[0]!r} in {name}, which {other.kind!r} already uses, expected others")
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
    """All kinds except text."""
    return tuple(kind for kind, modality in MODALITIES.items() if modality.layout != "pieces")


def unknown(kind: str, where: object) -> InputError:
    """The error for a file that names a kind that is not registered."""
    return InputError(f"{where}: found the modality {ascii(kind)[:40]}, which is none of {', '.join(MODALITIES)}; expected "
                      "--plugin FILE (in Python mmtx.load_plugin) with the file that registers it")


@typed
def load_plugin(path: str | Path) -> None:
    """Import a Python file that registers a modality, under the file's name; a second call does nothing.

    Raises InputError if the file cannot be imported, registers no modality, or has the name of another module.
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
