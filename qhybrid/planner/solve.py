"""The largest value of a setting that fits: ranks, micro-batch, row length, layers without checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.spec import ModelSpec
from qhybrid.planner.plan import BUDGET, Plan, RankCap
from qhybrid.recipe.band import BandSection
from qhybrid.recipe.schema import Recipe

Quantity = Literal["rank", "micro_batch", "max_length", "checkpointing"]
Planner = Callable[[Recipe], Plan]  # a plan for a changed recipe, on the same model and budget

_BUDGET_SHARES = 64
_LENGTH_STEP = 64  # tokens
_LARGEST_BATCH = 4096
_LONGEST = 2**20


def with_training(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other training settings."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})


def with_memory(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other memory settings."""
    return recipe.model_copy(update={"memory": recipe.memory.model_copy(update=changes)})


def asked_ranks(recipe: Recipe) -> dict[str, int]:
    """What the planner may change of the ranks: the rank by band, or the one budget of all."""
    if recipe.rank_budget is not None:
        return {BUDGET: recipe.rank_budget}
    return {band.band: band.rank for band in recipe.adapters}


def with_ranks(recipe: Recipe, ranks: dict[str, int]) -> Recipe:
    """The recipe with other ranks by band, or with another budget as BUDGET, as `asked_ranks` has them.

    Each band's scaling s stays what it was, so its function starts alike. AdaLoRA's initial rank keeps its ratio
    to the target rank.
    """
    if recipe.rank_budget is not None:
        name = "schedule" if recipe.schedule else "ranks"
        spread = getattr(recipe, name).model_copy(update={"budget": ranks[BUDGET]})
        return recipe.model_copy(update={name: spread})
    bands = []
    for band in recipe.adapters:
        rank = ranks.get(band.band, band.rank)
        if rank == band.rank:
            bands.append(band)
            continue
        share = rank / band.rank
        update: dict[str, Any] = {"rank": rank}
        if band.alpha is not None:  # alpha/r stays; alpha/sqrt(r) for rsLoRA; AdaLoRA divides by its initial rank
            update["alpha"] = band.alpha * (math.sqrt(share) if band.kind == "rslora" else share)
        if band.kind == "adalora":
            initial = max(rank + 1, round(band.init_rank * share)) if band.init_rank > band.rank else rank
            if band.alpha is not None:
                update["alpha"] = band.alpha * initial / band.init_rank
            update["adalora"] = band.adalora_settings.model_copy(update={"init_rank": initial})
        bands.append(band.model_copy(update=update))
    return recipe.model_copy(update={"adapters": tuple(bands)})


def solve(quantity: Quantity, recipe: Recipe, spec: ModelSpec, plan: Planner) -> Recipe | None:
    """`recipe` with the largest value of `quantity` that fits, or None if not even the smallest does."""
    match quantity:
        case "rank":
            return solve_rank(recipe, spec, plan)
        case "micro_batch":
            best = largest(
                1, _LARGEST_BATCH, lambda n: fits(plan, with_training(recipe, per_device_train_batch_size=n))
            )
            return None if best is None else with_training(recipe, per_device_train_batch_size=best)
        case "max_length":
            steps = longest_row(spec) // _LENGTH_STEP
            best = largest(
                1, max(1, steps), lambda n: fits(plan, with_training(recipe, max_length=n * _LENGTH_STEP))
            )
            return None if best is None else with_training(recipe, max_length=best * _LENGTH_STEP)
        case "checkpointing":
            return solve_checkpointing(recipe, spec, plan)


def longest_row(spec: ModelSpec) -> int:
    """The longest row that the model was made for."""
    return min(spec.max_position_embeddings or _LONGEST, _LONGEST)


def solve_checkpointing(recipe: Recipe, spec: ModelSpec, plan: Planner) -> Recipe | None:
    """The fewest checkpointed layers, from the bottom, that fit."""
    free = largest(0, spec.num_layers, lambda n: fits(plan, checkpointing(recipe, spec, spec.num_layers - n)))
    return None if free is None else checkpointing(recipe, spec, spec.num_layers - free)


def checkpointing(recipe: Recipe, spec: ModelSpec, num_layers: int) -> Recipe:
    """The recipe with its lowest `num_layers` layers checkpointed."""
    if num_layers == 0:
        return _with_checkpointing(with_memory(recipe, checkpoint_layers=None), False)
    named = None if num_layers == spec.num_layers else ("0" if num_layers == 1 else f"0-{num_layers - 1}")
    recipe = _without_every_n(recipe)
    return _with_checkpointing(with_memory(recipe, checkpoint_layers=named), True)


def _without_every_n(recipe: Recipe) -> Recipe:
    """every_n_layers would name other layers."""
    changes = {}
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        given = getattr(recipe.training, name)
        if isinstance(given, dict) and "every_n_layers" in given:
            changes[name] = {key: value for key, value in given.items() if key != "every_n_layers"} or None
    return with_training(recipe, **changes) if changes else recipe


def _with_checkpointing(recipe: Recipe, enabled: bool) -> Recipe:
    """Under the name that the recipe uses."""
    if recipe.training.activation_checkpointing is not None:
        return with_training(recipe, activation_checkpointing=enabled)
    return with_training(recipe, gradient_checkpointing=enabled)


def solve_rank(
    recipe: Recipe, spec: ModelSpec, plan: Planner, *, no_more_than_asked: bool = False
) -> Recipe | None:
    """All bands' ranks, raised or lowered together by their weights, as far as it fits.

    Args:
        no_more_than_asked: only lower them.
    """
    return largest_ranks(recipe, spec, lambda tried: fits(plan, tried), no_more_than_asked=no_more_than_asked)


def largest_ranks(
    recipe: Recipe, spec: ModelSpec, holds: Callable[[Recipe], bool], *, no_more_than_asked: bool = False
) -> Recipe | None:
    """As `solve_rank`, with a condition of the caller's."""
    steps = rank_steps(recipe, spec, no_more_than_asked=no_more_than_asked)
    best = largest(0, len(steps) - 1, lambda n: holds(with_ranks(recipe, steps[n])))
    return None if best is None else with_ranks(recipe, steps[best])


def rank_caps(asked: Recipe, got: Recipe) -> tuple[RankCap, ...]:
    """What every band, or the budget of all, asked for and got."""
    after = asked_ranks(got)
    return tuple(RankCap(name, before, after[name]) for name, before in asked_ranks(asked).items())


def rank_steps(recipe: Recipe, spec: ModelSpec, *, no_more_than_asked: bool) -> list[dict[str, int]]:
    """What `with_ranks` can be given, the smallest first."""
    if recipe.rank_budget is not None:
        return _budget_steps(recipe, spec, no_more_than_asked)
    limits = {band.band: _largest_rank(band, recipe, spec) for band in recipe.adapters}
    return _rank_steps(recipe.adapters, {} if no_more_than_asked else limits)


def _budget_steps(recipe: Recipe, spec: ModelSpec, no_more_than_asked: bool) -> list[dict[str, int]]:
    """Budgets, the smallest first: 64ths of what was asked for, from the lowest ranks on."""
    asked, spread = recipe.rank_budget, recipe.schedule or recipe.ranks
    assert asked is not None and spread is not None
    rows = build_layout(recipe, spec).rows
    least = (spread.min_rank or 1) * sum(row.in_features + row.out_features for row in rows)
    most = sum(min(row.in_features, row.out_features) * (row.in_features + row.out_features) for row in rows)
    top = asked if no_more_than_asked else max(asked, most)
    shares = range(1, math.ceil(_BUDGET_SHARES * top / asked) + 1)
    budgets = {max(least, min(top, asked * share // _BUDGET_SHARES)) for share in shares}
    return [{BUDGET: budget} for budget in sorted(budgets)]


def _rank_steps(bands: tuple[BandSection, ...], limits: dict[str, int]) -> list[dict[str, int]]:
    """All different ranks that the bands go through together, the smallest first.

    A band of weight w has the rank r·f^w at the factor f that all bands share, rounded down to its step and kept
    between its minimum and its limit. f runs over the values at which some band changes.
    """
    factors = {1.0}
    for band in bands:
        if band.rank_weight == 0:
            continue
        top = limits.get(band.band, band.rank)
        values = range(band.rank_step, top + 1, band.rank_step)
        factors.update((value / band.rank) ** (1 / band.rank_weight) for value in (*values, band.smallest_rank))
    steps: list[dict[str, int]] = []
    for factor in sorted(factors):
        ranks = {band.band: _rank_at(band, factor, limits.get(band.band, band.rank)) for band in bands}
        if not steps or ranks != steps[-1]:
            steps.append(ranks)
    return steps


def _rank_at(band: BandSection, factor: float, limit: int) -> int:
    if factor == 1 or band.rank_weight == 0:
        return min(band.rank, limit)
    wished = band.rank * factor**band.rank_weight
    stepped = math.floor(wished / band.rank_step + 1e-9) * band.rank_step
    return max(band.smallest_rank, min(stepped, limit))


def _largest_rank(band: BandSection, recipe: Recipe, spec: ModelSpec) -> int:
    """The largest rank whose matrices are not larger than the weight; with AdaLoRA's initial rank in mind."""
    rows = build_layout(recipe, spec).of_band(band.band)
    side = min(min(row.in_features, row.out_features) for row in rows)
    if band.kind == "adalora":
        side = int(side * band.rank / band.init_rank) - 1
    stepped = side // band.rank_step * band.rank_step
    return max(band.rank, stepped)


def fits(plan: Planner, recipe: Recipe) -> bool:
    """Whether `recipe` fits; it does where there is no limit."""
    return plan(recipe).fits is not False


def largest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The largest number from `low` to `high` for which `holds`, which may change once; None if for none."""
    if not holds(low):
        return None
    step = 1
    top = low
    while top < high:  # the answer is often near the start, and large values are slow to plan
        reached = min(high, low + step)
        if not holds(reached):
            high = reached - 1
            break
        top, step = reached, step * 2
    while top < high:
        middle = (top + high + 1) // 2
        if holds(middle):
            top = middle
        else:
            high = middle - 1
    return top
