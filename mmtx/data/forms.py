"""The common forms of a row: which of its fields are media, texts and turns. Fields that are read leave the row.

| form | fields |
| --- | --- |
| caption | media, and "text", "caption", "transcription", "transcript" or "sentence" |
| plain document | "text" alone; with <image> and <audio> where media go |
| chat | "messages" or "conversations" (LLaMA-Factory, ms-swift, TRL, LLaVA, ShareGPT, OpenAI, Qwen), media beside or inside |
| question and answer | "instruction" + "input" + "output" or another of PAIRS, after "history" |

Media are "image", "images", "audio", "audios", "file_name" (image folders), or "audio_filepath" with "offset" and "duration"
(NeMo); an object or a part of a message that names a sound may have the latter two as well. Placeholders <image> or <audio> in
the texts say where media go, and must be as many as the media; without any, media come first in the first user turn. A field
that looks like a medium and is not read is an error. So is an empty media field in a row without other media, except beside a
chat, where data sets mark chats without media in this way.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, NamedTuple

from mmtx.data.fields import pop_number, pop_text, reason, shown, text_of
from mmtx.data.sample import Media, Part, SampleTurn, Text, known_kind, suffix
from mmtx.data.storage import DatasetSource, MemorySource, decode_base64, decode_data_url, display
from mmtx.data.trust import scheme_of
from mmtx.errors import InputError
from mmtx.modality.registry import MODALITIES, media_kinds

FILE_NAME = "file_name"  # a field with a medium, whose extension says its kind
TEXTS = ("caption", "text", "transcription", "transcript", "sentence")  # the first of these in a row is its caption
CHATS = ("messages", "conversations")
PAIRS = (("instruction", "output"), ("query", "response"), ("prompt", "completion"), ("prompt", "response"),
         ("question", "answer"))
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
LOSS_WEIGHTS = ("weight", "loss", "train")  # of a message, in OpenAI, ms-swift and Axolotl: 0 or false leaves it out of the loss
MAX_INSPECTED = 64  # items that are examined of a list or object in an unread field

# Names of fields that hold a medium or its location: sure words, and words that need an ending since they are ambiguous.
VIDEO = ("video", "movie|clip|film")
_NUMBER = r"[_-]?(?:\d+|[a-d])"
_ENDING = r"[_-]?(?:path|file|file_?name|file_?path|url|uri|link|src|bytes|data|content|b64|base64|list|array)s?"


class Names(NamedTuple):
    """The names by which rows refer to media."""

    fields: dict[str, str | None]      # field -> kind of the media in it; None: by its extension
    types: dict[str, str]              # type of a part of a message -> kind of the medium
    placeholder: re.Pattern[str]       # a placeholder of a medium in a text
    embedded: re.Pattern[str]          # a path inside a text, as in the first Qwen-VL
    lookalikes: dict[str, re.Pattern[str]]  # kind -> names of fields that look like media of it

    @property
    def read(self) -> tuple[str, ...]:
        """All names of fields that are read."""
        return (*self.fields, *TEXTS, *CHATS, *dict.fromkeys(name for pair in PAIRS for name in pair), "input", "history",
                "system", "offset", "duration", "key", "id")


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
        re.compile(rf"<(img|{tags})>[^<>\n]{{1,1000}}</\1>"),
        {kind: re.compile(rf"(?:[a-z]+[_-])?(?:(?:{sure})s?(?P<number>{_NUMBER})?(?:{_ENDING})?" +
                          (rf"|(?:{other})s?{_ENDING})" if other else ")"))
         for kind, (sure, other) in words.items()},
    )


Reader = Callable[[Any, str, str], Media]  # the value of a media field, its kind and its name -> the medium


class Placeholder(NamedTuple):
    """A placeholder of a medium of this kind."""

    kind: str


class Message(NamedTuple):
    """A turn whose media may still be placeholders."""

    role: str | None
    parts: list[Part | Placeholder]


def turns_of(row: dict[str, Any], where: str, read: Reader | None, given: Sequence[Media] = (),
             texts: Sequence[str] = TEXTS, empty: Sequence[str] = (), captions: bool = True) -> tuple[SampleTurn, ...]:
    """Remove the turns from a row, leaving its metadata.

    `read` turns the value of a field into a medium; None: all media are `given`, as files beside the row. The caption is the
    first of `texts` that the row has. `empty` names the media fields without a value. Without `captions`, media beside no text are
    a user turn. Raises InputError for a row of no known form, and if a medium is missing or would be dropped.
    """
    beside = list(given) or _row_media(row, where, read)
    chats = [name for name in CHATS if name in row]
    if chats and (clash := [name for name in (*CHATS, "text") if name in row and name != chats[0]]):
        raise InputError(f"{where}: found the fields {[chats[0], *clash]}, expected one of them")
    named = tuple(texts) if beside else ("text",)
    text = next((name for name in named if name in row), None)
    pair = next((pair for pair in PAIRS if all(name in row for name in pair)), None)
    talk = bool(chats) or text is None and pair is not None and isinstance(row[pair[0]], list)
    if empty and not beside and not talk:
        raise InputError(f"{where}: field {empty[0]!r} is empty and no other has a medium, expected one; rows of text alone have no "
                         "such field")
    if chats:
        messages = _system(row, where) + _chat(row.pop(chats[0]), chats[0], where, read, bool(beside))
    elif text is None and pair:
        messages = _system(row, where) + _pair(row, pair, where, read, bool(beside))
    elif beside and not captions and (text is None or not str(row[text]).strip()):
        row.pop(text or "", None)
        messages = [Message("user", list(beside))]
    else:
        messages = _captioned(pop_text(row, named, where), beside)
    turns = _fill_placeholders(messages, beside, where)
    refuse_unread(row, where, {part.kind for turn in turns for part in turn.parts if isinstance(part, Media)})
    return turns


def empty_media(row: Mapping[str, Any], fields: Mapping[str, str | None] | None) -> list[str]:
    """The media fields of a row that are null or "", by their names in the row; `fields` is that of a `DataSource`."""
    given = [(fields or {}).get(name, name) for name in names().fields]
    return [name for name in given if name in row and row[name] in (None, "")]


def _row_media(row: dict[str, Any], where: str, read: Reader) -> list[Media]:
    """The media that the fields of a row name, pictures before sounds."""
    media: list[Media] = []
    fields = names().fields
    if fields.keys().isdisjoint(row):
        return media
    nemo = "audio_filepath" in row
    for kind in media_kinds():
        found = [name for name in fields if fields[name] == kind and name in row]
        if len(found) > 1:
            raise InputError(f"{where}: found the fields {found}, expected one of them")
        for name in found:
            media += _media_of(row.pop(name), kind, name, where, read)
    name = row.get(FILE_NAME)
    if isinstance(name, str) and not media:
        kind = known_kind(name)
        if kind or not suffix(name):
            media = _media_of(row.pop(FILE_NAME), kind or media_kinds()[0], FILE_NAME, where, read)
    sounds = [place for place, medium in enumerate(media) if MODALITIES[medium.kind].cuts]
    if sounds and (nemo or "offset" in row):
        if len(sounds) > 1:
            raise InputError(f"{where}: found {len(sounds)} sounds beside 'offset' or 'duration', expected one")
        media[sounds[0]] = _cut(row, media[sounds[0]], where)
    return media


def _media_of(value: Any, kind: str, at: str, where: str, read: Reader) -> list[Media]:
    if isinstance(value, list):
        return [_medium(item, kind, f"{at}[{place}]", where, read) for place, item in enumerate(value)]
    return [_medium(value, kind, at, where, read)]


def _medium(value: Any, kind: str, at: str, where: str, read: Reader | None) -> Media:
    """The medium of a path or URL, or of an object that holds one, or the bytes in base64."""
    inside = value if isinstance(value, dict) else {}
    value = inside.get("url") or inside.get("path") or value
    if isinstance(data := inside.get("data"), str) and data:
        medium = Media(kind, f"{where}: field {at!r}", _inline(data, decode_base64, shown(data), at, where))
    elif read is None:
        raise InputError(f"{where}: field {at!r} is {shown(value)}, expected no medium other than the file next to this one")
    elif isinstance(value, str) and scheme_of(value) == "data":
        medium = Media(kind, f"{where}: field {at!r}", _inline(value, decode_data_url, display(value), at, where))
    else:
        medium = read(value, kind, at)
    return _cut_inside(inside, medium, at, where)


def _inline(text: str, decode: Callable[[str], bytes], told: str, at: str, where: str) -> MemorySource:
    """The medium that stands in the row itself as a text; errors show it as `told`."""
    try:
        return MemorySource(decode(text))
    except ValueError as error:
        raise InputError(f"{where}: field {at!r} is {told}, expected base64 ({reason(error)})") from None


def _cut(row: dict[str, Any], medium: Media, where: str) -> Media:
    """The part of a sound that "offset" and "duration" of a NeMo manifest select."""
    start, seconds = pop_number(row, "offset", 0, where) or 0.0, pop_number(row, "duration", 0, where)
    if seconds == 0:
        raise InputError(f"{where}: field 'duration' is 0, expected more than 0")
    if not start and seconds is None:
        return medium
    long = "the rest" if seconds is None else f"{seconds} s"
    return replace(medium, name=f"{medium.name} ({long} from {start} s)", start=start, seconds=seconds)


def _cut_inside(given: Mapping[str, Any], medium: Media, at: str, where: str) -> Media:
    """The medium of an object or of a part of a message: of a sound, what "offset" and "duration" there select."""
    known = {name: value for name, value in given.items() if value is not None}
    return _cut(known, medium, f"{where}: field {at!r}") if "offset" in known and MODALITIES[medium.kind].cuts else medium


# -- The forms -----------------------------------------------------------------------------------------------


def _captioned(text: str, media: Sequence[Media]) -> list[Message]:
    if media and names().placeholder.search(text):
        return [Message(None, _split_placeholders(text))]
    return [Message("user", list(media)), Message("assistant", [Text(text)])] if media else [Message(None, [Text(text)])]


def _system(row: dict[str, Any], where: str) -> list[Message]:
    """The instruction of the field "system"; a blank one counts as none."""
    text = row.pop("system", "")
    return [] if isinstance(text, str) and not text.strip() else [Message("system", [Text(text_of(text, where, "system"))])]


def _pair(row: dict[str, Any], pair: tuple[str, str], where: str, read: Reader | None, marked: bool) -> list[Message]:
    question, answer = (row.pop(name) for name in pair)
    if isinstance(question, list) and isinstance(answer, list):  # messages, as in TRL
        return [message for name, some in zip(pair, (question, answer))
                for message in _chat(some, name, where, read, marked)]
    messages = []
    past = row.pop("history", [])
    if not isinstance(past, list) or any(not isinstance(item, list) or len(item) != 2 for item in past):
        raise InputError(f"{where}: field 'history' is {shown(past)}, expected a list of [question, answer]")
    for place, item in enumerate(past):
        messages += [Message(role, _text_parts(text, role, where, f"history[{place}]", marked))
                     for role, text in zip(("user", "assistant"), item)]
    added = row.pop("input", "") if pair[0] == "instruction" else ""
    if isinstance(added, str) and isinstance(question, str):
        question = "\n".join(piece for piece in (question, added) if piece.strip())
    asked = [] if marked and question == "" else _text_parts(question, "user", where, pair[0], marked)
    return [*messages, Message("user", asked), Message("assistant", _text_parts(answer, "assistant", where, pair[1], marked))]


def _chat(messages: Any, name: str, where: str, read: Reader | None, marked: bool) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: field {name!r} is {shown(messages)}, expected a list of messages")
    found = []
    for index, message in enumerate(messages):
        at = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise InputError(f"{where}: field {at!r} is {shown(message)}, expected an object with a role")
        rest = dict(message)
        speaker = rest.pop("role", None) or rest.pop("from", None)
        content_key = "content" if rest.get("content") is not None or "value" not in rest else "value"
        content = rest.pop(content_key, None)
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise InputError(f"{where}: field {at!r} has role {shown(speaker)}, expected user, assistant or system")
        if isinstance(content, list) and content:
            parts = [part for n, item in enumerate(content)
                     for part in _part(item, where, f"{at}.{content_key}[{n}]", read, marked and role != "system")]
        else:
            parts = _text_parts(content, role, where, f"{at}.{content_key}", marked)
        for weight in LOSS_WEIGHTS if role == "assistant" else ():
            if (value := rest.get(weight)) is not None and not value:
                raise InputError(f"{where}: field '{at}.{weight}' is {shown(value)}, but every answer is trained on; expected rows "
                                 "without such answers")
        refuse_unread(rest, where, set(), at + ".")
        found.append(Message(role, parts))
    return found


def _part(item: Any, where: str, at: str, read: Reader | None, marked: bool) -> list[Part | Placeholder]:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        text = text_of(item.get("text"), where, f"{at}.text")
        rest = {name: value for name, value in item.items() if name not in ("type", "text")}
        refuse_unread(rest, where, set(), at + ".")
        return _split_placeholders(text) if marked else [Text(text)]
    if not isinstance(kind, str) or (medium := names().types.get(kind)) is None:
        raise InputError(f"{where}: field '{at}.type' is {shown(kind)}, expected text, {', '.join(names().types)}")
    given = [name for name in dict.fromkeys((kind, medium, f"{medium}_url", "url", "path", "base64", "source"))
             if item.get(name) is not None]
    if not given:
        return [Placeholder(medium)]  # of a medium beside the messages
    value = {"data": item[given[0]]} if given[0] == "base64" else item[given[0]]
    rest = {name: value for name, value in item.items() if name not in ("type", given[0])}
    refuse_unread(rest, where, set(), at + ".")
    return [_cut_inside(rest, _medium(value, medium, f"{at}.{given[0]}", where, read), at, where)]


def _text_parts(text: Any, role: str, where: str, at: str, marked: bool) -> list[Part | Placeholder]:
    """The parts of a turn of text alone; user turns are split at placeholders even without media, to report missing ones."""
    text = text_of(text, where, at)
    if role == "user" and (found := names().embedded.search(text)):
        raise InputError(f"{where}: field {at!r} has {shown(found[0])} in its text, expected <image> or <audio> there and the "
                         "path in a field 'images' or 'audios'")
    return _split_placeholders(text) if role == "user" or marked and role != "system" else [Text(text)]


def _split_placeholders(text: str) -> list[Part | Placeholder]:
    """A text split at its placeholders; a line break next to a placeholder is dropped."""
    parts: list[Part | Placeholder] = []
    for place, piece in enumerate(names().placeholder.split(text)):
        if place % 2:
            parts.append(Placeholder(piece))
            continue
        if place:
            piece = piece.removeprefix("\n")
        if piece.strip():
            parts.append(Text(piece))
    return [Text(part.text.removesuffix("\n")) if isinstance(part, Text) and isinstance(after, Placeholder) else part
            for part, after in zip(parts, [*parts[1:], None])]


def _stream_role(role: str | None) -> Literal["user", "assistant"] | None:
    """The role in the stream, which has no system role: an instruction is a user turn of its own."""
    return "user" if role in ("user", "system") else "assistant" if role == "assistant" else None


def _fill_placeholders(messages: Sequence[Message], beside: Sequence[Media], where: str) -> tuple[SampleTurn, ...]:
    """Messages as turns: media beside them fill the placeholders, or come first in the first user turn or plain document."""
    placeholders = [part.kind for message in messages for part in message.parts if isinstance(part, Placeholder)]
    if not placeholders and not beside:
        return tuple(SampleTurn(_stream_role(role), tuple(part for part in parts if not isinstance(part, Placeholder)))
                     for role, parts in messages)
    there = {id(part) for message in messages for part in message.parts}
    waiting = [medium for medium in beside if id(medium) not in there]
    first = [medium for medium in waiting if medium.kind not in placeholders]
    queues = {kind: deque(medium for medium in waiting if medium.kind == kind) for kind in placeholders}
    for kind, queue in queues.items():
        if len(queue) != placeholders.count(kind):
            raise InputError(f"{where}: found {placeholders.count(kind)} <{kind}> placeholders for {len(queue)} media of kind "
                             f"{kind}, expected the same number of both")
    turns = []
    for message in messages:
        role = _stream_role(message.role)
        if message.role in ("user", None):
            message, first = Message(role, [*first, *message.parts]), []
        turns.append(SampleTurn(role, tuple(queues[p.kind].popleft() if isinstance(p, Placeholder) else p for p in message.parts)))
    return (SampleTurn("user", tuple(first)), *turns) if first else tuple(turns)


# -- Media that must not be dropped --------------------------------------------------------------------------


def refuse_unread(row: dict[str, Any], where: str, kinds: set[str], prefix: str = "") -> None:
    """Raise InputError if a field that was not read looks like a medium; `kinds` are those of the media that were read.

    Other fields may hold the name or URL of a medium that was read; these stay metadata.
    """
    for name, value in row.items():
        if isinstance(value, (str, list, dict, bytes, DatasetSource)) and value and (found := _unread(name, value, kinds)):
            kind, at, value = found
            what = "a video, which is" if kind == "video" else "which looks like a medium and is"
            raise InputError(f"{where}: field {prefix + at!r} is {shown(value)}, {what} not read; expected pictures and "
                             f"sounds in {', '.join(names().fields)}, or in what `fields` names")


def _unread(name: str, value: Any, kinds: set[str]) -> tuple[str | None, str, Any] | None:
    """Kind, name and value of an unread medium in a field, if there is one."""
    kind, numbered = _kind_by_name(name, media_kinds())
    if kind and (kind not in kinds or numbered or isinstance(value, list) and len(value) > 1):
        return kind, name, value
    return _by_value(name, value, kinds)


@lru_cache(4096)
def _kind_by_name(name: str, kinds: tuple[str, ...]) -> tuple[str | None, bool]:
    """The kind of medium that the name of a field suggests, and whether the name is numbered."""
    name = name.lower()
    if kind := known_kind("x." + name):  # columns of WebDataset shards: "jpg", "wav"
        return kind, False
    for kind, pattern in _names(kinds).lookalikes.items():
        if match := pattern.fullmatch(name):
            return kind, bool(match["number"])
    return None, False


def _by_value(name: str, value: Any, kinds: set[str], depth: int = 0) -> tuple[str | None, str, Any] | None:
    if isinstance(value, str):
        kind = _kind_by_value(value)
        return (kind, name, value) if kind and kind not in kinds else None
    if isinstance(value, (bytes, DatasetSource)):
        return None, name, value
    if isinstance(value, dict):
        items: Iterable = ((f"{name}.{key}", item) for key, item in value.items())
    else:
        items = ((f"{name}[{place}]", item) for place, item in enumerate(value))
    for at, item in islice(items, MAX_INSPECTED):
        if isinstance(item, (str, list, dict, bytes, DatasetSource)) and depth < 4:
            if found := _by_value(at, item, kinds, depth + 1):
                return found
    return None


def _kind_by_value(text: str) -> str | None:
    """The kind of medium that a text refers to, if it is a path, URL or data URL of one."""
    if text.startswith("data:"):
        kind = text[5:].partition("/")[0]
        return kind if kind in names().lookalikes else None
    if "." not in text[-6:] and "?" not in text and "#" not in text or len(text) > 4096 or "\n" in text:
        return None
    return known_kind(text.partition("#")[0])
