"""The common forms of a row: which of its fields are media, texts and turns. Fields that are read leave the row.

| form | fields |
| --- | --- |
| caption | media, and "text", "caption", "transcription", "transcript" or "sentence" |
| plain document | "text" alone; with <image> and <audio> where media go |
| chat | "messages" or "conversations" (LLaMA-Factory, ms-swift, TRL, LLaVA, ShareGPT, OpenAI, Qwen), media beside or inside |
| question and answer | "instruction" + "input" + "output" or another of PAIRS, after "history" |

Media are "image", "images", "audio", "audios", "file_name" (image folders), or "audio_filepath" with "offset" and "duration"
(NeMo); an object or a part of a message that names a sound may have the latter two as well, and beside "offset", "end" may stand
for "duration". Placeholders <image> or <audio> in the texts say where media go, and must be as many as the media; without any,
media come first in the first user turn, but a user turn with placeholders of another program, such as [IMG], is an error. A part
of a message may hold the codes of a medium in place of a file: {"type": "audio", "codes": [[17, 4], ...]}, a list for each row or
time step. A field that looks like a medium and is not read is an error. So is an empty media field in a row without other media,
except beside a chat, where data sets mark chats without media in this way.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from mmtx.data.field_names import CHATS, PAIRS, TEXTS, names
from mmtx.data.fields import pop_text, shown, text_of
from mmtx.data.row_media import MediaReader
from mmtx.data.sample import Codes, Media, Part, SampleTurn, Text
from mmtx.data.unread import refuse_unread
from mmtx.errors import InputError

# The roles of chats, and those of the stream, which has no system role: an instruction is a user turn of its own.
CHAT_ROLES: dict[str | None, Literal["user", "assistant"]] = {
    "user": "user", "assistant": "assistant", "system": "user", "developer": "user"}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system", "developer": "system"}
LOSS_WEIGHTS = ("weight", "loss", "train")  # of a message, in OpenAI, ms-swift and Axolotl: 0 or false leaves it out of the loss
CALLS = ("tool_calls", "function_call")  # of an answer in OpenAI's chats, for which a turn has no place


class Placeholder(NamedTuple):
    """A placeholder of a medium of this kind."""

    kind: str


class Message(NamedTuple):
    """A turn whose media may still be placeholders."""

    role: str | None
    parts: list[Part | Placeholder]


def turns_of(row: dict[str, Any], reader: MediaReader, given: Sequence[Media] = (), empty: Sequence[str] = (),
             captions: bool = True, missing: Sequence[str] = ()) -> tuple[SampleTurn, ...]:
    """Remove the turns from a row, leaving its metadata.

    `reader` reads the media that the row names; `given` are those of files beside it. `empty` names the media fields without a
    value, `missing` the texts. Without `captions`, media beside no text are a user turn. Raises InputError for a row of no known
    form, and if a medium is missing or would be dropped.
    """
    where, beside = reader.where, list(given) or reader.of_row(row)
    chats = [name for name in CHATS if name in row]
    if chats and (clash := [name for name in (*CHATS, "text") if name in row and name != chats[0]]):
        raise InputError(f"{where}: found the fields {[chats[0], *clash]}, expected one of them")
    named = TEXTS if beside else ("text",)
    text = next((name for name in named if name in row), None)
    pair = next((pair for pair in PAIRS if all(name in row for name in pair)), None)
    talk = bool(chats) or text is None and pair is not None and isinstance(row[pair[0]], list)
    if empty and not beside and not talk:
        raise InputError(f"{where}: field {empty[0]!r} is empty and no other has a medium, expected one; rows of text alone have no "
                         "such field")
    if chats:
        messages = _system(row, where) + _chat(row.pop(chats[0]), chats[0], reader, bool(beside))
    elif text is None and pair:
        messages = _system(row, where) + _pair(row, pair, reader, bool(beside))
    elif beside and not captions and (text is None or not str(row[text]).strip()):
        row.pop(text or "", None)
        messages = [Message("user", list(beside))]
    elif not beside and text is None and not missing:
        raise InputError(f"{where}: found neither a medium nor a 'text' in the fields {shown(sorted(row))}; expected "
                         f"{', '.join(names().fields)} or text, or in `fields` what they are called here, as in image: NAME")
    else:
        messages = _captioned(pop_text(row, named, where, missing), beside)
    turns = _fill_placeholders(messages, beside, where)
    refuse_unread(row, where, {part.kind for turn in turns for part in turn.parts if isinstance(part, Media)})
    return turns


def _captioned(text: str, media: Sequence[Media]) -> list[Message]:
    if media and names().placeholder.search(text):
        return [Message(None, _split_placeholders(text))]
    return [Message("user", list(media)), Message("assistant", [Text(text)])] if media else [Message(None, [Text(text)])]


def _system(row: dict[str, Any], where: str) -> list[Message]:
    """The instruction of the field "system"; a blank one counts as none."""
    text = row.pop("system", "")
    return [] if isinstance(text, str) and not text.strip() else [Message("system", [Text(text_of(text, where, "system"))])]


def _pair(row: dict[str, Any], pair: tuple[str, str], reader: MediaReader, marked: bool) -> list[Message]:
    where = reader.where
    question, answer = (row.pop(name) for name in pair)
    if isinstance(question, list) and isinstance(answer, list):  # messages, as in TRL
        return [message for name, some in zip(pair, (question, answer))
                for message in _chat(some, name, reader, marked)]
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


def _chat(messages: Any, name: str, reader: MediaReader, marked: bool) -> list[Message]:
    where = reader.where
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
        if role == "assistant" and (call := next((field for field in CALLS if rest.get(field)), None)):
            raise InputError(f"{where}: field '{at}.{call}' is {shown(rest[call])}, expected answers without calls of tools")
        if isinstance(content, list) and content:
            parts = [part for n, item in enumerate(content)
                     for part in _part(item, f"{at}.{content_key}[{n}]", reader, marked and role != "system")]
        else:
            parts = _text_parts(content, role, where, f"{at}.{content_key}", marked)
        for weight in LOSS_WEIGHTS if role == "assistant" else ():
            if (value := rest.get(weight)) is not None and not value:
                raise InputError(f"{where}: field '{at}.{weight}' is {shown(value)}, but every answer is trained on; expected rows "
                                 "without such answers")
        refuse_unread(rest, where, set(), at + ".")
        found.append(Message(role, parts))
    return found


def _part(item: Any, at: str, reader: MediaReader, marked: bool) -> list[Part | Placeholder]:
    where, kind = reader.where, item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        text = text_of(item.get("text"), where, f"{at}.text")
        rest = {name: value for name, value in item.items() if name not in ("type", "text")}
        refuse_unread(rest, where, set(), at + ".")
        return _split_placeholders(text) if marked else [Text(text)]
    if not isinstance(kind, str) or (medium := names().types.get(kind)) is None:
        raise InputError(f"{where}: field '{at}.type' is {shown(kind)}, expected text, {', '.join(names().types)}")
    if "codes" in item:
        return [_codes(item["codes"], medium, where, f"{at}.codes")]
    given = [name for name in dict.fromkeys((kind, medium, f"{medium}_url", "url", "path", "base64", "source"))
             if item.get(name) is not None]
    if not given:
        return [Placeholder(medium)]  # of a medium beside the messages
    value = {"data": item[given[0]]} if given[0] == "base64" else item[given[0]]
    rest = {name: value for name, value in item.items() if name not in ("type", given[0])}
    refuse_unread(rest, where, set(), at + ".")
    return [reader.cut_inside(rest, reader.medium(value, medium, f"{at}.{given[0]}"), at)]


def _codes(value: Any, kind: str, where: str, at: str) -> Codes:
    rows = value if isinstance(value, list) and value else [None]
    whole = lambda row: isinstance(row, list) and row and all(type(code) is int and 0 <= code < 2**31 for code in row)
    if not all(whole(row) and len(row) == len(rows[0]) for row in rows):
        raise InputError(f"{where}: field {at!r} is {shown(value)}, expected the codes of {kind} as a list of equally long lists")
    return Codes.of(kind, rows)


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


def _fill_placeholders(messages: Sequence[Message], beside: Sequence[Media], where: str) -> tuple[SampleTurn, ...]:
    """Messages as turns: media beside them fill the placeholders, or come first in the first user turn or plain document."""
    placeholders = [part.kind for message in messages for part in message.parts if isinstance(part, Placeholder)]
    if not placeholders and not beside:
        return tuple(SampleTurn(CHAT_ROLES.get(role), tuple(part for part in parts if not isinstance(part, Placeholder)))
                     for role, parts in messages)
    there = {id(part) for message in messages for part in message.parts}
    waiting = [medium for medium in beside if id(medium) not in there]
    first = [medium for medium in waiting if medium.kind not in placeholders]
    texts = (part.text for message in messages if message.role == "user" for part in message.parts if isinstance(part, Text))
    if first and (found := next(filter(None, map(names().foreign.search, texts)), None)):
        kind = first[0].kind
        raise InputError(f"{where}: found {shown(found[0])} in a user turn, but no <{kind}>, expected <{kind}> where each medium of "
                         f"kind {kind} goes")
    queues = {kind: deque(medium for medium in waiting if medium.kind == kind) for kind in placeholders}
    for kind, queue in queues.items():
        if len(queue) != placeholders.count(kind):
            raise InputError(f"{where}: found {placeholders.count(kind)} <{kind}> placeholders for {len(queue)} media of kind "
                             f"{kind}, expected the same number of both")
    turns = []
    for message in messages:
        role = CHAT_ROLES.get(message.role)
        if message.role in ("user", None):
            message, first = Message(role, [*first, *message.parts]), []
        turns.append(SampleTurn(role, tuple(queues[p.kind].popleft() if isinstance(p, Placeholder) else p for p in message.parts)))
    return (SampleTurn("user", tuple(first)), *turns) if first else tuple(turns)
