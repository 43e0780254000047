"""How far stages may expand a layout: a module that has grown, and the largest layout that can come of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qhybrid.architecture.layout import Layout, LayoutRow
from qhybrid.errors import LayoutError
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.stages import ExpandSection, StageSection, expandable
from qhybrid.units import format_count


def grown(layout: Layout, ranks: Mapping[str, int]) -> Layout:
    """The layout with higher ranks for some modules. s stays, so alpha' = alpha·r'/r (rsLoRA: alpha·sqrt(r'/r)).

    With alpha kept, s would fall, and with it all that the module has learnt.
    """
    return Layout(tuple(_grown_row(row, ranks[row.module]) if row.module in ranks else row for row in layout))


def _grown_row(row: LayoutRow, rank: int) -> LayoutRow:
    assert row.kind != "adalora" and rank >= row.rank
    share = rank / row.rank
    alpha = row.alpha * (math.sqrt(share) if row.kind == "rslora" else share)
    return replace(row, rank=rank, target_rank=rank, alpha=alpha)


def rank_cost(row: LayoutRow) -> int:
    """Trained parameters of one rank more."""
    return row.in_features + row.out_features


def smaller_side(row: LayoutRow) -> int:
    """The highest rank that a change of the module's weight can have."""
    return min(row.in_features, row.out_features)


def candidates(expand: ExpandSection, layout: Layout) -> tuple[LayoutRow, ...]:
    """The modules that `expand` is about, whatever their rank."""
    bands = expandable(expand, {row.band: row.kind for row in layout})
    return tuple(row for row in layout if row.band in bands)


def largest_ranks(stages: tuple[StageSection, ...], layout: Layout) -> dict[str, int]:
    """The highest rank that each module can reach, were it chosen every time; none above its smaller side."""
    ranks = {row.module: row.rank for row in layout}
    for stage in stages:
        if stage.expand is None:
            continue
        for row in candidates(stage.expand, layout):
            highest = _highest(stage, ranks[row.module])
            ranks[row.module] = max(row.rank, min(highest, smaller_side(row)))
    return ranks


def largest_layouts(recipe: Recipe, layout: Layout) -> tuple[Layout, ...]:
    """Layouts of which one needs as much memory as any that the recipe's stages can make of `layout`.

    Which modules a stage chooses is not known before, only how many, or how many parameters they may cost. The
    first has the largest sum of ranks, and with that of activations. Of activations that are computed again, those
    of one layer are there at a time: each of the others has the largest ranks in one layer, the topmost of those
    that are alike.
    """
    if all(stage.expand is None for stage in recipe.stages):
        return (layout,)
    highest = largest_ranks(recipe.stages, layout)
    alike: dict[Any, int] = {}
    for layer in sorted({row.layer for row in layout}):
        rows = [row for row in layout if row.layer == layer]
        if any(highest[row.module] > row.rank for row in rows):
            alike[tuple((row.target, row.kind, row.rank, highest[row.module]) for row in rows)] = layer
    return tuple(largest_layout(recipe, layout, layer) for layer in (None, *alike.values()))


def largest_layout(recipe: Recipe, layout: Layout, first: int | None = None) -> Layout:
    """A layout with at least the parameters of any that the recipe's stages can make of `layout`.

    The cheapest modules grow first, which makes the sum of ranks the largest; before them those of the layer
    `first`.
    """
    highest = largest_ranks(recipe.stages, layout)
    left = _most_parameters(recipe.stages, layout)
    ranks = {}
    for row in sorted(layout, key=lambda row: (row.layer != first, rank_cost(row))):
        more = min(highest[row.module] - row.rank, math.ceil(left / rank_cost(row)))
        if more:
            ranks[row.module] = row.rank + more
            left = max(0, left - more * rank_cost(row))
    return grown(layout, ranks)


def check_growth(recipe: Recipe, layout: Layout) -> None:
    """Refuse stages that the modules at hand cannot take, or that would change none of them.

    Raises:
        LayoutError: a rank above the smaller side of a module, more modules than there are, a budget below one
            module's cost, or ranks that are there already.
    """
    ranks = {row.module: row.rank for row in layout}
    for stage in recipe.stages:
        expand = stage.expand
        if expand is None:
            continue
        rows = candidates(expand, layout)
        if isinstance(expand.top, int) and expand.top > len(rows):
            raise LayoutError(
                f"stage {stage.name!r}: expand.top {expand.top} is more than the {len(rows)} modules of its bands",
                hint="lower it, or leave it out for all of them",
                at=("stages", stage.name, "expand", "top"),
            )
        least = least_cost(expand, layout)
        if least is None:
            raise LayoutError(
                f"stage {stage.name!r}: expand.to {expand.to} has no effect: no module has a lower rank",
                hint="raise expand.to, or lower the rank of the bands",
                at=("stages", stage.name, "expand", "to"),
            )
        if expand.budget is not None and expand.budget < least:
            raise LayoutError(
                f"stage {stage.name!r}: expand.budget {format_count(expand.budget)} is below "
                f"{format_count(least)} parameters, the least that expanding one module takes",
                hint="raise expand.budget, or expand by fewer ranks",
                at=("stages", stage.name, "expand", "budget"),
            )
        ranks |= {row.module: _highest(stage, ranks[row.module]) for row in rows}
        too_narrow = [row for row in rows if ranks[row.module] > smaller_side(row)]
        if too_narrow:
            row = min(too_narrow, key=smaller_side)
            side = smaller_side(row)
            raise LayoutError(
                f"stage {stage.name!r} may expand {row.target} of band {row.band!r} to rank "
                f"{ranks[row.module]}; its smaller side is {side} ({row.out_features} x {row.in_features})",
                hint=f"set expand.to to at most {side}",
                at=("stages", stage.name, "expand"),
            )


def least_cost(expand: ExpandSection, layout: Layout) -> int | None:
    """The fewest parameters that expanding one module takes; None where no module would change."""
    costs = [(expand.rank_after(row.rank) - row.rank) * rank_cost(row) for row in candidates(expand, layout)]
    return min((cost for cost in costs if cost), default=None)


def _highest(stage: StageSection, rank: int) -> int:
    """The highest rank after a stage; when: spectrum may expand a module again and again."""
    assert stage.expand is not None
    return max(rank, stage.expand.to or 0) if stage.when == "spectrum" else stage.expand.rank_after(rank)


def _most_parameters(stages: tuple[StageSection, ...], layout: Layout) -> int:
    """The most parameters that all stages together can add."""
    lowest = {row.module: row.rank for row in layout}
    highest = dict(lowest)
    total = 0
    for stage in stages:
        expand = stage.expand
        if expand is None:
            continue
        costs = []
        for row in candidates(expand, layout):
            low, high = lowest[row.module], highest[row.module]
            costs.append(_most_ranks(stage, expand, low, high) * rank_cost(row))
            highest[row.module] = _highest(stage, high)
        added = sum(sorted(costs, reverse=True)[: expand.how_many(len(costs))])
        total += added if expand.budget is None else min(added, expand.budget)
    return total


def _most_ranks(stage: StageSection, expand: ExpandSection, low: int, high: int) -> int:
    """The most ranks that a module with a rank from `low` to `high` can gain in a stage."""
    if stage.when == "spectrum":
        return _highest(stage, low) - low
    # What is gained rises with the rank as long as it is multiplied, and falls once `to` cuts it.
    edge = (expand.to or high) // (expand.times or 1)
    return max(expand.rank_after(rank) - rank for rank in (low, high, edge, edge + 1) if low <= rank <= high)
