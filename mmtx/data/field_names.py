"""The names of fields that are read from rows, and of those that look like media."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from mmtx.data.read_options import ReadOptions
from mmtx.data.sample import known_kind
from mmtx.modality.registry import MODALITIES, media_kinds

FILE_NAME = "file_name"  # a field with a medium, whose extension says its kind
TEXTS = ("caption", "text", "transcription", "transcript", "sentence")  # the first of these in a row is its caption
CHATS = ("messages", "conversations")
PAIRS = (("instruction", "output"), ("query", "response"), ("prompt", "completion"), ("prompt", "response"),
         ("question", "answer"))
PREFERENCES = ("chosen", "rejected", "rejected_response")

# Names of fields that hold a medium or its location: sure words, and words that need an ending since they are ambiguous.
VIDEO = ("video", "movie|clip|film")
_NUMBER = r"[_-]?(?:\d+|[a-d])"
_ENDING = r"[_-]?(?:path|file|file_?name|file_?path|url|uri|link|src|bytes|data|content|b64|base64|list|array)s?"


class Names(NamedTuple):
    """The names by which rows refer to media."""

    fields: dict[str, str | None]      # field -> kind of the media in it; None: by its extension
    types: dict[str, str]              # type of a part of a message -> kind of the medium
    placeholder: re.Pattern[str]       # a placeholder of a medium in a text
    foreign: re.Pattern[str]           # a placeholder of another program, such as <|image_pad|>, [IMG] or <image 1>
    embedded: re.Pattern[str]          # a path inside a text, as in the first Qwen-VL
    lookalikes: dict[str, re.Pattern[str]]  # kind -> names of fields that look like media of it

    @property
    def read(self) -> tuple[str, ...]:
        """All names of fields that are read."""
        return (*self.fields, *TEXTS, *CHATS, *dict.fromkeys(name for pair in PAIRS for name in pair), "input", "history",
                *PREFERENCES, "system", "offset", "duration", "end", "key", "id")


def names() -> Names:
    """The names of all registered modalities."""
    return _names(media_kinds())


@lru_cache
def _names(kinds: tuple[str, ...]) -> Names:
    modalities, tags = [MODALITIES[kind] for kind in kinds], "|".join((*kinds, "video"))
    words = {**{modality.kind: modality.words for modality in modalities}, "video": VIDEO}
    return Names(
        {**{name: modality.kind for modality in modalities for name in modality.fields}, FILE_NAME: None},
        {name: modality.kind for modality in modalities for name in modality.types},
        re.compile(f"<({tags})>"),
        re.compile(rf"<\|(?:{tags}|vision)(?:_?\d+|_start|_bos|_pad)?\|>|<(?:start_of_)?(?:{tags})(?:[_ ]?\d+|here|_placeholder|"
                   rf"_soft_token)?>|\[(?:img|{tags})\]", re.IGNORECASE),
        re.compile(rf"<(img|{tags})>[^<>\n]{{1,1000}}</\1>"),
        {kind: re.compile(rf"(?:[a-z]+[_-])?(?:(?:{sure})s?(?P<number>{_NUMBER})?(?:{_ENDING})?" +
                          (rf"|(?:{other})s?{_ENDING})" if other else ")"))
         for kind, (sure, other) in words.items()},
    )


def empty_media(row: Mapping[str, Any], options: ReadOptions) -> list[str]:
    """The media fields of a row that are null or "", by their names in the row."""
    given = [(options.fields or {}).get(name, name) for name in names().fields]
    return [name for name in given if name in row and row[name] in (None, "")]


def missing_texts(row: Mapping[str, Any], options: ReadOptions) -> list[str]:
    """The texts of a row that are null, or that `fields` maps to a name that is not there; by their names in the row."""
    fields = options.fields or {}
    texts = (*TEXTS, *CHATS, *(name for pair in PAIRS for name in pair))
    given = [(name in fields, fields.get(name, name)) for name in dict.fromkeys(texts)]
    return [name for mapped, name in given if name is not None and row.get(name) is None and (mapped or name in row)]


@lru_cache(4096)
def kind_by_name(name: str, kinds: tuple[str, ...]) -> tuple[str | None, bool]:
    """The kind of medium that the name of a field suggests, and whether the name is numbered."""
    name = name.lower()
    if kind := known_kind("x." + name):  # columns of WebDataset shards: "jpg", "wav"
        return kind, False
    for kind, pattern in _names(kinds).lookalikes.items():
        if match := pattern.fullmatch(name):
            return kind, bool(match["number"])
    return None, False
