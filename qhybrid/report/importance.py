"""Importance: how much the loss hangs on each module, and how that changed while it trained."""

from __future__ import annotations

import math

from qhybrid.report.colours import CIVIDIS, NUM_SERIES
from qhybrid.report.curves import legend_of
from qhybrid.report.heat_map import Grid, Shades, heat_map
from qhybrid.report.line_chart import Line, line_chart
from qhybrid.report.page import Figure, Section
from qhybrid.report.records import Importance
from qhybrid.report.run_facts import RunFacts
from qhybrid.report.spectra import short
from qhybrid.units import format_count


def importance_section(facts: RunFacts) -> Section | None:
    """The section; None where importance was not measured."""
    if facts.layout is None or not len(facts.layout) or not facts.events.importance:
        return None
    grid, last = Grid.of(facts.layout), facts.events.importance[max(facts.events.importance)]
    shares = _shares(last, grid)
    if not shares:
        return None
    ordered = sorted(shares, key=lambda module: -shares[module])
    top = sum(shares[module] for module in ordered[: max(1, len(ordered) // 10)])
    lead = (
        "By how much the loss would change, to first order, if a value of the module's factors were zero: the "
        "mean of |w · gradient| over A and B, as a running average (AdaLoRA's sensitivity, arXiv 2303.10512). "
        f"The most important tenth of the modules has {top:.0%} of the sum; first is {ordered[0]}."
    )
    figure = Figure(
        f"Importance after step {format_count(last.step)}",
        heat_map(
            grid,
            {module: 100 * share for module, share in shares.items()},
            Shades.spread([100 * share for share in shares.values()], CIVIDIS),
            alt=f"Map of the importance of {len(shares)} modules; the most important is {ordered[0]}",
            what="percent of the sum over all modules",
            text=short,
            told=lambda module, share: f"{module}: {share:.3g} %",
        ),
        "Bright modules are where a change matters most. Kinds of adapters begin with factors of different size: "
        "compare within a band first.",
        wide=True,
    )
    blocks = [figure]
    if len(facts.events.importance) > 1:
        blocks.append(_over_time(facts, grid, "type"))
        if facts.layout is not None and len(facts.layout.bands) > 1:
            blocks.append(_over_time(facts, grid, "band"))
    return Section("importance", "Importance", lead, blocks)


def _shares(event: Importance, grid: Grid) -> dict[str, float]:
    """Each module's share of the sum."""
    known = {m: value for m, value in event.modules.items() if m in grid.modules and math.isfinite(value)}
    total = sum(known.values())
    return {module: value / total for module, value in known.items()} if total > 0 else {}


def _over_time(facts: RunFacts, grid: Grid, by: str) -> Figure:
    """The share of the module types or of the bands at every measurement."""
    assert facts.layout is not None
    groups = {row.module: row.target if by == "type" else row.band for row in facts.layout}
    names = grid.targets if by == "type" else facts.layout.bands
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for step, event in sorted(facts.events.importance.items()):
        shares = _shares(event, grid)
        for name in names if shares else ():
            own = [share for module, share in shares.items() if groups[module] == name]
            points[name].append((float(step), 100 * sum(own)))
    lines = [Line(name, points[name], i % NUM_SERIES) for i, name in enumerate(names)]
    what = "module type" if by == "type" else "band"
    chart = line_chart(
        lines,
        alt=f"The share of each {what} in the sum of importance over the steps",
        x_label="optimizer step",
        y_label="percent of the sum",
        zero=True,
    )
    caption = f"How the sum is divided among the {what}s. Where curves cross, the ranking was not settled."
    return Figure(f"By {what}", chart, caption, legend_of(lines))
