"""Variants: a user's function replaces each sample with several, such as a note in several pitches, each with its own name.

All are made before training begins, so that documents keep their lengths and a resumed run its order; augmentation then changes
each of them anew in every view.
"""

from collections.abc import Callable, Iterable
from typing import Any

from mmtx.data.fields import shown
from mmtx.data.sample import Codes, Media, Sample, SampleTurn, Text
from mmtx.document import ROLES
from mmtx.errors import InputError
from mmtx.modality.registry import MODALITIES, media_kinds
from mmtx.plugins import call_function, import_function

Variants = Callable[[Sample], list[Sample]]


def load_variants(place: str | None) -> Variants:
    """The function "FILE.py:FUNCTION" from a sample to the samples that replace it; without one, the sample alone.

    Raises InputError if there is no such function and, naming the row, if a call fails or returns anything else.
    """
    if place is None:
        return lambda sample: [sample]
    function, at = import_function(place, "variants"), f"variants {place}"

    def checked(sample: Sample) -> list[Sample]:
        if not isinstance(made := function(sample), Iterable):
            raise InputError(f"gave {type(made).__name__}, expected a list of mmtx.data.sample.Sample")
        return [_checked(one) for one in made]

    return lambda sample: call_function(checked, sample, f"{at}: {sample.where}")


def _checked(made: Sample) -> Sample:
    """A sample of a user's function. Raises InputError if it is invalid, which type hints alone do not prevent."""
    if not isinstance(made, Sample):
        raise InputError(f"gave {type(made).__name__}, expected an mmtx.data.sample.Sample")
    for turns in (made.turns,) if made.rejected is None else (made.turns, made.rejected):
        _check_turns(turns)
    for name, kind in (("key", str), ("where", str), ("metadata", dict)):
        if not isinstance(value := getattr(made, name), kind):
            raise InputError(f"gave the {name} {shown(value)}, expected {kind.__name__}")
    return made


def _check_turns(turns: Any) -> None:
    if not isinstance(turns, (tuple, list)):
        raise InputError(f"gave the turns {shown(turns)}, expected a tuple of mmtx.data.sample.SampleTurn")
    if not turns:
        raise InputError("gave a sample without turns, expected at least one")
    for turn in turns:
        if not isinstance(turn, SampleTurn):
            raise InputError(f"gave the turn {shown(turn)}, expected an mmtx.data.sample.SampleTurn")
        if turn.role not in ROLES:
            raise InputError(f"gave a turn of role {shown(turn.role)}, expected 'user', 'assistant' or None")
        if not isinstance(turn.parts, (tuple, list)):
            raise InputError(f"gave the parts {shown(turn.parts)}, expected a tuple of mmtx.data.sample.Text and Media")
        for part in turn.parts:
            if isinstance(part, Media):
                if not hasattr(part.source, "read"):
                    raise InputError(f"gave a medium with the source {shown(part.source)}, expected "
                                     "mmtx.data.storage.FileSource(PATH)")
                if part.kind not in media_kinds():
                    raise InputError(f"gave a medium of kind {shown(part.kind)}, expected one of {', '.join(media_kinds())}")
                if part.options and not MODALITIES[part.kind].cuts:
                    raise InputError(f"gave {part.kind} with {part.options}, which only sounds can have")
            elif not isinstance(part, Text | Codes):
                raise InputError(f"gave the part {shown(part)}, expected an mmtx.data.sample.Text, Media or Codes")
            elif isinstance(part, Text) and not (isinstance(part.text, str) and part.text.strip()):
                raise InputError(f"gave the text {shown(part.text)}, expected text that is not blank")
