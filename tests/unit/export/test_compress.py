"""Shortening: what is kept, the true error, what never grows, and the dtype that it is stored in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.errors import AdapterError, ExportError
from qhybrid.export.derive.shorten import ShortenSettings, shorten

OUT, INNER = 30, 24


def name(layer):
    return f"model.layers.{layer}.mlp.up_proj"


def module(layer, rank, *, scaling=1.0, decay=1.0, dtype=torch.float32, magnitude=False):
    """Terms whose norms fall by `decay` from one to the next."""
    generator = torch.Generator().manual_seed(layer)
    a = torch.randn(rank, INNER, generator=generator) * decay ** torch.arange(rank)[:, None]
    b = torch.randn(OUT, rank, generator=generator)
    return PlainModule(name(layer), a.to(dtype), b.to(dtype), scaling, torch.rand(OUT) if magnitude else None)


def adapter(*modules, dtype="float32", base_minus=None):
    info = AdapterInfo(
        base_model="base", base_revision=None, quantization="nf4", double_quant=True, dtype="bfloat16",
        adapter_dtype=dtype, attn_implementation="sdpa",
    )  # fmt: skip
    return PlainAdapter(tuple(modules), info, Path("a"), base_minus)


def delta(plain):
    return (
        np.zeros((OUT, INNER))
        if plain is None
        else plain.scaling * plain.b.double().numpy() @ plain.a.double().numpy()
    )


def true_error(before, after):
    return np.linalg.norm(delta(before) - delta(after)) / np.linalg.norm(delta(before))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.sampled_from([0.5, 0.9, 0.99]), st.booleans())
def test_energy_keeps_its_share_with_the_fewest_terms_and_says_the_true_error(ranks, energy, dora):
    modules = [module(i, rank, scaling=0.5 + i, decay=0.6, magnitude=dora) for i, rank in enumerate(ranks)]
    found = shorten(adapter(*modules), ShortenSettings(energy=energy))
    lost = whole = 0.0
    for report, before in zip(found.modules, modules, strict=True):
        sigma = np.linalg.svd(delta(before), compute_uv=False)
        kept = (sigma**2).cumsum() / (sigma**2).sum()
        assert report.after.rank == min(int((kept < energy).sum()) + 1, before.rank)
        assert report.error == pytest.approx(true_error(before, report.after), abs=1e-7)
        assert report.error <= np.sqrt(1 - energy) + 1e-6
        assert report.norm == pytest.approx(np.linalg.norm(delta(before)), rel=1e-12)
        assert (report.after.magnitude is before.magnitude) if dora else report.after.magnitude is None
        lost += (report.error * report.norm) ** 2
        whole += report.norm**2
    assert found.error == pytest.approx(np.sqrt(lost / whole))
    assert found.kept == tuple(report.after for report in found.modules)


def test_a_rank_is_a_bound_and_never_grows():
    modules = [module(0, 2), module(1, 6), module(2, 4, dtype=torch.bfloat16)]
    found = shorten(adapter(*modules), ShortenSettings(rank=4))
    assert [report.after.rank for report in found.modules] == [2, 4, 4]
    assert found.modules[0].after is modules[0] and found.modules[2].error == 0
    sigma = np.linalg.svd(delta(modules[1]), compute_uv=False)
    best = np.linalg.norm(sigma[4:]) / np.linalg.norm(sigma)
    assert found.modules[1].error == pytest.approx(best, rel=1e-5)


def test_terms_are_dropped_in_one_order_over_the_whole_adapter():
    modules = [module(0, 4, scaling=100.0), module(1, 4, decay=0.1), module(2, 2, scaling=0.001)]
    norms = [abs(m.scaling) * m.b.double().norm(dim=0) * m.a.double().norm(dim=1) for m in modules]
    found = shorten(adapter(*modules), ShortenSettings(prune_terms=0.5))
    smallest = set(torch.cat(norms).argsort()[:5].tolist())
    assert smallest >= {8, 9}  # both of the module with the small scaling
    for index, (report, before) in enumerate(zip(found.modules, modules, strict=True)):
        kept = [j for j in range(before.rank) if 4 * index + j not in smallest]
        if kept:
            assert torch.equal(report.after.a, before.a[kept]) and torch.equal(report.after.b, before.b[:, kept])
            assert report.after.scaling == before.scaling
            assert report.error == pytest.approx(true_error(before, report.after), abs=1e-12)
        else:
            assert report.after is None and report.error == 1
    assert [report.after and report.after.rank for report in found.modules] == [4, 1, None]


def test_pruning_does_not_depend_on_how_a_factor_is_split():
    one = module(0, 6)
    shares = torch.tensor([1e-4, 10.0, 1.0, 1e3, 1e-2, 1.0])
    other = PlainModule(one.module, one.a * shares[:, None], one.b / shares, one.scaling)
    first, second = (shorten(adapter(m), ShortenSettings(prune_terms=0.5)).kept[0] for m in (one, other))
    assert first.rank == second.rank == 3
    assert np.abs(delta(first) - delta(second)).max() <= 1e-5  # fp32 products in another split


@pytest.mark.parametrize("how", [{"energy": 0.99}, {"rank": 2}, {"prune_terms": 0.5}])
def test_zero_lora_is_left_out_and_zero_dora_keeps_its_magnitudes(how):
    def zero(layer, magnitude=None):
        return PlainModule(name(layer), torch.ones(3, INNER), torch.zeros(OUT, 3), 1.0, magnitude)

    found = shorten(adapter(module(0, 6), zero(1), zero(2, torch.rand(OUT))), ShortenSettings(**how))
    assert [report.after is None for report in found.modules] == [False, True, False]
    dora = found.modules[2].after
    assert dora.rank == 1 and not delta(dora).any() and dora.magnitude is found.modules[2].before.magnitude
    assert found.modules[1].error == found.modules[2].error == 0
    with pytest.raises(AdapterError, match="nothing would be left"):
        shorten(adapter(zero(1)), ShortenSettings(**how))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_halves(dtype):
    source = adapter(
        module(0, 8, decay=0.7, dtype=dtype), dtype="bfloat16" if dtype == torch.bfloat16 else "float32"
    )
    found = shorten(source, ShortenSettings(energy=0.99))
    (report,) = found.modules
    assert report.after.a.dtype == report.after.b.dtype == dtype
    assert report.error == pytest.approx(true_error(report.before, report.after), abs=1e-12)


def test_a_cut_that_loses_nothing_says_what_rounding_to_its_own_dtype_costs():
    once = module(0, 3, dtype=torch.bfloat16)
    twice = PlainModule(once.module, torch.cat([once.a, once.a]), torch.cat([once.b, once.b], dim=1), 1.0)
    found = shorten(adapter(twice, dtype="bfloat16"), ShortenSettings(energy=1.0))
    assert found.kept[0].rank == 3 and found.kept[0].a.dtype == found.kept[0].b.dtype == torch.bfloat16
    # A and B are each within 2^-9 of themselves, value by value.
    assert 0 < found.error <= 2**-8
    assert found.error == pytest.approx(true_error(twice, found.kept[0]), rel=1e-9)


def test_factors_of_two_dtypes_each_keep_their_own():
    wide = module(0, 6)
    mixed = PlainModule(wide.module, wide.a, wide.b.bfloat16(), 1.0)
    (kept,) = shorten(adapter(mixed), ShortenSettings(rank=3)).kept
    assert (kept.a.dtype, kept.b.dtype) == (torch.float32, torch.bfloat16)


def test_values_beyond_a_dtype_are_refused():
    a, b = torch.eye(2, INNER) * 6e4, torch.eye(OUT, 2) * 6e4
    half = PlainModule(name(0), a.half(), b.half(), 1e3)  # the square root of its σ is 1.9e6
    with pytest.raises(AdapterError, match="beyond what float16 holds"):
        shorten(adapter(half), ShortenSettings(rank=1))


def test_adalora_in_plain_form_is_stored_as_it_was_trained():
    folded = module(0, 6, decay=0.7)  # fp32, from an adapter of bf16
    found = shorten(adapter(folded, dtype="bfloat16"), ShortenSettings(rank=3))
    assert found.kept[0].a.dtype == found.kept[0].b.dtype == torch.bfloat16


def test_the_bytes_are_those_of_what_is_left():
    found = shorten(adapter(module(0, 6), module(1, 6, magnitude=True)), ShortenSettings(rank=2))
    assert found.num_bytes == 4 * (2 * 2 * (OUT + INNER) + OUT)


def test_settings_and_adapters_that_make_no_sense_are_refused():
    for how, message in (
        ({}, "give one of"),
        ({"rank": 2, "energy": 0.9}, "give one of"),
        ({"rank": 0}, "a rank of 0"),
        ({"energy": 0.0}, "above 0 and at most 1"),
        ({"energy": float("nan")}, "above 0 and at most 1"),
        ({"prune_terms": 1.0}, "between 0 and 1"),
    ):
        with pytest.raises(ExportError, match=message):
            ShortenSettings(**how)
    with pytest.raises(AdapterError, match="PiSSA"):
        shorten(adapter(module(0, 2), base_minus="pissa"), ShortenSettings(rank=1))
