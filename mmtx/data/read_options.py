"""How the rows of a source are read: one object for all that its readers must know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, str | None] | None  # the name by which a field is read -> its name in the rows; None: it is not to be read


@dataclass(frozen=True)
class ReadOptions:
    """The options that readers of all kinds of sources share.

    trusted, fields, follow_links: those of a `DataSource`. captions: whether a medium without a text is an error. report: gets a
    line about files that are left out and count as no row, and about names in `fields` that no row has. seen: the names of the
    fields of all rows so far, which readers of manifests add.
    """

    trusted: bool = False
    fields: Fields = None
    follow_links: bool = False
    captions: bool = True
    report: Callable[[str], None] | None = None
    seen: set[str] = field(default_factory=set, compare=False, repr=False)

    def report_unseen(self, where: str) -> None:
        """Report what `fields` names and no row has: where a medium is optional, nothing else would tell a mistake in its name."""
        for name, given in (self.fields or {}).items():
            if given is not None and self.seen and given not in self.seen and self.report is not None:
                self.report(f"{where}: no row has the field {given!r}, which `fields` names for {name}")

    def rename(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The row with its fields renamed to those that are read, and the fields that are not to be read.

        Null fields count as absent and are left out.
        """
        fields = self.fields or {}
        row = {name: value for name, value in row.items() if value is not None}
        taken = {name: row.pop(given) for name, given in fields.items() if given in row}
        ignored = {name: row.pop(name) for name in fields if name in row}
        return row | taken, ignored
