"""The table of a sweep as text, also as Markdown."""

from __future__ import annotations

from qhybrid.sweep.results import ArmResult, Estimate, SweepResults
from qhybrid.units import format_bytes, format_count, format_duration


def table(results: SweepResults) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one for each arm, the best first; arms without figures come last."""
    header = ["arm", "parameters", "rank", "rate"]
    for name in results.metrics:
        header += [name.replace("_", " "), "to the control"]
    header += ["time", "memory", "front"]
    return header, [_row(arm, results) for arm in results.best_first]


def _row(arm: ArmResult, results: SweepResults) -> list[str]:
    rate = "–" if arm.best_learning_rate is None else f"{arm.best_learning_rate:g}"
    row = [
        arm.name,
        format_count(arm.parameters),
        f"{arm.mean_rank:.2f}",
        rate + (" !" if arm.is_best_at_edge else ""),
    ]
    for name in results.metrics:
        if name not in arm.metrics:
            row += [arm.status, ""]
            continue
        beside = "control" if arm.is_control else marked_difference(arm.differences.get(name))
        row += [interval_text(arm.metrics[name]), beside]
    row.append("" if arm.seconds is None else format_duration(arm.seconds))
    row.append("" if arm.peak_bytes is None else format_bytes(arm.peak_bytes))
    row.append("*" if arm.is_on_front else "")
    return row


def interval_text(one: Estimate) -> str:
    """A mean with the ends of its interval."""
    return f"{one.mean:.4f} [{one.low:.4f}, {one.high:.4f}]"


def difference_text(one: Estimate) -> str:
    """A difference with its sign and the ends of its interval."""
    return f"{one.mean:+.4f} [{one.low:+.4f}, {one.high:+.4f}]"


def marked_difference(one: Estimate | None) -> str:
    """The same, with ● where it is clear of 0; nothing where there is none."""
    return "" if one is None else difference_text(one) + " ●" * one.is_clear


def legend(results: SweepResults) -> str:
    """What the signs of the table mean."""
    seeds = "one seed" if len(results.seeds) == 1 else f"{len(results.seeds)} seeds"
    return (
        f"Means over {seeds} on {results.num_rows} held-out rows, with 95% intervals; ● the difference to "
        f"{results.control} is clear of 0; ! the rate is at the edge of those tried; * on the front of "
        f"{results.metrics[0].replace('_', ' ')}, memory and time."
    )


def as_markdown(results: SweepResults) -> str:
    """results.md: the table, what it means, and the notes."""
    header, rows = table(results)
    lines = [
        f"# Sweep of {results.recipe}",
        "",
        f"{results.model}, {len(results.arms)} arms of {format_count(results.parameters)} parameters, "
        f"{len(results.runs)} runs, {results.device}, {results.date}.",
        "",
        f"| {' | '.join(header)} |",
        f"|{'|'.join(['---', *['---:'] * (len(header) - 1)])}|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        legend(results),
    ]
    if results.notes:
        lines += ["", *(f"- {note}" for note in results.notes)]
    return "\n".join(lines) + "\n"
