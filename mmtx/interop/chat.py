"""The chat template of a pretrained model as a `ChatFormat`."""

from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmtx.errors import InputError
from mmtx.modality.base import ChatFormat
from mmtx.modality.pretrained_text import PretrainedText

FIRST, SECOND, THIRD = "Alpha", "Beta", "Gamma"  # stand-ins for the messages


def chat_format_of(tokenizer: PretrainedText, where: Any) -> ChatFormat | None:
    """The chat format of a tokenizer's chat template; None without a template.

    Raises InputError if a turn depends on more than its role, so that turns cannot be written one by one.
    """
    if not tokenizer.chat_template:
        return None
    said = [("user", FIRST), ("assistant", SECOND), ("user", THIRD)]
    whole, one = render(tokenizer, said, where), render(tokenizer, said[:1], where)
    try:
        head, rest = whole.split(FIRST)
        middle, rest = rest.split(SECOND)
        after, tail = rest.split(THIRD)
        opening = common_end(head, after)
        # What follows the first user turn and what follows the last both start with the end of a user turn.
        close = common_start(middle, after)
        user, assistant = after[len(close):], middle[len(close):]
        told = head.endswith(user) and tail == close + assistant and one == head + FIRST + tail and bool(opening)
    except ValueError:
        told = False
    if not told:
        raise InputError(f"{where}: its chat template writes turns in more ways than one, expected one for each role")
    begin = head.removesuffix(user)
    ids = [tuple(tokenizer.marked(text)) for text in (begin, user, assistant, close)]
    control = tuple(sorted(tokenizer.control))
    if not all(part and part[0] in tokenizer.control for part in ids[1:]) or ids[0] and ids[0][0] not in tokenizer.control:
        raise InputError(f"{where}: its chat template begins a turn with {user[:20]!r} or ends it with {close[:20]!r}, "
                         "expected special tokens")
    opening, asked, answered, end = ids
    return ChatFormat(opening, asked, answered, end, control)


class Generation(Extension):
    """{% generation %}, which encloses what an assistant says, so that transformers can train on it alone: its content is written."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(tokenizer: PretrainedText, said: list[tuple[str, str]], where: Any) -> str:
    """Render a conversation with the template, up to the opening of an answer, as transformers does."""
    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", Generation])
    environment.globals["raise_exception"] = refuse
    messages = [{"role": role, "content": text} for role, text in said]
    try:
        return environment.from_string(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=True, **tokenizer.specials)
    except Exception as error:  # a template is third-party code
        raise InputError(f"{where}: its chat template fails ({' '.join(str(error).split())[:80]})") from None


def common_start(a: str, b: str) -> str:
    """The longest common prefix, cut before the last special token, which may continue in different ways."""
    n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    # The openings of both roles start with the same token ("<|im_start|>"), which is not part of the end of a turn.
    at = a[:n].rfind("<")
    return a[:n] if at <= 0 else a[:at]


def common_end(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(reversed(a), reversed(b))) if x != y), min(len(a), len(b)))
    return a[len(a) - n:]
