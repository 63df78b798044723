"""The one exception for mistakes that a user can mend, and text that is safe to show on one line."""

import re

LONGEST = 1000  # characters of a message: what was found may be anything
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """A user's mistake: a file, row, field or option that cannot be used.

    The message is one line that names the file, the row or field, what was found and what was expected: control
    characters in it are escaped, and of a long one the middle is left out. The command line prints it without a traceback
    and exits with status 2; with MMTX_DEBUG=1 in the environment the traceback comes first.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A message of bounded length on one line."""
    text = escape(text)
    if len(text) <= LONGEST:
        return text
    kept = (LONGEST - 5) // 2
    return f"{text[:kept]} ... {text[-kept:]}"


def escape(text: str, keep: str = "") -> str:
    """Text that a terminal can show, whatever is in it.

    Line breaks, escape sequences, marks that turn the direction of writing, and bytes that are no UTF-8 are written as
    Python writes them in a string, but for the characters to `keep`.
    """
    return UNSAFE.sub(lambda found: found.group() if found.group() in keep else repr(found.group())[1:-1], text)
