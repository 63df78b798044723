"""Several samples in place of one, by a function of the user's: a note in several pitches, say, each with its own name.

All are there before training begins, so that documents keep their lengths and a resumed run its order; each is changed further by
augmentation, in every view anew.
"""

from collections.abc import Callable

from mmtx.data.sample import Media, Sample
from mmtx.errors import InputError
from mmtx.modality.registry import MODALITIES
from mmtx.plugins import call_function, import_function

Variants = Callable[[Sample], list[Sample]]


def load_variants(place: str | None) -> Variants:
    """What makes of each sample those that stand in its place: the function "FILE.py:FUNCTION", or without one the sample alone.

    Raises InputError, also when it is called, for what is no such function, and then names the row.
    """
    if place is None:
        return lambda sample: [sample]
    function, at = import_function(place, "variants"), f"variants {place}"

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
