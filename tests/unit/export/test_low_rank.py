"""Approximations of low rank of matrices that are there in full, against the full decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_combine import relative

from qhybrid.adapters.low_rank import approximate
from qhybrid.export.derive.combine import (
    disjoint_mean,
    trim_values,
)


@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_subspace_iteration_is_nearly_the_best(shape):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape[0], 8, generator=generator) @ torch.randn(8, shape[1], generator=generator)]
    parts += [torch.randn(shape[0], 8, generator=generator) @ torch.randn(8, shape[1], generator=generator)]
    for part in parts:
        trim_values(part, 0.3)
    matrix = disjoint_mean(parts)
    sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    for rank in (1, 8, 30):  # their bases are at most a quarter of the smaller side
        found = approximate(matrix.clone(), rank=rank)
        best = np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma)
        assert found.b.shape == (shape[0], rank) and found.a.shape == (rank, shape[1])
        # Beyond the common part the spectrum is flat, where four rounds leave a few thousandths.
        assert best <= found.error * (1 + 1e-6) and found.error <= 1.003 * best
        assert relative((found.b @ found.a).numpy(), matrix.numpy()) == pytest.approx(found.error, rel=1e-4)
    kept = (sigma**2).cumsum() / (sigma**2).sum()
    for energy in (0.2, 0.5, 0.9):  # the first is found by subspace iteration, the last by eigenvectors
        found = approximate(matrix.clone(), energy=energy)
        rank = int((kept < energy).sum()) + 1
        assert found.a.shape[0] == rank
        assert found.error == pytest.approx(np.sqrt(1 - kept[rank - 1]), rel=1e-4)


def test_ranks_beyond_what_is_there_are_not_filled_with_noise():
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(300, 3, generator=generator) @ torch.randn(3, 400, generator=generator)
    for cut in ({"rank": 20}, {"rank": 90}, {"energy": 1.0}):
        found = approximate(matrix.clone(), **cut)
        assert found.a.shape[0] == 3 and found.error <= 1e-6
    nothing = approximate(torch.zeros(5, 6), rank=2)
    assert (nothing.norm, nothing.error) == (0, 0)
    assert not nothing.b.any() and not nothing.a.any()
