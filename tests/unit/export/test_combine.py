"""Combining adapters against float64 references written from the papers, and against peft where it is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import record_figure
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.errors import AdapterError, ExportError
from qhybrid.export.derive.combine import (
    METHODS,
    CombineSettings,
    combine,
    disjoint_mean,
    drop_values,
    overall_error,
    trim_values,
)

INFO = AdapterInfo(
    base_model="base", base_revision=None, quantization="nf4", double_quant=True, dtype="bfloat16",
    adapter_dtype="bfloat16", attn_implementation="sdpa",
)  # fmt: skip
Q, UP = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"
SHAPES = {"q_proj": (24, 20), "up_proj": (36, 20)}


def module(name, rank, scaling=1.0, seed=0, dtype=torch.float32, magnitude=None):
    out, inner = SHAPES[name.rpartition(".")[2]]
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator)
    return PlainModule(name, a.to(dtype), b.to(dtype), scaling, magnitude)


def adapter(*modules, name="a", base_minus=None):
    return PlainAdapter(tuple(modules), INFO, Path(name), base_minus)


def delta(plain):
    """s·B·A in fp64."""
    return plain.scaling * plain.b.double().numpy() @ plain.a.double().numpy()


def weighted_sum(sources):
    """The weighted sum of every ΔW in fp64, by module."""
    total = {}
    for source, weight in sources:
        for plain in source:
            total[plain.module] = total.get(plain.module, 0) + weight * delta(plain)
    return total


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def full(method, **more):
    """Settings under which the method's result is not cut in rank."""
    return CombineSettings(method, **({} if method == "cat" else {"rank": 99}), **more)


# Identity and the exact sum


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_adapter_with_weight_one_stays_what_it_is(method, dtype):
    dense = {} if method in ("cat", "svd", "linear") else {"density": 1.0}
    cut = {"energy": 1.0} if method == "svd" else {}
    source = adapter(module(Q.format(0), 4, 2.0, 1, dtype), module(UP.format(1), 3, 0.3, 2, dtype))
    found = combine([(source, 1.0)], CombineSettings(method, **cut, **dense))
    assert [combined.module.module for combined in found] == [plain.module for plain in source]
    for combined, plain in zip(found, source, strict=True):
        assert combined.module.rank == plain.rank
        assert relative(delta(combined.module), delta(plain)) <= 1e-6
        assert combined.norm == pytest.approx(np.linalg.norm(delta(plain)), rel=1e-6)
        assert combined.error <= 1e-6
    worst = max(relative(delta(c.module), delta(plain)) for c, plain in zip(found, source, strict=True))
    name = f"one adapter with weight 1, {method}, {str(dtype).removeprefix('torch.')}"
    record_figure(15, name, f"the same to {worst:.1e} (1e-6 is allowed)")


names = st.lists(st.sampled_from([Q.format(0), Q.format(1), UP.format(0), UP.format(2)]), min_size=1, unique=True)
sources_of = st.lists(
    st.tuples(names, st.integers(1, 9), st.sampled_from([0.125, 2.0, 1.4142]), st.floats(0.1, 3), st.booleans()),
    min_size=1, max_size=4,
)  # fmt: skip


def build(drawn, seed):
    return [
        (
            adapter(
                *(module(name, rank, scaling, seed + 10 * i + j) for j, name in enumerate(chosen)), name=str(i)
            ),
            -weight if negative else weight,
        )
        for i, (chosen, rank, scaling, weight, negative) in enumerate(drawn)
    ]


_cat_errors: list[float] = []  # of all examples


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sources_of, st.integers(0, 2**30))
def test_cat_is_the_weighted_sum_whatever_the_ranks_scalings_weights_and_modules(drawn, seed):
    sources = build(drawn, seed)
    expected = weighted_sum(sources)
    found = combine(sources, CombineSettings("cat"))
    assert {combined.module.module for combined in found} == expected.keys()
    layers = [int(combined.module.module.split(".")[2]) for combined in found]
    assert layers == sorted(layers)
    for combined in found:
        name = combined.module.module
        # Against the sum of the parts' sizes: they may cancel.
        size = sum(abs(w) * np.linalg.norm(delta(p)) for s, w in sources for p in s if p.module == name)
        error = np.linalg.norm(delta(combined.module) - expected[name]) / size
        assert error <= 1e-6
        _cat_errors.append(error)
        assert combined.module.rank == sum(p.rank for s, _ in sources for p in s if p.module == name)
        assert combined.error == 0
    figure = f"within {max(_cat_errors):.1e} of the float64 sum (1e-6 is allowed)"
    record_figure(15, "cat of up to four adapters, any ranks, scalings, weights and modules", figure)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sources_of, st.integers(0, 2**30), st.sampled_from([("svd", {}), ("linear", {}), ("svd", {"rank": 3})]))
def test_svd_and_linear_are_the_best_of_their_rank_and_say_the_true_error(drawn, seed, how):
    method, cut = how
    sources = build(drawn, seed)
    expected = weighted_sum(sources)
    for combined in combine(sources, CombineSettings(method, **cut)):
        name, rank = combined.module.module, combined.module.rank
        sigma = np.linalg.svd(expected[name], compute_uv=False)
        best = np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma)
        assert combined.error == pytest.approx(best, abs=1e-9)
        assert relative(delta(combined.module), expected[name]) == pytest.approx(best, abs=1e-6)
        if method == "linear":
            assert rank <= max(p.rank for s, _ in sources for p in s if p.module == name)
        elif not cut:  # the fewest with 99 % of the energy
            kept = (sigma**2).cumsum() / (sigma**2).sum()
            assert kept[rank - 1] >= 0.99 - 1e-9 and (rank == 1 or kept[rank - 2] < 0.99)


# ties, dare and magnitude_prune, from the papers


def trimmed(values, density):
    """TIES, step 1: the largest values, that share of them."""
    kept = np.zeros_like(values)
    places = np.argsort(-np.abs(values), axis=None)[: round(density * values.size)]
    kept.flat[places] = values.flat[places]
    return kept


def ties(values):
    """TIES, steps 2 and 3: γ = sgn(Στ), and the mean over {t: sgn(τ_t) = γ}, place by place."""
    result = np.zeros_like(values[0])
    for place in np.ndindex(*result.shape):
        own = np.array([value[place] for value in values])
        agreeing = own[(np.sign(own) == np.sign(own.sum())) & (own != 0)]
        result[place] = agreeing.mean() if len(agreeing) else 0
    return result


def dropped(values, density, seed, index, name):
    """DARE: δ·(1 − m)/(1 − p) with the mask that the seed gives."""
    ones = torch.ones(values.shape)
    drop_values(ones, density, f"{seed}:{index}:{name}")
    return values * (ones > 0).numpy() / density


def reference(method, parts, density, seed=0):
    """`parts`: index, weight and module of each source."""
    make = {"magnitude_prune": trimmed, "ties": trimmed}.get(method)
    values = [
        weight * (make(delta(p), density) if make else dropped(delta(p), density, seed, index, p.module))
        for index, weight, p in parts
    ]
    return ties(values) if method.endswith("ties") else sum(values)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.3, 2.0), (1.0, -0.5, 0.25)])
def test_methods_on_single_values_against_the_papers(method, density, weights):
    parts = [module(Q.format(0), rank, 0.5 * rank, rank) for rank in (3, 5, 4)]
    more = {"seed": 11} if method.startswith("dare") else {}
    sources = [(adapter(part, name=str(i)), w) for i, (part, w) in enumerate(zip(parts, weights, strict=True))]
    found = combine(sources, full(method, density=density, **more))
    expected = reference(
        method, [(i, w, p) for i, (p, w) in enumerate(zip(parts, weights, strict=True))], density, 11
    )
    # fp32 arithmetic: values of about 1 from sums of a few terms, and a decomposition and product in the end.
    assert relative(delta(found[0].module), expected) <= 3e-6
    assert found[0].norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    assert found[0].error <= 3e-6


@pytest.mark.parametrize("method", ["ties", "dare_ties", "magnitude_prune"])
def test_the_error_of_a_cut_is_the_true_one_and_the_least(method):
    parts = [module(UP.format(0), 4, 1.0, seed) for seed in range(3)]
    sources = [(adapter(part, name=str(i)), 1.0) for i, part in enumerate(parts)]
    expected = reference(method, [(i, 1.0, p) for i, p in enumerate(parts)], 0.5)
    sigma = np.linalg.svd(expected, compute_uv=False)
    for cut, rank in (({"rank": 6}, 6), ({}, 4), ({"energy": 0.9}, None)):
        (combined,) = combine(sources, CombineSettings(method, **cut))
        rank = rank or int(((sigma**2).cumsum() / (sigma**2).sum() < 0.9).sum()) + 1
        assert combined.module.rank == rank
        best = np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma)
        assert combined.error == pytest.approx(best, rel=1e-5)
        assert relative(delta(combined.module), expected) == pytest.approx(combined.error, rel=1e-5)


def test_a_negative_weight_is_the_negated_adapter_and_a_small_one_cannot_outvote():
    one, other = module(Q.format(0), 4, 1.0, 1), module(Q.format(0), 4, 1.0, 2)
    negated = PlainModule(other.module, other.a, -other.b, 1.0)
    for method in ("ties", "magnitude_prune", "linear", "cat"):
        pair = [
            combine([(adapter(one), 1.0), (adapter(second), weight)], full(method))[0].module
            for second, weight in ((other, -0.5), (negated, 0.5))
        ]
        assert relative(delta(pair[0]), delta(pair[1])) <= 1e-6
    # Where signs differ, the weighted values decide.
    merged = disjoint_mean([torch.tensor([1.0, 1.0, 0.0, 2.0]), 0.01 * torch.tensor([-5.0, 5.0, 3.0, -200.0])])
    assert torch.allclose(merged, torch.tensor([1.0, 0.525, 0.03, 0.0]))


def test_dare_keeps_its_share_and_the_mean_and_follows_its_seed():
    values = torch.ones(400, 400)

    def drop(seed):
        changed = values.clone()
        drop_values(changed, 0.3, seed)
        return changed

    kept = drop("1")
    assert torch.allclose(kept.unique(), torch.tensor([0.0, 1 / 0.3]))
    # 160000 draws: the share has a standard deviation of 0.0011, the mean one of 0.0038; five of each.
    assert (kept > 0).float().mean() == pytest.approx(0.3, abs=0.006)
    assert kept.mean() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(kept, drop("1")) and not torch.equal(kept, drop("2"))
    sources = [(adapter(module(Q.format(0), 4, 1.0, 1)), 1.0)] * 2
    torch.manual_seed(5)
    first, again, other = (
        delta(combine(sources, full("dare_linear", seed=seed))[0].module) for seed in (None, 0, 1)
    )
    assert np.array_equal(first, again) and not np.allclose(first, other)
    assert torch.initial_seed() == 5  # torch's own generator is not touched


def test_trimming_keeps_the_largest_and_all_that_equal_the_smallest_of_them():
    values = torch.tensor([[0.0, -3.0, 1.0], [2.0, 2.0, -1.0]])
    for density, expected in (
        (1 / 6, [0, -3, 0, 0, 0, 0]),
        (0.34, [0, -3, 0, 2, 2, 0]),
        (1.0, [0, -3, 1, 2, 2, -1]),
    ):
        changed = values.clone()
        trim_values(changed, density)
        assert changed.flatten().tolist() == expected


def test_the_overall_error_weighs_by_the_norms():
    assert overall_error([(3.0, 0.5), (4.0, 0.0)]) == pytest.approx(0.3)
    assert overall_error([]) == overall_error([(0.0, 0.0)]) == 0


# Refusals


def test_settings_without_an_effect_or_out_of_range_are_refused():
    for settings_, message in (
        ({"method": "cat", "rank": 4}, "cat is exact"),
        ({"method": "cat", "energy": 0.9}, "cat is exact"),
        ({"method": "svd", "rank": 4, "energy": 0.9}, "not both"),
        ({"method": "svd", "rank": 0}, "a rank of 0"),
        ({"method": "svd", "energy": 1.01}, "above 0 and at most 1"),
        ({"method": "svd", "energy": float("nan")}, "above 0 and at most 1"),
        ({"method": "ties", "density": 0.0}, "above 0 and at most 1"),
        ({"method": "svd", "density": 0.5}, "no effect with svd"),
        ({"method": "ties", "seed": 1}, "no effect with ties"),
    ):
        with pytest.raises(ExportError, match=message):
            CombineSettings(**settings_)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_combined_is_refused(method):
    plain = adapter(module(Q.format(0), 4))
    dora = adapter(module(Q.format(0), 4), module(Q.format(1), 4, magnitude=torch.ones(24)), name="d")
    pissa = adapter(module(Q.format(0), 4), base_minus="pissa")
    wide = adapter(PlainModule(Q.format(0), torch.ones(2, 21), torch.ones(24, 2), 1.0))
    head = adapter(PlainModule("lm_head", torch.ones(2, 20), torch.ones(24, 2), 1.0))
    for other, message in (
        (dora, r"d has DoRA modules \(model.layers.1.self_attn.q_proj"),
        (pissa, "PiSSA"),
        (wide, "24×20 and 24×21 in different adapters"),
        (head, "lm_head is in no layer"),
    ):
        with pytest.raises(AdapterError, match=message):
            combine([(plain, 1.0), (other, 1.0)], CombineSettings(method))
    for weight in (0.0, float("nan"), float("inf")):
        with pytest.raises(ExportError, match="the weight of a"):
            combine([(plain, weight)], CombineSettings(method))
    large = adapter(PlainModule(Q.format(0), torch.full((1, 20), 1e20), torch.full((24, 1), 1e20), 1.0))
    with pytest.raises(AdapterError, match="beyond what fp32 holds"):
        combine([(large, 1e30)], CombineSettings(method))


@pytest.mark.parametrize("method", [method for method in METHODS if not method.startswith("dare")])
def test_modules_in_which_nothing_is_left_are_left_out(method):
    one = adapter(module(Q.format(0), 4, 1.0, 1), module(UP.format(0), 4, 1.0, 2))
    other = adapter(module(Q.format(0), 4, 1.0, 1), module(UP.format(0), 4, 1.0, 3))
    found = combine([(one, 1.0), (other, -1.0)], CombineSettings(method))
    assert [combined.module.module for combined in found] == [UP.format(0)]
    with pytest.raises(AdapterError, match="nothing is left"):
        combine([(one, 1.0), (one, -1.0)], CombineSettings(method))


def test_untrained_adapters_are_nothing_to_combine():
    zero = PlainModule(Q.format(0), torch.ones(2, 20), torch.zeros(24, 2), 1.0)
    for method in METHODS:
        with pytest.raises(AdapterError, match="nothing is left"):
            combine([(adapter(zero), 1.0)], CombineSettings(method))


def test_progress_counts_modules():
    seen = []
    source = adapter(module(Q.format(0), 2), module(UP.format(0), 2))
    combine([(source, 1.0)], CombineSettings("cat"), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
