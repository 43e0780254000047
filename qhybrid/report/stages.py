"""What the stages of a run did: ranks that grew, bands that were frozen and freed."""

from __future__ import annotations

from qhybrid.report.line_chart import Line, Mark, line_chart
from qhybrid.report.page import Block, Figure, Section, Table
from qhybrid.report.records import StageChange
from qhybrid.report.run_facts import RunFacts
from qhybrid.units import format_count

_MOST_MARKS = 4


def stages_section(facts: RunFacts) -> Section | None:
    """The section; None for a run without stages."""
    changes = [facts.events.stages[key] for key in sorted(facts.events.stages)]
    begun = {change.stage for change in changes}
    waiting = [stage for stage in (facts.recipe.stages if facts.recipe else ()) if stage.name not in begun]
    if not changes and not waiting:
        return None
    rows = [
        (
            format_count(change.step),
            change.stage,
            _done(change),
            format_count(change.num_parameters_before),
            format_count(change.num_parameters),
        )
        for change in changes
    ]
    rows += [("", stage.name, f"has not begun ({stage.told().split(': ', 1)[1]})", "", "") for stage in waiting]
    grown = any(change.expanded for change in changes)
    header = ("after step", "stage", "what it did", "parameters", "then")
    blocks: list[Block] = [Table("Changes", header, rows, left=3, wide=not grown)]
    if grown:
        blocks.append(_parameters(facts, changes))
    lead = "A stage begins at a step, when a loss no longer falls, or where a rank is used up. What these did:"
    return Section("stages", "Stages", lead, blocks)


def _done(change: StageChange) -> str:
    if change.passed_over:
        return "passed over: what it waited for had not come"
    parts = []
    if change.expanded:
        growths = change.expanded.values()
        before, after = _range([one.before for one in growths]), _range([one.after for one in growths])
        parts.append(f"{len(growths)} module{'s' * (len(growths) != 1)} from rank {before} to {after}")
    if change.froze:
        parts.append(f"froze {', '.join(change.froze)}")
    if change.unfroze:
        parts.append(f"freed {', '.join(change.unfroze)}")
    return "; ".join(parts) or "there was nothing to expand"


def _range(ranks: list[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}–{max(ranks)}"


def _parameters(facts: RunFacts, changes: list[StageChange]) -> Figure:
    grown = [change for change in changes if change.expanded]
    end = max(facts.events.last_step, grown[-1].step)
    points = [(0.0, float(grown[0].num_parameters_before))]
    points += [(float(change.step), float(change.num_parameters)) for change in grown]
    points.append((float(end), points[-1][1]))
    chart = line_chart(
        [Line("parameters", points, 0, "steps")],
        alt=f"The parameters of the adapters over the steps, from {points[0][1]:,.0f} to {points[-1][1]:,.0f}",
        x_label="optimizer step",
        y_label="parameters",
        zero=True,
        marks=[Mark(float(change.step), change.stage) for change in grown[:_MOST_MARKS]],
    )
    caption = "The parameters of all adapters, frozen ones too. Expanding does not change what the model computes."
    return Figure("Parameters over time", chart, caption)
