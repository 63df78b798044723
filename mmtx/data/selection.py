"""`select` of a source: the samples that it keeps, by the values of their fields."""

from typing import Any

from mmtx.data.fields import shown
from mmtx.data.sample import Sample
from mmtx.errors import InputError


def check_select(wanted: dict[str, list]) -> None:
    """Raise InputError unless each field has a list: the letters of a text would be taken for values."""
    for field, values in wanted.items():
        if not isinstance(values, (list, tuple)):
            raise InputError(f"select: field {field!r} has {shown(values)}, expected a list of values")


def keep_selected(samples: list[Sample], wanted: dict[str, list], none: str) -> list[Sample]:
    """The samples that `select` keeps. Raises InputError, which begins with `none`, if a field leaves none."""
    check_select(wanted)
    for field, values in wanted.items():
        facts = [_facts(sample) for sample in samples]
        known = sorted({name for fact in facts for name in fact})
        if samples and field not in known:
            raise InputError(f"select: no sample has the field {field!r}, expected one of {known}")
        pairs = zip(samples, facts, strict=True)
        kept = [sample for sample, fact in pairs if _has(fact, field, values)]
        if samples and not kept:
            some = [*dict.fromkeys(shown(fact[field]) for fact in facts if field in fact)]
            some[5:] = ["..."] if len(some) > 5 else []
            raise InputError(f"{none}: found {', '.join(some)} in the field {field!r}, "
                             f"expected one of {shown(values)} (select)")
        samples = kept
    return samples


def is_selected(sample: Sample, wanted: dict[str, list]) -> bool:
    """Whether `select` keeps a sample."""
    facts = _facts(sample)
    return all(_has(facts, field, values) for field, values in wanted.items())


def _has(facts: dict[str, Any], field: str, values: list) -> bool:
    """Whether a field is there and has one of the values."""
    return field in facts and any(_same(facts[field], value) for value in values)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; 1 is 1.0, but true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _facts(sample: Sample) -> dict[str, Any]:
    return {"key": sample.key, "caption": sample.caption, **sample.metadata}
