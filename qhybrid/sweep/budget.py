"""Equal parameters: what an adapter has at the end, and a recipe's ranks brought to a number of them. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import ModelSpec
from qhybrid.errors import SweepError
from qhybrid.recipe.band import BandSection
from qhybrid.recipe.schema import Recipe

_PLANNER_ONLY = {"min_rank", "rank_multiple", "rank_weight"}  # a sweep never lowers ranks to the memory


@dataclass(frozen=True)
class Equalled:
    """A recipe at the budget, its layout, and what was done to its ranks."""

    recipe: Recipe
    layout: Layout
    note: str = ""


def parameters_at_end(layout: Layout) -> int:
    """Parameters of the finished adapter: A, B and DoRA's magnitudes; of AdaLoRA P and Q at the target rank.

    Λ is folded into P and Q there. AdaLoRA's allocator counts triplets, not parameters, so a run may end with more
    or fewer where a band has modules of several sizes.
    """
    return sum(row.target_rank * (row.in_features + row.out_features) for row in layout) + _fixed(layout)


def mean_rank(layout: Layout) -> float:
    """The rank at the end, weighted by what one rank of each module costs."""
    costs = [row.in_features + row.out_features for row in layout]
    ranks = [row.target_rank for row in layout]
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) / sum(costs)


def rounding(layout: Layout) -> int:
    """How far two adapters of equal budget may be apart: one rank of the largest module."""
    return max(row.in_features + row.out_features for row in layout)


def at_budget(recipe: Recipe, spec: ModelSpec, parameters: int, arm: str) -> Equalled:
    """The recipe with ranks that make `parameters` at the end, within `rounding`; their proportions stay.

    A budget over all bands is set. Bands with ranks of their own get them scaled, layer by layer, where every
    layer has a single rank; an alpha of theirs is scaled with them, so that s stays.

    Raises:
        SweepError: it has a budget of its own that differs, or ranks that cannot be scaled.
        LayoutError: the bands do not fit the model, or the budget is below one rank for each module.
    """
    layout = build_layout(recipe, spec)
    if _is_equal(layout, parameters):
        return Equalled(recipe, layout)
    if recipe.rank_budget is not None:
        raise _unequal(arm, layout, parameters, "leave the budget out of its schedule: the sweep sets it")
    if recipe.schedule is not None or recipe.ranks is not None:
        found, note = _with_budget(recipe, parameters - _fixed(layout)), ""
    else:
        weights = _ranks_by_layer(layout)
        if weights is None or any(band.schedule is not None for band in recipe.adapters):
            raise _unequal(
                arm, layout, parameters,
                "a layer of it has modules of several ranks, or a band a schedule of its own, so they are not "
                "scaled: give ranks that make the budget, or one schedule over all bands",
            )  # fmt: skip
        share = (parameters - _fixed(layout)) / (parameters_at_end(layout) - _fixed(layout))
        found = _scaled(recipe, weights, parameters - _fixed(layout), share)
        note = f"its ranks times {share:.3g}"
    layout = build_layout(found, spec)
    if not _is_equal(layout, parameters):
        raise _unequal(arm, layout, parameters, "its limits of ranks (min_rank, max_rank) leave no other choice")
    return Equalled(found, layout, note)


def _fixed(layout: Layout) -> int:
    """Parameters that no rank changes: DoRA's magnitudes."""
    return sum(row.out_features for row in layout.of_kind("dora"))


def _is_equal(layout: Layout, parameters: int) -> bool:
    return abs(parameters_at_end(layout) - parameters) <= rounding(layout)


def _unequal(arm: str, layout: Layout, parameters: int, hint: str) -> SweepError:
    return SweepError(
        f"the arm {arm} has {parameters_at_end(layout):,} parameters, and the budget is {parameters:,}", hint=hint
    )


def _with_budget(recipe: Recipe, budget: int) -> Recipe:
    name = "schedule" if recipe.schedule else "ranks"
    values = getattr(recipe, name).model_dump(exclude_unset=True)
    return _revised(recipe, recipe.adapters, **{name: {**values, "budget": max(1, budget)}})


def _ranks_by_layer(layout: Layout) -> tuple[float, ...] | None:
    """The one rank of each adapted layer; None where a layer has several."""
    ranks: dict[int, set[int]] = {}
    for row in layout:
        ranks.setdefault(row.layer, set()).add(row.target_rank)
    if any(len(found) > 1 for found in ranks.values()):
        return None
    return tuple(float(next(iter(ranks[layer]))) for layer in sorted(ranks))


def _scaled(recipe: Recipe, weights: tuple[float, ...], budget: int, share: float) -> Recipe:
    # Over the depth only where there is one.
    shape = {"name": "custom", "weights": weights} if len(weights) > 1 else {"name": "uniform"}
    schedule = {**shape, "budget": max(1, budget)}
    bands = []
    for band in recipe.adapters:
        update: dict[str, Any] = {}
        if band.alpha is not None:
            update["alpha"] = band.alpha * (math.sqrt(share) if band.kind == "rslora" else share)
        if band.kind == "adalora":  # the initial rank is told for the default rank, and keeps its ratio
            default = BandSection.model_fields["rank"].default
            settings = band.adalora_settings
            initial = max(default, round(default * band.init_rank / band.rank))
            update["adalora"] = settings.model_copy(update={"init_rank": initial})
        bands.append(band.model_copy(update=update))
    return _revised(recipe, tuple(bands), schedule=schedule)


def _revised(recipe: Recipe, bands: tuple[BandSection, ...], **sections: Any) -> Recipe:
    """The recipe with these bands, which have no ranks of their own any more, and other sections."""
    without = {"rank", *_PLANNER_ONLY}
    values = recipe.model_dump(exclude_unset=True) | sections
    values["adapters"] = [band.model_dump(exclude_unset=True, exclude=without) for band in bands]
    return Recipe.model_validate(values)
