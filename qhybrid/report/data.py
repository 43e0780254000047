"""The data: what became of every row, by source and reason."""

from __future__ import annotations

from collections.abc import Iterator

from qhybrid.report.page import Block, Note, Section, Table
from qhybrid.report.records import AuditFacts, SourceFacts
from qhybrid.report.run_facts import RunFacts
from qhybrid.units import format_count

_HEADER = (
    "source", "format", "use", "rows", "kept", "repaired", "dropped", "doubled", "cut", "tokens", "longest",
    "used", "share",
)  # fmt: skip


def data_section(facts: RunFacts) -> Section | None:
    """The section; None where the audit was not written."""
    audit = facts.audit
    if audit is None:
        return None
    rows = [_cells(source, use) for source, use in _sources(audit)]
    caption = (
        "Repaired rows are kept; dropped ones were not trained on. Doubled rows appear more than once in their "
        "source, cut ones were longer than training.max_length. The share is that of the rows of its use."
    )
    blocks: list[Block] = [Table("Sources", _HEADER, rows, left=3, caption=caption)]
    reasons = list(_reasons(audit))
    if reasons:
        blocks.append(
            Table(
                "Why rows were dropped or repaired", ("source", "", "reason", "rows", "the first"), reasons, left=3
            )
        )
    blocks += [Note(warning, "warning") for warning in audit.warnings]
    return Section("data", "Data", _words(audit), blocks)


def _sources(audit: AuditFacts) -> Iterator[tuple[SourceFacts, str]]:
    yield from ((source, "training") for source in audit.sources)
    yield from ((source, "held out") for source in audit.eval_sources)


def _words(audit: AuditFacts) -> str:
    totals = audit.totals
    text = f"{format_count(totals.get('train_rows', 0))} rows to train on"
    if totals.get("eval_rows"):
        text += f" and {format_count(totals['eval_rows'])} held out to evaluate on"
    trained, tokens = totals.get("trained_tokens", 0), totals.get("tokens", 0)
    text += f". Of {format_count(tokens)} tokens {format_count(trained)} are answers, which is what is trained."
    lost = totals.get("dropped", 0)
    text += (
        f" {format_count(lost)} row{'s' * (lost != 1)} could not be used." if lost else " Every row could be used."
    )
    return text


def _cells(source: SourceFacts, use: str) -> tuple[str, ...]:
    counts = (
        source.rows_in, source.kept, source.repaired, source.dropped, source.duplicates, source.truncated_rows,
        int(source.tokens.get("total", 0)), int(source.tokens.get("longest", 0)), source.used_rows,
    )  # fmt: skip
    return (source.path, source.format, use, *(format_count(count) for count in counts), f"{source.share:.1%}")


def _reasons(audit: AuditFacts) -> Iterator[tuple[str, ...]]:
    for source, _ in _sources(audit):
        for what, by_reason in (("dropped", source.dropped_by_reason), ("repaired", source.repaired_by_reason)):
            for reason, told in by_reason.items():
                first = told.get("first_rows")
                shown = ", ".join(str(row) for row in first) if isinstance(first, list) else ""
                yield source.path, what, reason, str(told.get("count", "")), shown
