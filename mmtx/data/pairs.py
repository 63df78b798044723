"""Rows with a preferred and a rejected answer, for direct preference optimization. Without both, a row has one of `mmtx.data.forms`.

| form | fields |
| --- | --- |
| question | "prompt" or another question of PAIRS, with "chosen" and "rejected": texts, or lists of messages (TRL, LLaMA-Factory) |
| chat | "messages" or "conversations", with "chosen" and "rejected": the message that comes next (LLaMA-Factory) |
| two chats | "chosen" and "rejected" alone: lists of messages that begin alike (TRL) |
| media | "chosen" and "rejected" beside media: captions |
| answered chat | "messages", whose last answer is preferred, and "rejected_response": a text (ms-swift) |
"""

from collections.abc import Sequence
from typing import Any

from mmtx.data.field_names import CHATS, PAIRS, PREFERENCES, names
from mmtx.data.forms import turns_of
from mmtx.data.row_media import MediaReader
from mmtx.data.sample import Media, SampleTurn
from mmtx.errors import InputError

Turns = tuple[SampleTurn, ...]


def answers_of(row: dict[str, Any], reader: MediaReader, given: Sequence[Media] = (), empty: Sequence[str] = (),
               captions: bool = True, missing: Sequence[str] = ()) -> tuple[Turns, Turns | None]:
    """Remove the turns from a row -> those with its answer, and those with the rejected one if there is one; else as `turns_of`."""
    if (rows := _rows(row)) is None:
        return turns_of(row, reader, given, empty, captions, missing), None
    if "caption" in rows[0].keys() - row.keys() and not given and names().fields.keys().isdisjoint(row):
        raise InputError(f"{reader.where}: found 'chosen' and 'rejected' without what they answer, expected 'prompt' or a medium "
                         "beside them, or lists of messages")
    for name in PREFERENCES:
        row.pop(name, None)
    chosen, rejected = (turns_of(one, reader, given, empty, captions) for one in rows)
    for name in [name for name in row if name not in rows[0]]:  # what both have read
        del row[name]
    if chosen == rejected:
        raise InputError(f"{reader.where}: found the same answer preferred and rejected, expected two")
    return chosen, rejected


def _rows(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The row with either answer, in the forms of rows with one answer; None for a row without two."""
    rest = {name: value for name, value in row.items() if name not in PREFERENCES}
    chat = next((name for name in CHATS if name in row), None)
    answers = row.get("chosen"), row.get("rejected")
    if all(isinstance(answer, str | list | dict) for answer in answers):
        chosen, rejected = (_with(rest, chat, answer) for answer in answers)
        return chosen, rejected
    if chat and isinstance(text := row.get("rejected_response"), str) and text and isinstance(row[chat], list):
        return dict(rest), {**rest, chat: [*row[chat][:-1], *_messages(text)]}
    return None


def _with(row: dict[str, Any], chat: str | None, answer: Any) -> dict[str, Any]:
    """The row with an answer to its question, at the end of its chat, as its chat, or as the caption of its media."""
    if chat:
        return {**row, chat: [*row[chat], *_messages(answer)]} if isinstance(row[chat], list) else dict(row)
    pair = next((pair for pair in PAIRS if pair[0] in row), None)
    if pair is None:
        return {**row, "caption" if isinstance(answer, str) else "messages": answer}
    if isinstance(row[pair[0]], list):
        answer = _messages(answer)
    elif not isinstance(answer, str):
        return {**row, pair[0]: [{"role": "user", "content": row[pair[0]]}], pair[1]: _messages(answer)}
    return {**row, pair[1]: answer}


def _messages(answer: Any) -> list[Any]:
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    return answer if isinstance(answer, list) else [answer]
