"""Mixtures: exact quotas, even repeats, and the same choice from the same seed."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import ceil, floor

from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.data.mixture import hold_out, mix, mixture_quotas, share_out

weights_lists = st.lists(st.integers(1, 40).map(lambda weight: weight / 10), min_size=1, max_size=4)


@given(st.integers(0, 5000), weights_lists)
def test_shares_are_the_exact_share_rounded(total, weights):
    parts = share_out(total, weights)
    exact = [Fraction(str(weight)) for weight in weights]
    assert sum(parts) == total
    for part, weight in zip(parts, exact, strict=True):
        share = total * weight / sum(exact)
        assert floor(share) <= part <= ceil(share)


@given(st.data(), weights_lists)
@settings(deadline=None)
def test_first_exhausted_is_the_largest_without_repeats(data, weights):
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=len(weights), max_size=len(weights)))
    quotas = mixture_quotas(sizes, weights, "first_exhausted")
    assert quotas == share_out(sum(quotas), weights)
    fitting = [
        total
        for total in range(sum(sizes) + 1)
        if all(part <= size for part, size in zip(share_out(total, weights), sizes, strict=True))
    ]
    assert sum(quotas) == max(fitting)


@given(st.data(), weights_lists)
@settings(deadline=None, max_examples=50)
def test_all_exhausted_is_the_smallest_that_uses_every_row(data, weights):
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=len(weights), max_size=len(weights)))
    quotas = mixture_quotas(sizes, weights, "all_exhausted")
    assert quotas == share_out(sum(quotas), weights)
    assert all(quota >= size for quota, size in zip(quotas, sizes, strict=True))
    for total in range(sum(quotas)):
        assert any(part < size for part, size in zip(share_out(total, weights), sizes, strict=True))


def test_thirty_to_seventy():
    assert mixture_quotas([1000, 1000], [30, 70], "first_exhausted") == [429, 1000]
    assert mixture_quotas([300, 10_000], [0.3, 0.7], "first_exhausted") == [300, 701]
    assert mixture_quotas([300, 10_000], [0.3, 0.7], "all_exhausted") == [4286, 10_000]


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 70)), min_size=1, max_size=4), st.integers(0, 9))
def test_repeats_are_even_and_seeded(sources, seed):
    sizes, quotas = zip(*sources, strict=True)
    picks = mix(sizes, quotas, seed)
    assert picks == mix(sizes, quotas, seed)
    for source, (size, quota) in enumerate(zip(sizes, quotas, strict=True)):
        uses = Counter(row for place, row in picks if place == source)
        counts = [uses[row] for row in range(size)]
        assert sum(counts) == quota == sum(uses.values())
        assert max(counts) - min(counts) <= 1


def test_the_mixture_is_shuffled_differently_by_seed():
    orders = {tuple(mix([50, 50], [50, 50], seed)) for seed in range(5)}
    assert len(orders) == 5
    assert sorted(next(iter(orders))) == [(source, row) for source in (0, 1) for row in range(50)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.floats(0.01, 0.9), st.integers(0, 5))
def test_hold_out_takes_its_part_of_every_source(sizes, fraction, seed):
    held = hold_out(sizes, fraction, seed)
    assert held == hold_out(sizes, fraction, seed)
    total = sum(len(rows) for rows in held)
    assert total == max(1, round(sum(sizes) * fraction))
    for rows, size in zip(held, sizes, strict=True):
        assert rows == sorted(set(rows)) and all(0 <= row < size for row in rows)
        assert abs(len(rows) - total * size / sum(sizes)) < 1
