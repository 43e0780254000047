"""Ranks at one budget: from what every module would like to the nearest whole ranks that the budget pays.

The depth schedules are named so that arms of a comparison differ in where the ranks are, and in nothing else.
Evidence for any of them is mixed (docs/evidence.md), so none is a default.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from qhybrid.errors import LayoutError
from qhybrid.recipe.ranks import ScheduleSection

_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, are spread evenly
_DIGITS = 9  # of a wished rank; beyond are rounding errors


@dataclass(frozen=True)
class Place:
    """A module that a schedule gives a rank: where it is, what a rank costs there, and what it may be."""

    layer: int
    target: str
    cost: int  # in + out: parameters of one rank
    lowest: int
    highest: int


def scheduled_ranks(schedule: ScheduleSection, places: Sequence[Place], budget: int) -> list[int]:
    """The rank of every place, in order: Σ rank·cost is at most `budget`, and less than one more rank below it.

    But where the limits of all places bind: then it is what they allow.

    Raises:
        LayoutError: the budget does not pay the lowest ranks; a depth schedule over a single layer; weights for
            targets that are not there.
    """
    layers = sorted({place.layer for place in places})
    if schedule.name == "by_module":
        _require_targets(schedule, places)
    elif schedule.name not in ("uniform", "random") and len(layers) < 2:
        raise LayoutError(
            f"schedule {schedule.name} runs over the depth, and there is a single layer",
            hint="use uniform, by_module or random, or a band of more layers",
            at=("name",),
        )
    index = {layer: index for index, layer in enumerate(layers)}
    weights = [_weight(schedule, i, index[place.layer], len(layers), place) for i, place in enumerate(places)]
    return spread(weights, places, budget)


def spread(weights: Sequence[float], places: Sequence[Place], budget: int) -> list[int]:
    """Whole ranks in proportion to `weights`, within each place's limits, that cost at most `budget`.

    Raises:
        LayoutError: the budget does not pay the lowest ranks.
    """
    least = sum(place.lowest * place.cost for place in places)
    if least > budget:
        every_one = all(place.lowest == 1 for place in places)
        needed = "one rank for each module costs" if every_one else "the lowest ranks cost"
        raise LayoutError(
            f"a budget of {budget:,} parameters is below what {needed}: {least:,} for {len(places)} modules",
            hint=f"give at least {least:,}, or adapt fewer modules",
            at=("budget",),
        )
    wished = _wished(weights, places, budget)
    ranks = [math.floor(rank) for rank in wished]
    left = budget - sum(rank * place.cost for rank, place in zip(ranks, places, strict=True))
    # What rounding down left goes to the largest fractions; those that are equal take turns along the depth.
    order = sorted(range(len(places)), key=lambda i: (ranks[i] - wished[i], i * _GOLDEN % 1))
    for i in order:
        if ranks[i] < min(wished[i], places[i].highest) and places[i].cost <= left:
            ranks[i] += 1
            left -= places[i].cost
    return ranks


def _wished(weights: Sequence[float], places: Sequence[Place], budget: int) -> list[float]:
    """clip(c·weight, lowest, highest) for the c at which they cost the budget."""

    def at(c: float) -> list[float]:
        return [min(max(c * w, p.lowest), p.highest) for w, p in zip(weights, places, strict=True)]

    def cost(ranks: list[float]) -> float:
        return sum(rank * place.cost for rank, place in zip(ranks, places, strict=True))

    low, high = 0.0, max((p.highest / w for w, p in zip(weights, places, strict=True) if w > 0), default=0.0)
    if cost(at(high)) <= budget:
        return at(high)
    while high - low > 1e-15 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if cost(at(middle)) <= budget else (low, middle)
    return [round(rank, _DIGITS) for rank in at(low)]


def _require_targets(schedule: ScheduleSection, places: Sequence[Place]) -> None:
    assert isinstance(schedule.weights, dict)
    known = dict.fromkeys(place.target for place in places)
    for target in schedule.weights:
        if target not in known:
            raise LayoutError(
                f"schedule by_module: {target!r} is not adapted",
                hint=f"adapted are {', '.join(known)}",
                at=("weights", target),
            )


def _weight(schedule: ScheduleSection, number: int, index: int, num_layers: int, place: Place) -> float:
    """What place `number`, in layer `index` of `num_layers`, would like, up to a common factor."""
    ratio, depth = schedule.resolved_ratio, index / max(1, num_layers - 1)
    match schedule.name:
        case "uniform":
            return 1.0
        case "increasing":
            return 1 + (ratio - 1) * depth
        case "decreasing":
            return ratio - (ratio - 1) * depth
        case "pyramid":
            return 1 + (ratio - 1) * (1 - abs(2 * depth - 1))
        case "middle":  # as the word means in a band's layers
            return ratio if round(num_layers / 3) <= index < round(num_layers * 2 / 3) else 1.0
        case "random":  # each place has a draw of its own, whatever the number of places
            return ratio ** random.Random(f"{schedule.seed or 0}:{number}").random()
        case "by_module":
            assert isinstance(schedule.weights, dict)
            return schedule.weights.get(place.target, 1.0)
        case "custom":
            assert isinstance(schedule.weights, tuple)
            at = depth * (len(schedule.weights) - 1)
            left = min(int(at), len(schedule.weights) - 2)
            return schedule.weights[left] + (at - left) * (schedule.weights[left + 1] - schedule.weights[left])
