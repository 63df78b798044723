"""Conversations as lists of messages with a role and content, as the chat templates of transformers take them.

    [{"role": "user", "content": [mmtx.Image("cat.png"), "What is it?"]},
     {"role": "assistant", "content": "a cat"},
     {"role": "user", "content": [{"type": "text", "text": "And what is it doing?"}]}]
"""

from collections.abc import Mapping
from typing import Any

from mmtx.data.forms import CHAT_ROLES
from mmtx.errors import InputError
from mmtx.items import is_list, map_numbered
from mmtx.medium import BaseMedium, Medium
from mmtx.modality.registry import media_kinds
from mmtx.schema import shown


def messages_of(parts: Any) -> list[tuple[str, list[Any]]] | None:
    """The messages of a conversation as roles of the stream with their parts, text and media; None if it is none."""
    if not (isinstance(parts, (list, tuple)) and parts and all(isinstance(item, Mapping) and "role" in item for item in parts)):
        return None
    return map_numbered(parts, _message, "message")


def _message(message: Mapping) -> tuple[str, list[Any]]:
    for name in message.keys() - {"role", "content"}:
        raise InputError(f"found the unknown field {shown(name)}, expected role and content")
    role, content = message["role"], message.get("content")
    if not isinstance(role, str) or role not in CHAT_ROLES:
        raise InputError(f"role: found {shown(role)}, expected {', '.join(CHAT_ROLES)}")
    if content is None:
        raise InputError("content: found none, expected text, media or a list of them")
    return CHAT_ROLES[role], map_numbered(content if is_list(content) else [content], _part, "part")


def _part(item: Any) -> Any:
    """A part as `Model.generate` takes it, of one that may be an object with a type."""
    if not isinstance(item, Mapping):
        return item
    kind, kinds = item.get("type"), ("text", *media_kinds())
    if kind not in kinds:
        raise InputError(f"type: found {shown(kind)}, expected {', '.join(kinds)}")
    names = ("text",) if kind == "text" else (kind, "url", "path")
    given = [item[name] for name in names if item.get(name) is not None]
    if len(given) != 1 or item.keys() - {"type", *names}:
        raise InputError(f"found {shown([*item], contents=True)}, expected type and one of {', '.join(names)}")
    if kind == "text" and not isinstance(given[0], str):
        raise InputError(f"text: found {shown(given[0])}, expected text")
    return given[0] if kind == "text" or isinstance(given[0], BaseMedium) else Medium(kind, given[0])
