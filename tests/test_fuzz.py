"""A short run of the fuzzer over every target: what is mutated is read, or refused in one line."""

import fuzz
import pytest


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_mutants_are_read_or_refused(name):
    outcomes, faults = fuzz.run(name, count=100)
    assert not faults
    assert {sum(counts.values()) for counts in outcomes.values()} == {100}
    for outcome in ("read", "refused"):  # neither too mild nor too rough
        assert sum(counts[outcome] for counts in outcomes.values()) > 5 * len(outcomes)
