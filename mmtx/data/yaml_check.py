"""YAML configurations: limits on size and depth, checked before they are loaded, and how their values are read."""

import re
from pathlib import Path

import yaml

from mmtx.errors import InputError

DEEPEST = 64           # nested lists and mappings
MOST_VALUES = 200_000  # values, with aliases expanded
LONGEST = 2 << 20      # bytes

FLOAT, DATE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the fast one, if there is one
    """Reads values as jsonargparse does for `mmtx fit`: 1e-3 is a number and not text, 2020-01-31 is text and not a date."""


Loader.yaml_implicit_resolvers = {letter: [(tag, pattern) for tag, pattern in found if tag not in (FLOAT, DATE)]
                                  for letter, found in Loader.yaml_implicit_resolvers.items()}
Loader.add_implicit_resolver(FLOAT, re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."))


def read_yaml_text(path: str | Path) -> str:
    """The text of a configuration, checked with `check_yaml`. Raises InputError for invalid YAML or an unreadable file, too."""
    try:
        if not Path(path).is_file():
            raise InputError(f"{path}: {'not a file' if Path(path).exists() else 'no such file'}")
        with open(path, "rb") as file:
            text = file.read(LONGEST + 1).decode()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a configuration: not UTF-8 at byte {error.start}") from None
    if (error := check_yaml(text, str(path))) is not None:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise InputError(f"{path}: not a configuration: {getattr(error, 'problem', None) or 'no YAML'}{place}")
    return text


def check_yaml(text: str, where: str) -> Exception | None:
    """Raise InputError for YAML that would take more memory, time or stack than a configuration can need, or repeats a key.

    Of a repeated key readers would take the last value, without a word. Invalid YAML passes, and its error is returned: a reader
    of single values takes it for a string.
    """
    if len(text) > LONGEST:
        raise InputError(f"{where}: found more than {LONGEST:,} bytes, the maximum of a configuration")
    sizes: dict[str, int] = {}                    # number of values of each anchor
    open_: list[tuple[str | None, int]] = []      # anchor, and size before it, of each enclosing list or mapping
    keys: list[_Keys | None] = []                 # of each of these that is a mapping
    size = 0
    try:
        for event in yaml.parse(text, Loader):
            if keys and keys[-1] is not None and isinstance(event, yaml.NodeEvent):
                keys[-1].see(event, where)
            if isinstance(event, yaml.AliasEvent):
                # An alias inside its own anchor expands without end.
                if any(anchor == event.anchor for anchor, _ in open_):
                    raise InputError(f"{where}: found *{event.anchor} within itself, expected none")
                size += sizes.get(event.anchor, 1)
            elif isinstance(event, yaml.ScalarEvent):
                size += 1
                sizes[event.anchor] = 1
            elif isinstance(event, yaml.CollectionStartEvent):
                open_.append((event.anchor, size))
                keys.append(_Keys() if isinstance(event, yaml.MappingStartEvent) else None)
                size += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                keys.pop()
                anchor, before = open_.pop()
                sizes[anchor] = size - before
            if len(open_) > DEEPEST:
                raise InputError(f"{where}: found more than {DEEPEST} nested lists and mappings")
            if size > MOST_VALUES:
                raise InputError(f"{where}: found more than {MOST_VALUES:,} values, aliases included")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        return error
    return None


class _Keys:
    """The keys of a mapping: every second of its nodes."""

    def __init__(self):
        self.seen: set[str] = set()
        self.is_key = True

    def see(self, node: yaml.NodeEvent, where: str) -> None:
        """Raise InputError for a key that the mapping has already."""
        if self.is_key and isinstance(node, yaml.ScalarEvent) and node.value != "<<":
            if node.value in self.seen:
                line = node.start_mark.line + 1
                raise InputError(f"{where}: found {node.value} twice in a mapping, the second time in line {line}")
            self.seen.add(node.value)
        self.is_key = not self.is_key
