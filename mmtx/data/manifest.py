"""Manifests: rows of JSON, {"image"|"audio": path, "text": ...}, {"text": ...} or {"messages": [...]}."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from mmtx.data.fields import attempt, json_object, pop_text, shown, text_of
from mmtx.data.folder import answered
from mmtx.data.sample import Media, Part, Sample, SampleTurn, Text, kind_of
from mmtx.data.storage import DatasetSource, FileSource, display, folder_of, is_url, open_binary, uncached
from mmtx.data.trust import Base
from mmtx.errors import InputError

CONTENT = {"image": "image", "image_url": "image", "audio": "audio", "audio_url": "audio"}  # part -> kind


def read_manifest(path: str, trusted: bool = False) -> Iterator[Sample | InputError]:
    with open_binary(path) as file:
        base = Base(folder_of(uncached(path)), file.private, trusted)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield attempt(partial(_row, line, base, number, f"{display(path)} row {number}"))


def _row(line: bytes, base: Base, number: int, where: str) -> Sample:
    return parse_row(json_object(line, where), base, number, where)


def parse_row(row: dict[str, Any], base: Base, number: int, where: str) -> Sample:
    key = next((row.pop(name) for name in ("key", "id") if name in row), number)
    if not isinstance(key, (str, int)):
        raise InputError(f"{where}: the key is {shown(key)}, expected a string or a number")
    if "messages" in row:
        clash = sorted({"text", "image", "audio"} & row.keys())
        if clash:
            raise InputError(f"{where}: field 'messages' beside {clash}, expected these inside the messages")
        turns = _chat(row.pop("messages"), base, where)
    else:
        kinds = [kind for kind in ("image", "audio") if kind in row]
        media = tuple(_media(row.pop(kind), kind, base, where, kind) for kind in kinds)
        text = pop_text(row, ("text", "caption") if media else ("text",), where)
        turns = answered(media, text) if media else (SampleTurn(None, (Text(text),)),)
    return Sample(str(key), turns, row, where)


def _chat(messages: Any, base: Base, where: str) -> tuple[SampleTurn, ...]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: field 'messages' is {shown(messages)}, expected a list of messages")
    turns = []
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InputError(f"{where}: field {at!r} is {shown(message)}, expected an object with a role")
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            known = "user, assistant or system"
            raise InputError(f"{where}: field {at!r} has role {shown(role)}, expected {known}")
        if isinstance(content, list) and content:
            parts = tuple(_part(item, base, where, f"{at}.content[{n}]") for n, item in enumerate(content))
        else:
            parts = (Text(text_of(content, where, f"{at}.content")),)
        # The stream has no system role: an instruction is a user turn of its own.
        turns.append(SampleTurn("assistant" if role == "assistant" else "user", parts))
    return tuple(turns)


def _part(item: Any, base: Base, where: str, at: str) -> Part:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        return Text(text_of(item.get("text"), where, f"{at}.text"))
    if kind not in CONTENT:
        raise InputError(f"{where}: field '{at}.type' is {shown(kind)}, expected text, {', '.join(CONTENT)}")
    value = item.get(kind)
    if kind.endswith("_url") and isinstance(value, dict):
        value = value.get("url")
    return _media(value, CONTENT[kind], base, where, f"{at}.{kind}")


def _media(value: Any, kind: str, base: Base, where: str, at: str) -> Media:
    if isinstance(value, DatasetSource):
        return Media(kind, where, value)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: field {at!r} is {shown(value)}, expected a path or URL")
    path = base.join(value)
    if refusal := base.refusal(path):
        raise InputError(f"{where}: field {at!r} names {display(path)}: {refusal}")
    if kind_of(path) not in (kind, None):
        raise InputError(f"{where}: field {at!r} names {display(path)}, which is no {kind} file")
    if not is_url(path) and not os.path.isfile(path):
        raise InputError(f"{where}: field {at!r} names {display(path)}: no such file")
    return Media(kind, f"{where}: {display(path)}", FileSource(path, base=base))
