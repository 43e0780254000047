"""Memory: what the plan said, by component and by moment, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from qhybrid.report.bars import Bar, bars
from qhybrid.report.curves import legend_of, resume_marks
from qhybrid.report.line_chart import Line, line_chart
from qhybrid.report.page import Block, Figure, Legend, Section, Table
from qhybrid.report.records import PlanFacts
from qhybrid.report.run_facts import RunFacts
from qhybrid.units import format_bytes

_MOST_PARTS = 7  # in colours of their own; what is left is one part
_OTHERS = 7  # grey
_MEASURED = {  # the names of the figures: what they are, and the plan's word for it
    "process_bytes": ("process, resident", "host_bytes"),
    "cuda_max_allocated_bytes": ("GPU, allocated by tensors", "allocated_bytes"),
    "cuda_max_reserved_bytes": ("GPU, reserved by torch", "reserved_bytes"),
    "cuda_used_bytes": ("GPU, of all processes", "needed_bytes"),
}


def memory_section(facts: RunFacts) -> Section | None:
    """The section; None without a plan and without measurements."""
    plan, expected = facts.plan, facts.expected
    measured = {name: facts.peaks[name] for name in _MEASURED if facts.peaks.get(name)}
    if plan is None and not measured:
        return None
    blocks: list[Block] = []
    if expected is not None:
        blocks.append(_bars(expected, measured))
        if measured:
            blocks.append(_comparison(expected, measured))
    if facts.events.steps:
        blocks.append(_over_time(facts, expected))
    if expected is not None and plan is not None:
        blocks += [_moments(expected), _components(plan, expected)]
    return Section("memory", "Memory", _words(expected, measured), blocks)


def _words(plan: PlanFacts | None, measured: Mapping[str, int]) -> str:
    if plan is None:
        return "What was measured. There is no plan to compare it with."
    where = "of the host, where the model ran" if plan.device == "cpu" else "of the GPU"
    planned = f"{format_bytes(plan.needed_bytes)} {where}"
    text = f"Before training, the plan said {planned}; most in this moment of a step: {plan.peak_moment}."
    peak = measured.get(plan.counts)
    if peak:
        error = plan.needed_bytes / peak - 1
        side = "high" if error > 0 else "low"
        text += f" Measured were {format_bytes(peak)}: the plan was {abs(error):.1%} too {side}."
    return text


def _grouped(components: Mapping[str, int]) -> list[tuple[str, int]]:
    """The largest first, the adapters of all bands as one."""
    sums: dict[str, int] = {}
    for name, size in components.items():
        name = "adapters" if name.startswith("adapters: ") else name
        sums[name] = sums.get(name, 0) + size
    return sorted(sums.items(), key=lambda item: -item[1])


def _bars(plan: PlanFacts, measured: Mapping[str, int]) -> Figure:
    gib = 2**30
    parts = _grouped(plan.components)
    shown = [(name, size / gib, i) for i, (name, size) in enumerate(parts[:_MOST_PARTS])]
    left = sum(size for _, size in parts[_MOST_PARTS:])
    if left:
        shown.append(("all else", left / gib, _OTHERS))
    rows = [Bar("planned", shown)]
    peak = measured.get(plan.counts)
    if peak:
        rows.append(Bar("measured peak", [(_MEASURED[plan.counts][0], peak / gib, _OTHERS)]))
    limit = ("there is", plan.budget_bytes / gib) if plan.budget_bytes else None
    told = f", measured {format_bytes(peak)}" if peak else ""
    picture = bars(
        rows,
        alt=f"Planned {format_bytes(plan.needed_bytes)}{told}",
        x_label="GiB",
        text=lambda size: format_bytes(size * gib),
        limit=limit,
    )
    return Figure(
        "Planned and measured",
        picture,
        "The plan is made of parts; what is measured is one number. Both bars should be of one length, and a plan "
        "that is shorter was too hopeful."
        if peak
        else "",
        [Legend(name, colour, "fill") for name, _, colour in shown],
        wide=True,
    )


def _comparison(plan: PlanFacts, measured: Mapping[str, int]) -> Table:
    rows = []
    for name, peak in measured.items():
        what, planned_name = _MEASURED[name]
        planned = getattr(plan, planned_name)
        rows.append((what, format_bytes(planned), format_bytes(peak), f"{planned / peak - 1:+.1%}"))
    caption = (
        "The process with loading, at the peak of the whole run. A negative difference: the plan was too low."
    )
    return Table("At the peak", ("", "planned", "measured", "difference"), rows, caption=caption, wide=False)


def _over_time(facts: RunFacts, plan: PlanFacts | None) -> Figure:
    steps = facts.events.in_order
    names = [name for name in _MEASURED if any(name in step.memory for step in steps)]
    lines = [
        Line(_MEASURED[name][0], [(float(s.step), s.memory[name] / 2**30) for s in steps if name in s.memory], i)
        for i, name in enumerate(names)
    ]
    if plan is not None and steps:
        ends = (float(steps[0].step), float(steps[-1].step))
        lines.append(Line("planned", [(x, plan.needed_bytes / 2**30) for x in ends], _OTHERS, "dashed"))
    chart = line_chart(
        lines,
        alt="The memory measured after each step",
        x_label="optimizer step",
        y_label="GiB",
        zero=True,
        marks=resume_marks(facts),
        y_text=lambda value: f"{value:.3g}",
    )
    caption = (
        "Measured at the end of each step, between the peaks: a curve that rises without end is a leak. The peak "
        "itself, loading included, is in the table."
    )
    return Figure("After each step", chart, caption, legend_of(lines))


def _moments(plan: PlanFacts) -> Figure:
    rows = [
        Bar(name, [(name, size / 2**20, 0 if name == plan.peak_moment else 5)])
        for name, size in plan.moments.items()
    ]
    picture = bars(
        rows,
        alt=f"Planned memory of tensors at each moment of a step; most in: {plan.peak_moment}",
        x_label="MiB of tensors",
        text=lambda size: format_bytes(size * 2**20),
        width=460.0,
    )
    caption = (
        "What tensors take at each moment of a training step, as planned; the darkest decides whether it fits."
    )
    return Figure("Moments of a step", picture, caption)


def _components(plan: PlanFacts, expected: PlanFacts) -> Table:
    ours, longest = dict(_grouped(expected.components)), dict(_grouped(plan.components))
    rows = [
        (name, format_bytes(size), f"{size / expected.needed_bytes:.1%}", format_bytes(longest.get(name, 0)))
        for name, size in ours.items()
    ]
    rows.append(("sum", format_bytes(expected.needed_bytes), "100.0%", format_bytes(plan.needed_bytes)))
    header = ("component", "for this data", "share", "longest rows")
    caption = "The last column is for the longest rows that the recipe allows, which other data may have."
    return Table("The plan by component", header, rows, caption=caption if plan.for_this_data else "", wide=False)
