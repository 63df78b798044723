"""Names of sources that stand for several paths: braces, as in a shell, and glob patterns."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice

from mmtx.data.storage import display, listed
from mmtx.data.urls import is_url, scheme_of
from mmtx.errors import InputError
from mmtx.files import user_name

BRACES = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}")
MOST_NAMES = 10**6  # that braces may stand for


def expand(source: str) -> list[str]:
    """The paths that a name with braces or a glob pattern stands for; anything else unchanged, but for a leading ~."""
    if scheme_of(source) == "data" or not is_url(source) and os.path.exists(source):
        return [source]
    names = [*islice(_braced(source), MOST_NAMES + 1)]
    if len(names) > MOST_NAMES:
        raise InputError(f"{display(source)}: found braces for more than {MOST_NAMES:,} names")
    return [path for name in dict.fromkeys(names) for path in _matches(name)]


def _braced(name: str) -> Iterator[str]:
    """The names that {000..127} and {a,b} in a name stand for, as in a shell."""
    if (found := BRACES.search(name)) is None:
        yield name
        return
    first, last, words = found.groups()
    if words is None:
        low, high = int(first), int(last)
        width = max(len(first), len(last)) if re.match(r"0\d", first) or re.match(r"0\d", last) else 0  # pads with zeros
        inside: Iterable[str] = (f"{number:0{width}}" for number in range(low, high + 1) or range(low, high - 1, -1))
    else:
        inside = words.split(",")
    for middle in inside:
        yield from _braced(name[:found.start()] + middle + name[found.end():])


def _matches(source: str) -> list[str]:
    """The paths that match a glob pattern, sorted; anything else unchanged, but for a leading ~."""
    if is_url(source):
        if "*" not in source:
            return [source]
        found = listed(source)
    else:
        source = user_name(source)
        if os.path.exists(source) or not glob.has_magic(source):
            return [source]
        found = sorted(glob.glob(source, recursive=True))
    if not found:
        raise InputError(f"{display(source)}: no file matches this pattern")
    return found
