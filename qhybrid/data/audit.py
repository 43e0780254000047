"""The audit: what became of every row, by source and reason, as a dict and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qhybrid.data.formats import SourceFormat
from qhybrid.data.rows import INVALID_UTF8, NO_TRAINED_TOKEN, UNKNOWN_ROLE
from qhybrid.data.tokenize import IGNORED_LABEL, EncodedRow
from qhybrid.errors import DataError
from qhybrid.units import format_count

NUM_ROWS_SHOWN = 10
NUM_REASONS_SHOWN = 15

# What a row's number counts, by the numbering that the reader gives.
_NUMBERING_TEXT = {
    "line": "line of the file, from 1",
    "data row": "row below the header, from 1",
    "row": "place in the list of rows, from 1",
}


# By how a reason begins.
_REMEDIES = {
    f"{NO_TRAINED_TOKEN} left after truncation": "raise training.max_length",
    "chat template refused": "the chat template and the rows do not fit together: choose another "
    "data.chat_template, or give the rows the roles that it knows",
    INVALID_UTF8: "convert the file, for example: iconv -f latin1 -t utf-8 OLD > NEW",
    UNKNOWN_ROLE: "the roles are system, user, assistant and tool (sharegpt: system, human, gpt and their kin)",
}


@dataclass
class SourceAudit:
    """The account of one source. Every row is untouched, repaired or dropped; the first two are kept.

    Token counts are those of the kept rows after truncation.
    """

    path: str
    numbering: str
    format: SourceFormat
    untouched: int = 0
    repaired: int = 0
    dropped_rows: dict[str, list[int]] = field(default_factory=dict)  # reason: row numbers, one reason a row
    repaired_rows: dict[str, list[int]] = field(default_factory=dict)  # a row may have several reasons
    duplicates: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_tokens: int = 0
    held_out: int = 0
    used_rows: int = 0
    share: float = 0.0

    @property
    def kept(self) -> int:
        """Rows that can be used."""
        return self.untouched + self.repaired

    @property
    def dropped(self) -> int:
        """Rows that cannot be used."""
        return sum(len(rows) for rows in self.dropped_rows.values())

    @property
    def rows_in(self) -> int:
        """All rows of the source."""
        return self.kept + self.dropped

    def keep(self, number: int, repairs: Iterable[str], row: EncodedRow) -> None:
        """Enter a row that is kept."""
        repairs = sorted(repairs)
        for reason in repairs:
            self.repaired_rows.setdefault(reason, []).append(number)
        self.repaired += bool(repairs)
        self.untouched += not repairs
        self.truncated_rows += row.num_cut_tokens > 0
        self.truncated_tokens += row.num_cut_tokens
        self.tokens += len(row.input_ids)
        self.trained_tokens += int(np.count_nonzero(row.labels != IGNORED_LABEL))
        self.longest_tokens = max(self.longest_tokens, len(row.input_ids))

    def drop(self, number: int, reason: str) -> None:
        """Enter a row that is dropped."""
        self.dropped_rows.setdefault(reason, []).append(number)

    def check(self, max_dropped_fraction: float) -> None:
        """Stop where too little of the source is usable.

        Raises:
            DataError: no row at all, none that is kept, or more dropped than the recipe allows.
        """
        if not self.rows_in:
            raise DataError("there is not a single row in it", where=self.path, hint="name a file with rows")
        fraction = self.dropped / self.rows_in
        if self.kept and fraction <= max_dropped_fraction:
            return
        counts = f"{format_count(self.dropped)} of {format_count(self.rows_in)} rows ({fraction:.1%})"
        limit = f"; the limit is {max_dropped_fraction:.1%}" if self.kept else ""
        # Rounded up to whole percent, so that pasting it is enough.
        enough = -(-self.dropped * 100 // self.rows_in) / 100
        raise_limit = f", or set data.max_dropped_fraction: {enough} to go on without them" if self.kept else ""
        raise DataError(
            f"{counts} cannot be used{limit}\n" + "\n".join(self._reason_lines(self.dropped_rows)),
            where=self.path,
            hint=f"{self._remedy()}{raise_limit}",
        )

    def _remedy(self) -> str:
        """What helps against the reason that most rows were dropped for."""
        reason = max(self.dropped_rows, key=lambda one: len(self.dropped_rows[one]))
        for start, remedy in _REMEDIES.items():
            if reason.startswith(start):
                return remedy
        return f"mend these rows (a row's number is its {_NUMBERING_TEXT[self.numbering]})"

    def to_dict(self) -> dict:
        """The account as values that JSON can hold; `rows` has every row number, `first_rows` ten."""
        return {
            "path": self.path,
            "format": self.format.name,
            "format_found_automatically": self.format.found,
            "columns": dict(self.format.columns),
            "row_numbers_count": _NUMBERING_TEXT[self.numbering],
            "rows_in": self.rows_in,
            "kept": self.kept,
            "untouched": self.untouched,
            "repaired": self.repaired,
            "dropped": self.dropped,
            "dropped_by_reason": {
                reason: {"count": len(rows), "first_rows": rows[:NUM_ROWS_SHOWN], "rows": list(rows)}
                for reason, rows in self.dropped_rows.items()
            },
            "repaired_by_reason": {
                reason: {"count": len(rows), "first_rows": rows[:NUM_ROWS_SHOWN]}
                for reason, rows in self.repaired_rows.items()
            },
            "duplicates": self.duplicates,
            "truncated_rows": self.truncated_rows,
            "truncated_tokens": self.truncated_tokens,
            "tokens": {
                "total": self.tokens,
                "trained": self.trained_tokens,
                "longest": self.longest_tokens,
                "mean": round(self.tokens / self.kept, 1) if self.kept else 0.0,
            },
            "held_out": self.held_out,
            "used_rows": self.used_rows,
            "share": self.share,
        }

    def reason_lines(self) -> list[str]:
        """One line for each reason that rows were dropped or repaired for."""
        return [
            *(f"dropped {line}" for line in self._reason_lines(self.dropped_rows)),
            *(f"repaired {line}" for line in self._reason_lines(self.repaired_rows)),
        ]

    def _reason_lines(self, by_reason: Mapping[str, Sequence[int]]) -> list[str]:
        lines = []
        most_first = sorted(by_reason.items(), key=lambda item: -len(item[1]))
        for reason, rows in most_first[:NUM_REASONS_SHOWN]:
            shown = ", ".join(str(row) for row in rows[:NUM_ROWS_SHOWN])
            more = f" and {format_count(len(rows) - NUM_ROWS_SHOWN)} more" if len(rows) > NUM_ROWS_SHOWN else ""
            lines.append(f"{format_count(len(rows)):>7}  {reason}: {self.numbering} {shown}{more}")
        if len(by_reason) > NUM_REASONS_SHOWN:
            left = sum(len(rows) for _, rows in most_first[NUM_REASONS_SHOWN:])
            lines.append(f"{format_count(left):>7}  for {len(by_reason) - NUM_REASONS_SHOWN} other reasons")
        return lines


_COLUMNS = (
    "source", "format", "rows", "kept", "repaired", "dropped", "doubled", "cut",
    "tokens", "trained", "longest", "mean", "used", "share",
)  # fmt: skip


@dataclass
class Audit:
    """The account of all sources, and how many rows the training and evaluation sets have."""

    train: list[SourceAudit]
    eval: list[SourceAudit]
    train_rows: int = 0
    eval_rows: int = 0
    warnings: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, int]:
        """Sums over the training and evaluation sources."""
        names = ("rows_in", "kept", "untouched", "repaired", "dropped", "duplicates")
        names += ("truncated_rows", "truncated_tokens", "tokens", "trained_tokens")
        sums = {name: sum(getattr(source, name) for source in (*self.train, *self.eval)) for name in names}
        return {**sums, "train_rows": self.train_rows, "eval_rows": self.eval_rows}

    def to_dict(self) -> dict:
        """The audit as values that JSON can hold."""
        return {
            "sources": [source.to_dict() for source in self.train],
            "eval_sources": [source.to_dict() for source in self.eval],
            "totals": self.totals(),
            "warnings": list(self.warnings),
        }

    def to_text(self) -> str:
        """A table with a line for each source, then the reasons, then the warnings."""
        rows = [_COLUMNS, *(_cells(source) for source in (*self.train, *self.eval))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        for source in (*self.train, *self.eval):
            if reasons := source.reason_lines():
                lines += ["", f"{source.path} (a number is the {_NUMBERING_TEXT[source.numbering]})"]
                lines += [f"  {line}" for line in reasons]
        evaluation = f", {format_count(self.eval_rows)} to evaluate on" if self.eval_rows else ""
        lines += ["", f"{format_count(self.train_rows)} rows to train on{evaluation}"]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]


def _cells(source: SourceAudit) -> tuple[str, ...]:
    path = source.path if len(source.path) <= 32 else "…" + source.path[-31:]
    counts = (
        source.rows_in, source.kept, source.repaired, source.dropped, source.duplicates, source.truncated_rows,
        source.tokens, source.trained_tokens, source.longest_tokens, source.tokens // max(1, source.kept),
        source.used_rows,
    )  # fmt: skip
    found = f"{source.format.name} (found)" if source.format.found else source.format.name
    return (path, found, *(format_count(count) for count in counts), f"{source.share:.1%}")
