"""The bootstrap against cases whose answer is known, and the Pareto front."""

from __future__ import annotations

import numpy as np
import pytest

from qhybrid.sweep.statistics import F1, RATIO, compare, f1_features, macro_f1, pareto_front


def losses(values: np.ndarray, tokens: float = 1.0) -> np.ndarray:
    return np.stack([values, np.full(len(values), tokens)], axis=1)


def test_one_seed_gives_the_standard_error_of_a_mean():
    """Of n rows with deviation s the 95% interval of the mean is 1.96·s/√n to either side."""
    rows = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = compare(RATIO, {"c": {0: losses(rows)}}, "c")["c"]
    half = 1.96 * rows.std() / np.sqrt(400)
    assert found.own.mean == pytest.approx(rows.mean(), rel=1e-12) and found.difference is None
    assert found.own.mean - found.own.low == pytest.approx(half, rel=0.05)
    assert found.own.high - found.own.mean == pytest.approx(half, rel=0.05)


def test_seeds_and_rows_both_count():
    """Means over s seeds and r rows that are crossed vary by σ²_seed/s + σ²_row/r."""
    draws = np.random.default_rng(1)
    seeds, rows = draws.normal(0, 1.0, size=30), draws.normal(0, 4.0, size=300)
    arms = {"c": {s: losses(seeds[s] + rows) for s in range(30)}}
    own = compare(RATIO, arms, "c")["c"].own
    expected = np.sqrt(seeds.var() / 30 + rows.var() / 300)
    assert (own.high - own.low) / (2 * 1.96) == pytest.approx(expected, rel=0.05)


def test_what_arms_have_in_common_falls_out_of_the_difference():
    """Rows and seeds differ widely, and the arm is always worse by 0.01: paired, that is certain."""
    draws = np.random.default_rng(2)
    base = {seed: draws.gamma(2, 5, size=50) + 3 * seed for seed in range(3)}
    arms = {"c": {s: losses(v) for s, v in base.items()}, "a": {s: losses(v + 0.01) for s, v in base.items()}}
    found = compare(RATIO, arms, "c")["a"]
    assert found.own.high - found.own.low > 1
    assert found.difference is not None
    assert found.difference.low == pytest.approx(0.01) and found.difference.high == pytest.approx(0.01)


def test_the_interval_of_a_difference_covers_it():
    """In 200 made-up comparisons whose truth is 0.5, about 95% of the intervals hold it."""
    covered = 0
    for trial in range(200):
        draws = np.random.default_rng(trial)
        control = draws.normal(2, 3, size=150)
        arms = {"c": {0: losses(control)}, "a": {0: losses(control + 0.5 + draws.normal(0, 1, size=150))}}
        found = compare(RATIO, arms, "c", resamples=600, seed=trial)["a"].difference
        assert found is not None
        covered += found.low <= 0.5 <= found.high
    assert 182 <= covered <= 198


def test_a_loss_weighs_tokens_and_not_rows():
    features = np.array([[10.0, 10.0], [90.0, 30.0]])
    assert compare(RATIO, {"c": {0: features}}, "c", resamples=10)["c"].own.mean == 2.5


def test_a_seed_that_is_missing_is_missing_in_the_pairs_too():
    """The arm has no run of seed 1, in which the control is much better; the pair of seed 0 says what there is."""
    rows = np.arange(10.0)
    arms = {"c": {0: losses(rows), 1: losses(rows - 100)}, "a": {0: losses(rows + 1)}}
    found = compare(RATIO, arms, "c", resamples=200)["a"]
    assert found.own.mean == pytest.approx(5.5)
    assert found.difference is not None and found.difference.mean == pytest.approx(1)


def test_an_arm_without_a_seed_of_the_controls_is_not_compared():
    arms = {"c": {0: losses(np.arange(10.0))}, "a": {1: losses(np.arange(10.0) + 1)}}
    found = compare(RATIO, arms, "c", resamples=200)["a"]
    assert found.own.mean == pytest.approx(5.5) and found.difference is None


def test_without_the_control_every_arm_has_its_own_figures():
    found = compare(RATIO, {"a": {0: losses(np.array([1.0, 3.0]))}}, "c")["a"]
    assert found.own.mean == 2 and found.difference is None


def test_seeds_may_hold_out_other_rows():
    """Of two seeds with 100 and 120 rows of their own the mean varies by (σ²/100 + σ²/120)/4, beside the seeds."""
    draws = np.random.default_rng(4)
    rows = {0: draws.normal(0, 4, size=100), 1: draws.normal(0, 4, size=120)}
    for values in rows.values():
        values -= values.mean()  # the seeds themselves do not differ
    arms = {"c": {seed: losses(values) for seed, values in rows.items()}}
    own = compare(RATIO, arms, "c")["c"].own
    # Of two seeds both are drawn half of the time; else one counts twice, without its mean with the other.
    each = [values.var() / len(values) for values in rows.values()]
    expected = np.sqrt(sum(each) / 4 / 2 + sum(each) / 4)
    assert (own.high - own.low) / (2 * 1.96) == pytest.approx(expected, rel=0.06)


def test_equal_inputs_give_equal_intervals():
    rows = {"c": {0: losses(np.random.default_rng(3).normal(size=40))}}
    assert compare(RATIO, rows, "c") == compare(RATIO, rows, "c")


def test_f1_from_sums_over_rows():
    """Expected 0 0 0 1 1, predicted 0 1 0 0 1: TP 2, FP 1, FN 1 for label 0, and 1, 1, 1 for label 1."""
    expected, predicted = (0, 0, 0, 1, 1), (0, 1, 0, 0, 1)
    zero, one = (f1_features(expected, predicted, label) for label in (0, 1))
    assert F1.value(zero.sum(axis=0)) == pytest.approx(4 / 6)
    assert F1.value(one.sum(axis=0)) == pytest.approx(2 / 4)
    both = np.concatenate([zero, one], axis=1)
    assert macro_f1(2).value(both.sum(axis=0)) == pytest.approx((4 / 6 + 2 / 4) / 2)
    drawn = compare(F1, {"c": {0: zero}}, "c", resamples=500)["c"].own
    assert drawn.low < 4 / 6 < drawn.high and drawn.low >= 0 and drawn.high <= 1


def test_the_front():
    points = {
        "best": (1.0, 5, 9),
        "smallest": (2.0, 1, 9),
        "beaten": (2.0, 5, 9),  # by both
        "quickest": (3.0, 5, 1),
        "twin": (3.0, 5, 1),  # as good as another is not beaten
    }
    assert pareto_front(points) == {"best", "smallest", "quickest", "twin"}
    assert pareto_front({"alone": (1.0,)}) == {"alone"} and pareto_front({}) == set()
