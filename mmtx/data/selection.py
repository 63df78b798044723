"""The samples that a source keeps: by the values of their fields (`select`), and by a hash (`split`)."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmtx.data.fields import shown
from mmtx.data.sample import Sample
from mmtx.errors import InputError


class Selection(NamedTuple):
    """`select`, `split` and `split_by` of a `DataSource`."""

    select: Mapping[str, list] = {}
    split: Sequence[float] = (0, 1)
    split_by: str = "key"

    def check(self) -> None:
        """Raise InputError for fields without a list (the letters of a text would be taken for values), and for no range."""
        for field, values in self.select.items():
            if not isinstance(values, (list, tuple)):
                raise InputError(f"select: field {field!r} has {shown(values)}, expected a list of values")
        if not (len(self.split) == 2 and 0 <= self.split[0] < self.split[1] <= 1):
            raise InputError(f"split: found {shown(self.split)}, expected two numbers in ascending order, from 0 to 1")

    def keep(self, samples: list[Sample], none: str) -> list[Sample]:
        """The samples that are kept. Raises InputError, which begins with `none`, if a field leaves none."""
        self.check()
        for field, values in self.select.items():
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
        kept = [sample for sample in samples if self._is_in_split(sample)]
        if samples and not kept:
            raise InputError(f"{none}: none of {len(samples)} is in the split {shown(list(self.split))}, expected a wider one, or "
                             f"more different values of {self.split_by!r}")
        return kept

    def has(self, sample: Sample) -> bool:
        """Whether a sample is kept. Raises InputError if it lacks the field of `split_by`."""
        facts = _facts(sample)
        return all(_has(facts, field, values) for field, values in self.select.items()) and self._is_in_split(sample)

    def _is_in_split(self, sample: Sample) -> bool:
        if tuple(self.split) == (0, 1):
            return True
        facts = _facts(sample)
        if facts.get(self.split_by) is None:
            raise InputError(f"{sample.where}: no field {self.split_by!r}, found {', '.join(map(repr, facts))} (split_by)")
        first, end = self.split
        return first <= place_of(facts[self.split_by]) < end


def place_of(value: Any) -> float:
    """A value's place in [0, 1): its hash, so that the same values are together, and stay where they are if others are added."""
    return int.from_bytes(hashlib.sha256(str(value).encode(errors="surrogateescape")).digest()[:6]) / 2**48


def _has(facts: dict[str, Any], field: str, values: list) -> bool:
    """Whether a field is there and has one of the values."""
    return field in facts and any(_same(facts[field], value) for value in values)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; 1 is 1.0, but true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _facts(sample: Sample) -> dict[str, Any]:
    return {"key": sample.key, "caption": sample.caption, **sample.metadata}
