"""Mixtures: how many rows each weighted source gives, and which ones."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import Literal

import numpy as np

Picks = list[tuple[int, int]]  # (source, row in the source)


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` into whole numbers in proportion to `weights`, by largest remainder (Hamilton).

    The parts sum to `total` and each is the exact share rounded up or down. Ties go to the first source.
    """
    return _share_out(total, _whole_weights(weights))


def _share_out(total: int, units: Sequence[int]) -> list[int]:
    whole = sum(units)
    parts = [total * unit // whole for unit in units]
    remainders = [total * unit % whole for unit in units]
    by_remainder = sorted(range(len(units)), key=lambda source: (-remainders[source], source))
    for source in by_remainder[: total - sum(parts)]:
        parts[source] += 1
    return parts


def mixture_quotas(
    num_rows: Sequence[int],
    weights: Sequence[float],
    mode: Literal["first_exhausted", "all_exhausted"],
) -> list[int]:
    """How many rows each source gives, so that the rows are shared out exactly by `weights`.

    "first_exhausted" is the largest mixture in which no row is used twice; "all_exhausted" the smallest in
    which every row is used. Both search, because a larger total can make one part smaller (the Alabama
    paradox of largest remainders); the start is a bound that no solution can be beyond.
    """
    units = _whole_weights(weights)
    whole = sum(units)
    if mode == "first_exhausted":
        total = min((rows + 1) * whole // unit for rows, unit in zip(num_rows, units, strict=True))
        step = -1
    else:
        total = max(max(rows - 1, 0) * whole // unit for rows, unit in zip(num_rows, units, strict=True))
        step = 1
    while True:
        quotas = _share_out(total, units)
        if all((rows - quota) * step <= 0 for rows, quota in zip(num_rows, quotas, strict=True)):
            return quotas
        total += step


def mix(num_rows: Sequence[int], quotas: Sequence[int], seed: int) -> Picks:
    """Pick `quotas` rows of the sources and shuffle them all.

    A source that gives more rows than it has goes through a new permutation of itself each time round, so
    its rows are used equally often, or one apart.
    """
    picks: Picks = []
    for source, (rows, quota) in enumerate(zip(num_rows, quotas, strict=True)):
        random = np.random.default_rng([seed, source])
        order: list[int] = []
        while len(order) < quota:
            order.extend(random.permutation(rows).tolist())
        picks.extend((source, row) for row in order[:quota])
    shuffled = np.random.default_rng([seed, len(num_rows)]).permutation(len(picks))
    return [picks[index] for index in shuffled]


def hold_out(num_rows: Sequence[int], fraction: float, seed: int) -> list[list[int]]:
    """For each source the rows to keep for evaluation: `fraction` of all rows, at least one, in file order.

    Each source gives its part in proportion to its rows, so the evaluation set looks like the whole.
    """
    total = max(1, round(sum(num_rows) * fraction))
    parts = share_out(total, num_rows)
    return [
        sorted(np.random.default_rng([seed, source, 1]).permutation(rows)[:part].tolist())
        for source, (rows, part) in enumerate(zip(num_rows, parts, strict=True))
    ]


def _whole_weights(weights: Sequence[float]) -> list[int]:
    # str() is the decimal that the recipe says: 0.3 means 3/10, not the nearest binary fraction
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]
