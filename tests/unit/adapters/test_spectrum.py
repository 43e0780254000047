"""Spectra of s·B·A against numpy's SVD of the product in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.adapters.plain import PlainModule
from qhybrid.adapters.spectrum import difference, energy_rank, factor, factor_module

NAME = "model.layers.0.mlp.up_proj"
sides = st.integers(1, 24)


def random_module(out, rank, inner, scaling, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inner, generator=generator)
    return PlainModule(NAME, a, torch.randn(out, rank, generator=generator), scaling)


def product(module):
    return module.scaling * module.b.double().numpy() @ module.a.double().numpy()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sides, st.integers(1, 30), sides, st.sampled_from([2.0, 0.37, -1.5]), st.integers(0, 2**31))
def test_singular_values_and_factors_are_those_of_the_product(out, rank, inner, scaling, seed):
    module = random_module(out, rank, inner, scaling, seed)
    found, dense = factor_module(module), product(module)
    expected = np.linalg.svd(dense, compute_uv=False)
    k = len(found.sigma)
    assert k == min(out, rank, inner)
    scale = max(expected[0], 1e-30)
    assert np.abs(found.sigma.numpy() - expected[:k]).max() <= 1e-12 * scale  # fp64, some rounding of two QRs
    assert expected[k:].max(initial=0) <= 1e-12 * scale  # what is not among them is zero
    rebuilt = found.u.numpy() * found.sigma.numpy() @ found.v.numpy()
    assert np.abs(rebuilt - dense).max() <= 1e-12 * scale
    assert found.norm == pytest.approx(np.linalg.norm(dense), rel=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 24), st.integers(1, 8), st.integers(2, 24), st.integers(0, 2**31))
def test_no_matrix_of_that_rank_is_nearer_and_the_error_is_the_true_one(out, rank, inner, seed):
    module = random_module(out, rank, inner, 1.3, seed)
    found, dense = factor_module(module), product(module)
    u, sigma, v = np.linalg.svd(dense, full_matrices=False)
    for k in range(1, len(found.sigma) + 1):
        cut = found.truncated(k, NAME)
        assert cut.rank == k and cut.scaling == 1.0 and cut.a.dtype == torch.float32
        best = np.linalg.norm(dense - u[:, :k] * sigma[:k] @ v[:k]) / np.linalg.norm(dense)
        assert found.error(k) == pytest.approx(best, abs=1e-12)
        # The factors are fp32: each is right to 6e-8 of itself.
        assert np.linalg.norm(dense - product(cut)) / np.linalg.norm(dense) == pytest.approx(best, abs=5e-7)


def test_the_two_factors_share_the_singular_values_evenly():
    cut = factor_module(random_module(20, 5, 30, 2.0, 0)).truncated(3, NAME)
    assert torch.allclose(cut.a.norm(dim=1), cut.b.norm(dim=0), rtol=1e-5)


def test_energy_ranks_by_hand():
    squares = torch.tensor([8.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert [energy_rank(squares, share) for share in (0.1, 0.8, 0.81, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert energy_rank(torch.zeros(4), 0.99) == 0


def test_an_energy_of_one_keeps_all_but_rounding_noise():
    module = random_module(30, 4, 40, 1.0, 3)
    twice = PlainModule(NAME, torch.cat([module.a, module.a]), torch.cat([module.b, module.b], dim=1), 1.0)
    assert twice.rank == 8 and factor_module(twice).energy_rank(1.0) == 4


def test_stable_and_effective_rank_by_hand():
    def of(*sigma):
        a = torch.diag(torch.tensor(sigma, dtype=torch.float32))
        return factor(torch.eye(len(sigma)), a, 1.0)

    assert of(2.0, 2.0, 2.0).stable_rank == pytest.approx(3)
    assert of(2.0, 2.0, 2.0).effective_rank == pytest.approx(3)
    assert of(2.0, 1.0).stable_rank == pytest.approx(5 / 4)
    assert of(3.0, 1.0).effective_rank == pytest.approx(4 / 3 ** (3 / 4))  # exp(-(3/4)ln(3/4) - (1/4)ln(1/4))
    assert of(5.0, 0.0, 0.0).effective_rank == pytest.approx(1)
    assert (of(0.0, 0.0).stable_rank, of(0.0, 0.0).effective_rank, of(0.0, 0.0).error(1)) == (0, 0, 0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 6), st.integers(1, 20), st.integers(0, 2**31))
def test_the_difference_of_two_modules_of_any_ranks(out, one_rank, other_rank, inner, seed):
    one = random_module(out, one_rank, inner, 0.7, seed)
    other = random_module(out, other_rank, inner, -1.2, seed + 1)
    expected = np.linalg.norm(product(one) - product(other))
    assert difference(one, other) == pytest.approx(expected, rel=1e-10)
    assert difference(one, one) <= 1e-12 * np.linalg.norm(product(one))
