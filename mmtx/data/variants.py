"""Variants: a user's function replaces each sample with several, such as a note in several pitches, each with its own name.

All are made before training begins, so that documents keep their lengths and a resumed run its order; augmentation then changes
each of them anew in every view.
"""

from collections.abc import Callable

from mmtx.data.fields import shown
from mmtx.data.sample import Media, Sample, SampleTurn, Text
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
    function, at = _checked(import_function(place, "variants")), f"variants {place}"

    def variants(sample: Sample) -> list[Sample]:
        found = call_function(lambda sample: list(function(sample)), sample, f"{at}: {sample.where}")
        for made in found:
            if not isinstance(made, Sample):
                raise InputError(f"{at}: {sample.where}: gave {type(made).__name__}, expected an mmtx.data.sample.Sample")
            for part in (part for turn in made.turns for part in turn.parts):
                if isinstance(part, Media) and part.options and not MODALITIES[part.kind].cuts:
                    raise InputError(f"{at}: {sample.where}: gave {part.kind} with {part.options}, which only sounds can have")
        return found

    return variants


def _checked(function: Variants) -> Variants:
    """The function, raising InputError for invalid samples, which type hints alone do not prevent."""
    def checked(sample: Sample) -> list[Sample]:
        found = list(function(sample))
        for made in found:
            if isinstance(made, Sample):
                _check(made)
        return found

    return checked


def _check(made: Sample) -> None:
    if not isinstance(made.turns, (tuple, list)):
        raise InputError(f"gave the turns {shown(made.turns)}, expected a tuple of mmtx.data.sample.SampleTurn")
    for turn in made.turns:
        if not isinstance(turn, SampleTurn):
            raise InputError(f"gave the turn {shown(turn)}, expected an mmtx.data.sample.SampleTurn")
        if turn.role not in ("user", "assistant", None):
            raise InputError(f"gave a turn of role {shown(turn.role)}, expected 'user', 'assistant' or None")
        if not isinstance(turn.parts, (tuple, list)):
            raise InputError(f"gave the parts {shown(turn.parts)}, expected a tuple of mmtx.data.sample.Text and Media")
        for part in turn.parts:
            if not isinstance(part, (Text, Media)):
                raise InputError(f"gave the part {shown(part)}, expected an mmtx.data.sample.Text or Media")
            if isinstance(part, Text) and not (isinstance(part.text, str) and part.text.strip()):
                raise InputError(f"gave the text {shown(part.text)}, expected text that is not blank")
            if isinstance(part, Media) and part.kind not in media_kinds():
                raise InputError(f"gave a medium of kind {shown(part.kind)}, expected one of {', '.join(media_kinds())}")
