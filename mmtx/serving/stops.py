"""Stop sequences: where the text of an answer ends before the model ends it."""

from collections.abc import Sequence


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop sequence begins that is complete first, so that the cut does not depend on tokens; None if none is complete."""
    found = [(begin + len(stop), begin) for stop in stops if (begin := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def begun_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of a text that may be the beginning of a stop sequence."""
    return max((length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])), default=0)
