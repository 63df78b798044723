"""Rows that cannot be used: skipped and counted up to a share, above which the source is refused."""

from collections.abc import Callable

from mmtx.errors import InputError

MAX_BAD = 0.01  # share of the rows of a source that may be unusable, by default


class SkipCounter:
    """Counts the unusable rows of a source, which are too many if they are more than a share (`max_bad`) of all its rows.

    All commands use this definition. A row is bad, once, whether it cannot be read, one of its media is damaged, or it needs
    too many tokens: one counter goes through all stages. All rows of a source count, including those that `select` or `limit`
    leave out, since a row that cannot be read has no fields to select it by.
    """

    def __init__(self, limit: float, rows: int = 0):
        """`limit` is the share of rows that may be bad, 0 to 1; `rows` is the number of rows so far."""
        if not 0 <= limit <= 1:
            raise InputError(f"max_bad is {limit}, expected a share from 0 to 1")
        self.limit, self.rows = limit, rows
        self.count = 0
        self.first: list[str] = []

    def skip(self, error: InputError) -> None:
        """Count one bad row; the first three are kept for the message."""
        self.count += 1
        if len(self.first) < 3:
            self.first.append(str(error))

    def summary(self) -> str:
        """One line: how many rows were bad, and the first of them."""
        return f"{self.count} of {self.rows} rows cannot be used; first: {'; '.join(self.first)}"

    def check(self) -> None:
        """Raise InputError if more than the share `limit` of the rows were bad."""
        if self.count > self.limit * self.rows:
            raise InputError(f"{self.summary()} (at most {self.limit:.3%} may be bad, which max_bad sets)")

    def finish(self, report: Callable[[str], None] | None) -> None:
        """`check` after the last stage, and `report` the summary if any rows were bad."""
        self.check()
        if self.count and report is not None:
            report("skipped: " + self.summary())
