"""Configurations as YAML: how large and how deep one may be, which is asked before it is read."""

from pathlib import Path

import yaml

from mmtx.errors import InputError

DEEPEST = 64           # lists and mappings within one another
MOST_VALUES = 200_000  # values, those that an alias stands for counted each time
LONGEST = 2 << 20      # bytes

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_text(path: str | Path) -> str:
    """The text of a configuration, as `check_yaml` lets it pass. Raises InputError, also where it cannot be read."""
    try:
        if not Path(path).is_file():
            raise InputError(f"{path}: {'is no file' if Path(path).exists() else 'no such file'}")
        with open(path, "rb") as file:
            text = file.read(LONGEST + 1).decode()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a configuration: no UTF-8 at byte {error.start}") from None
    if (error := check_yaml(text, str(path))) is not None:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise InputError(f"{path}: not a configuration: {getattr(error, 'problem', None) or 'no YAML'}{place}")
    return text


def check_yaml(text: str, where: str) -> Exception | None:
    """Raise InputError for YAML that would take more memory, time or stack than a configuration can need.

    Text that is no YAML passes, and what was found wrong with it comes back: who reads a value takes it for a string.
    """
    if len(text) > LONGEST:
        raise InputError(f"{where}: found more than {LONGEST:,} bytes, the most of a configuration")
    sizes: dict[str, int] = {}                    # of what each anchor stands for
    open_: list[tuple[str | None, int]] = []      # anchor and size before it, of the lists and mappings around
    size = 0
    try:
        for event in yaml.parse(text, LOADER):
            if isinstance(event, yaml.AliasEvent):
                # An alias within what it names has no end.
                if any(anchor == event.anchor for anchor, _ in open_):
                    raise InputError(f"{where}: found *{event.anchor} within itself, expected none")
                size += sizes.get(event.anchor, 1)
            elif isinstance(event, yaml.ScalarEvent):
                size += 1
                sizes[event.anchor] = 1
            elif isinstance(event, yaml.CollectionStartEvent):
                open_.append((event.anchor, size))
                size += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = open_.pop()
                sizes[anchor] = size - before
            if len(open_) > DEEPEST:
                raise InputError(f"{where}: found more than {DEEPEST} lists and mappings within one another")
            if size > MOST_VALUES:
                raise InputError(f"{where}: found more than {MOST_VALUES:,} values, aliases included")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        return error
    return None
