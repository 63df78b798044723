"""The exception for mistakes that a user can fix, and text that is safe to print on one line."""

import unicodedata

LONGEST = 1000  # characters of a message, which may quote arbitrary input
UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # format characters that are parts of letters and emoji


class InputError(ValueError):
    """A user's mistake: a file, row, field or option that cannot be used.

    The message is one line that names the file, the row or field, what was found and what was expected. Control characters
    in it are escaped, and the middle of a long one is left out. The command line prints it without a traceback and exits
    with status 2; with MMTX_DEBUG=1 in the environment it prints the traceback first.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A message escaped to one line, of `LONGEST` characters at most."""
    text = escape(text)
    if len(text) <= LONGEST:
        return text
    kept = (LONGEST - 5) // 2
    return f"{text[:kept]} ... {text[-kept:]}"


def escape(text: str, keep: str = "") -> str:
    """Text that is safe to show in a terminal: unsafe characters are escaped as in Python, except those in `keep`.

    Unsafe are control characters, line breaks, marks that change the writing direction, and bytes that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(letter) if unicodedata.category(letter) in UNSAFE and letter not in keep + JOINERS else letter
                   for letter in text)


def _escaped(letter: str) -> str:
    stray = 0xDC80 <= ord(letter) <= 0xDCFF  # a byte of a file name that is not UTF-8
    return f"\\x{ord(letter) - 0xDC00:02x}" if stray else letter.encode("unicode_escape", "backslashreplace").decode()
