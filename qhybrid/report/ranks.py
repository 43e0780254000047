"""Where the ranks are, and how AdaLoRA and stages changed them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qhybrid.architecture.layout import Layout, LayoutRow
from qhybrid.report.colours import NUM_SERIES, is_dark
from qhybrid.report.curves import legend_of, resume_marks
from qhybrid.report.heat_map import Grid, Shades, heat_map, small_map
from qhybrid.report.line_chart import Line, line_chart
from qhybrid.report.page import Block, Figure, Gallery, Section
from qhybrid.report.run_facts import RunFacts, number
from qhybrid.units import format_count

_MOST_FRAMES = 60
_MOMENTS = 8  # shown side by side


@dataclass(frozen=True)
class Moment:
    """The rank of every module after a step."""

    step: int
    ranks: Mapping[str, int]

    @property
    def total(self) -> int:
        """The sum over all modules."""
        return sum(self.ranks.values())


def moments(facts: RunFacts) -> list[Moment]:
    """The ranks at the beginning and after every step that changed them."""
    assert facts.layout is not None
    ranks = {row.module: row.rank for row in facts.layout}
    changes: list[tuple[int, dict[str, int]]] = [
        (step, allocation.live_ranks) for (step, _), allocation in facts.events.allocations.items()
    ]
    for (step, _), change in sorted(facts.events.stages.items(), reverse=True):  # the layout is that of the end
        changes.append((step, {module: growth.after for module, growth in change.expanded.items()}))
        ranks |= {module: growth.before for module, growth in change.expanded.items() if module in ranks}
    found = [Moment(0, dict(ranks))]
    for step, new in sorted(changes, key=lambda change: change[0]):
        ranks |= {module: rank for module, rank in new.items() if module in ranks}
        if found[-1].step == step:
            found.pop()
        if not found or ranks != found[-1].ranks:
            found.append(Moment(step, dict(ranks)))
    return found


def kept_moment(facts: RunFacts, found: Sequence[Moment]) -> Moment:
    """The ranks of the adapter that was kept: the last, or with load_best_model_at_end those of the best step."""
    step = number(facts.figures.get("adapter_of_step"), found[-1].step)
    return [moment for moment in found if moment.step <= step][-1]


def rank_section(facts: RunFacts) -> Section | None:
    """The ranks of all modules, and their way there where they changed."""
    if facts.layout is None or not len(facts.layout):
        return None
    grid, found = Grid.of(facts.layout), moments(facts)
    first, last = found[0], found[-1]
    shades = Shades(0, max(max(moment.ranks.values()) for moment in found))
    moved = len(found) > 1
    when = f"after step {format_count(last.step)}" if moved else "of every module"
    blocks: list[Block] = [
        Figure(
            f"Rank {when}" if not moved else "Rank of every module",
            heat_map(
                grid,
                {module: float(rank) for module, rank in last.ranks.items()},
                shades,
                alt=f"Map of the ranks of {len(last.ranks)} modules {when}: {_range(last)}",
                what="rank",
                told=lambda module, rank: f"{module}: rank {rank:.0f}",
            ),
            "Columns are layers, rows the module types of a layer; bright is a high rank."
            + (" The slider goes through the steps that changed ranks." if moved else ""),
            wide=True,
            frames=_frames(grid, found, shades) if moved else None,
        )
    ]
    if moved:
        chosen = [found[i] for i in _spread(len(found), _MOMENTS)]
        pictures = [
            (
                f"step {format_count(m.step)}: {format_count(m.total)} ranks",
                small_map(grid, {name: float(rank) for name, rank in m.ranks.items()}, shades,
                          alt=f"Map of the ranks after step {m.step}: {_range(m)}"),
            )
            for m in chosen
        ]  # fmt: skip
        blocks.append(
            Gallery(
                "How it came about",
                pictures,
                "The same map at several moments, in the same colours: layers from left to right, "
                f"{', '.join(grid.targets)} from top to bottom.",
            )
        )
        blocks += [_budget(facts, found), _by_depth(facts.layout, first, last)]
    return Section("ranks", "Ranks", _words(facts, found), blocks)


def _range(moment: Moment) -> str:
    return f"{min(moment.ranks.values())} to {max(moment.ranks.values())}"


def _words(facts: RunFacts, found: Sequence[Moment]) -> str:
    assert facts.layout is not None
    first, last = found[0], found[-1]
    if len(found) == 1:
        ranks = set(first.ranks.values())
        if len(ranks) == 1:
            return f"Every module has rank {ranks.pop()}."
        return f"The modules have ranks from {min(ranks)} to {max(ranks)}.{_extremes(facts.layout, last)}"
    moving = {row.module for row in facts.layout if first.ranks[row.module] != last.ranks[row.module]}
    text = (
        f"Ranks changed at {format_count(len(found) - 1)} step{'s' * (len(found) > 2)}: "
        f"{format_count(first.total)} at the beginning, "
        f"{format_count(last.total)} after step {format_count(last.step)}. "
        f"{format_count(len(moving))} of {format_count(len(facts.layout))} modules ended with another rank than "
        "they began with."
    )
    extremes = _extremes((row for row in facts.layout if row.module in moving), last) if moving else ""
    if extremes:
        text += f" Of these,{extremes}"
    kept = kept_moment(facts, found)
    if kept is not last:
        text += f" The adapter that was kept is an earlier one, with {format_count(kept.total)} ranks."
    late = [s for s in facts.events.schedules.values() if facts.events.last_step < s.total_steps - s.final_steps]
    if late:
        text += f" The final choice of {', '.join(s.band for s in late)} was not reached."
    return text


def _extremes(rows: Iterable[LayoutRow], moment: Moment) -> str:
    """Which module types have most and least rank, in a sentence; nothing where all have the same."""
    ranks: dict[str, list[int]] = {}
    for row in rows:
        ranks.setdefault(row.target, []).append(moment.ranks[row.module])
    means = sorted((sum(own) / len(own), target) for target, own in ranks.items())
    (low, least), (high, most) = means[0], means[-1]
    return f" {most} has most ({high:.1f} on average), {least} least ({low:.1f})." if low != high else ""


def _frames(grid: Grid, found: Sequence[Moment], shades: Shades) -> str:
    """What page.js needs to show any of the moments: the ranks in the order of the map's cells, and colours."""
    chosen = [found[i] for i in _spread(len(found), _MOST_FRAMES)]
    colours = {rank: shades.colour(rank) for moment in chosen for rank in moment.ranks.values()}
    content = {
        "titles": [f"step {format_count(m.step)}: {format_count(m.total)} ranks" for m in chosen],
        "ranks": [[m.ranks[module] for module in grid.modules] for m in chosen],
        "rows": [grid.targets.index(target) for _, target in grid.modules.values()],
        "modules": list(grid.modules),
        "colours": colours,
        "dark": {rank: is_dark(colour) for rank, colour in colours.items()},
    }
    return json.dumps(content, separators=(",", ":"))


def _spread(number: int, most: int) -> list[int]:
    """At most `most` of the numbers below `number`, evenly spread, the first and the last among them."""
    if number <= most:
        return list(range(number))
    return sorted({round(i * (number - 1) / (most - 1)) for i in range(most)})


def _budget(facts: RunFacts, found: Sequence[Moment]) -> Figure:
    assert facts.layout is not None
    end = max(found[-1].step, facts.events.last_step)
    lines = []
    for colour, band in enumerate(facts.layout.bands):
        names = {row.module for row in facts.layout.of_band(band)}
        totals = [(float(m.step), float(sum(m.ranks[name] for name in names))) for m in found]
        if totals[0][1] == min(total for _, total in totals) == max(total for _, total in totals):
            continue
        lines.append(Line(band, [*totals, (float(end), totals[-1][1])], colour % NUM_SERIES, "steps"))
        schedule = facts.events.schedules.get(band)
        if schedule is not None:
            target = float(schedule.target_budget)
            lines.append(Line(f"{band}: its final budget", [(0.0, target), (float(end), target)], 7, "dashed"))
    alt = "The sum of the ranks of each band over the steps"
    chart = line_chart(
        lines, alt=alt, x_label="optimizer step", y_label="ranks of the band", zero=True, marks=resume_marks(facts)
    )
    caption = "AdaLoRA begins with more ranks than it may keep and drops the least important; stages add ranks."
    return Figure("Ranks of each band", chart, caption, legend_of(lines))


def _by_depth(layout: Layout, first: Moment, last: Moment) -> Figure:
    lines = []
    for name, moment, style, colour in (("at the beginning", first, "dashed", 7), ("at the end", last, "line", 0)):
        ranks: dict[int, list[int]] = {}
        for row in layout:
            ranks.setdefault(row.layer, []).append(moment.ranks[row.module])
        points = [(float(layer), sum(own) / len(own)) for layer, own in sorted(ranks.items())]
        lines.append(Line(name, points, colour, style))
    alt = "The mean rank of each layer, at the beginning and at the end"
    chart = line_chart(lines, alt=alt, x_label="layer", y_label="mean rank", zero=True)
    caption = "The mean over the modules of each layer: at which depth the ranks were kept."
    return Figure("Rank over the depth", chart, caption, legend_of(lines))
