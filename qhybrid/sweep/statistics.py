"""Means with intervals by a paired bootstrap over seeds and held-out rows, and the Pareto front. numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qhybrid.sweep.results import Estimate

RESAMPLES = 10_000
_AT_ONCE = 500  # resamples whose sums over rows are in memory together
_TAILS = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Metric:
    """A figure that depends on sums over rows: `value` takes sums (..., features) and gives (...)."""

    num_features: int
    value: Callable[[np.ndarray], np.ndarray]


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-300)


def _f1(sums: np.ndarray) -> np.ndarray:
    """Of true positives, and rows that are positive or called so: 2·TP/(2·TP + FP + FN)."""
    return 2 * sums[..., 0] / np.maximum(sums[..., 1], 1)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    pairs = sums.reshape(*sums.shape[:-1], -1, 2)
    return _f1(pairs).mean(axis=-1)


RATIO = Metric(2, _ratio)  # loss: nats and tokens; accuracy, exact match: right ones and rows
F1 = Metric(2, _f1)


def macro_f1(num_labels: int) -> Metric:
    """The mean F1 over labels."""
    return Metric(2 * num_labels, _macro_f1)


def f1_features(expected: Sequence[int], predicted: Sequence[int], label: int) -> np.ndarray:
    """Of each row (rows, 2): whether it is a true positive of the label, and how often it counts below it."""
    said, meant = np.asarray(predicted) == label, np.asarray(expected) == label
    return np.stack([said & meant, said.astype(int) + meant], axis=1).astype(np.float64)


@dataclass(frozen=True)
class Compared:
    """An arm's own figure, and what it has more than the control has.

    None for the control itself, for an arm that has no seed in common with it, and for all if it is not there.
    """

    own: Estimate
    difference: Estimate | None


def compare(
    metric: Metric,
    arms: Mapping[str, Mapping[int, np.ndarray]],
    control: str,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Compared]:
    """Figures of all arms with 95% intervals, by the percentile bootstrap over seeds and rows.

    Every arm is measured on the same rows of a seed, and seeds and rows are crossed: both are drawn with
    replacement, each apart from the other (Owen, The pigeonhole bootstrap, 2007, doi 10.1214/07-AOAS122). The same
    draws serve all arms: a difference to the control is one of the same seeds on the same rows, and what the two
    have in common falls out of it. A figure is the mean over seeds of the metric on the rows. Seeds whose rows are
    others (held out by the seed) have the same places drawn, which changes no distribution.

    Args:
        arms: of each arm, by seed, the features of its rows (rows, features). Arms may lack seeds: their own
            figures are over those they have, and differences over those that the control has too.
        resamples: how many draws.

    Returns:
        By the arm's name.
    """
    seeds = sorted({seed for features in arms.values() for seed in features})
    lengths = sorted({len(features) for of_seeds in arms.values() for features in of_seeds.values()})
    draws = np.random.default_rng(seed)
    # How often each seed and each row is drawn.
    seed_counts = draws.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=resamples)
    # (1 + resamples, seeds); the first is the sample itself, NaN where an arm lacks a seed
    values = {name: np.full((1 + resamples, len(seeds)), np.nan) for name in arms}
    for start in range(0, 1 + resamples, _AT_ONCE):
        end = min(1 + resamples, start + _AT_ONCE)
        row_counts = {}
        for length in lengths:
            drawn = draws.multinomial(length, np.full(length, 1 / length), size=end - start)
            row_counts[length] = drawn.astype(np.float64)
            if start == 0:
                row_counts[length][0] = 1
        for name, of_seeds in arms.items():
            for one, features in of_seeds.items():
                values[name][start:end, seeds.index(one)] = metric.value(row_counts[len(features)] @ features)
    counts = np.vstack([np.ones(len(seeds)), seed_counts])
    found = {}
    for name in arms:
        is_paired = name != control and not arms[name].keys().isdisjoint(arms.get(control, ()))
        difference = _estimate(values[name] - values[control], counts) if is_paired else None
        found[name] = Compared(_estimate(values[name], counts), difference)
    return found


def _estimate(values: np.ndarray, counts: np.ndarray) -> Estimate:
    """The mean over the seeds that are there, by how often they were drawn; draws of none of them are left out."""
    there = np.where(np.isnan(values), 0, counts)
    drawn = there.sum(axis=1)
    means = (np.nan_to_num(values) * there).sum(axis=1)[drawn > 0] / drawn[drawn > 0]
    low, high = np.percentile(means[1:], _TAILS) if len(means) > 1 else (means[0], means[0])
    return Estimate(float(means[0]), float(low), float(high))


def pareto_front(points: Mapping[str, Sequence[float]]) -> set[str]:
    """The names of the points that no other one beats: as low in every coordinate, and lower in one."""

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return {name for name, point in points.items() if not any(beats(other, point) for other in points.values())}
