"""The one exception for mistakes that a user can mend, and text that is safe to show on one line."""

import unicodedata

LONGEST = 1000  # characters of a message: what was found may be anything
UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # parts of letters and emoji


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
    """Text that a terminal can show, whatever is in it: control characters, line breaks, marks that turn the direction of
    writing and bytes that are no UTF-8 as Python escapes them, but for the characters to `keep`."""
    if text.isprintable():
        return text
    return "".join(_escaped(letter) if unicodedata.category(letter) in UNSAFE and letter not in keep + JOINERS else letter
                   for letter in text)


def _escaped(letter: str) -> str:
    stray = 0xDC80 <= ord(letter) <= 0xDCFF  # a byte of a name that is no UTF-8
    return f"\\x{ord(letter) - 0xDC00:02x}" if stray else letter.encode("unicode_escape", "backslashreplace").decode()
