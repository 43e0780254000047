"""The best approximation of low rank of a matrix that is there in full, as B·A, with the error that it really has.

Two ways. Where the rank is far below the matrix's sides: a basis from subspace iteration on a random start (Halko,
Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4), whose error is within a few thousandths of the least there
is. Else the eigenvectors of M·Mᵀ in fp64, which are exact for an fp32 matrix and cost a minute on a large one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qhybrid.adapters.spectrum import energy_rank

_LEAST_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_WORTH_IT = 4  # subspace iteration saves time where its basis is this many times smaller than the matrix
_FIRST_TRY = 16  # for an energy, a basis so many times smaller than the matrix is tried first
_NOISE = 1e-7  # of the largest singular value: what rounding to fp32 leaves where there should be none

Triple = tuple[Tensor, Tensor, Tensor]  # U (out, k), σ (k,) descending, V (k, in), in fp64


@dataclass(frozen=True)
class Approximation:
    """M ≈ B·A with √σ in both, fp32; ||M||_F; and ||M − B·A||_F / ||M||_F, 0 for a matrix of zeros."""

    b: Tensor  # (out, k)
    a: Tensor  # (k, in)
    norm: float
    error: float


def approximate(matrix: Tensor, *, rank: int | None = None, energy: float | None = None) -> Approximation:
    """Approximate `matrix` (out, in), fp32, which is used up: its memory holds what is left over.

    Args:
        rank: so many singular values, or all that there are.
        energy: or the fewest found whose squares sum to that share of ||M||².
    """
    assert (rank is None) != (energy is None)
    norm = frobenius(matrix)
    if norm == 0:
        return Approximation(matrix[:, :1].clone(), torch.zeros_like(matrix[:1]), 0.0, 0.0)
    u, sigma, v = leading_triple(matrix, rank) if rank is not None else _of_energy(matrix, energy, norm)
    share = sigma.sqrt()
    b, a = (u * share).float(), (share[:, None] * v).float()
    matrix.addmm_(b, a, alpha=-1)
    return Approximation(b, a, norm, frobenius(matrix) / norm)


def frobenius(matrix: Tensor) -> float:
    """||M||_F, summed in fp64 over the rows, without a copy of the matrix in fp64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().norm())


def leading_triple(matrix: Tensor, rank: int) -> Triple:
    """The `rank` largest singular values of `matrix` (out, in), fp32, with their vectors; fewer if others are 0.

    Equal matrices give equal triples on one machine, whatever ran before. Scratch memory is that of the basis
    (out, 2·rank); of a small matrix the eigenvectors' in fp64.
    """
    size = rank + max(rank, _LEAST_OVERSAMPLING)
    if size * _WORTH_IT > min(matrix.shape):
        return _eigen(matrix, rank=rank)
    return _leading(_subspace(matrix, size), rank)


def _of_energy(matrix: Tensor, energy: float, norm: float) -> Triple:
    size = min(matrix.shape) // _FIRST_TRY
    if size >= _LEAST_OVERSAMPLING:
        found = _subspace(matrix, size)
        rank = int((found[1].square().cumsum(0) < energy * norm**2).sum()) + 1
        if 2 * rank <= size:  # as many again are in the basis, so these are accurate
            return _leading(found, rank)
    return _eigen(matrix, energy=energy)


def _leading(found: Triple, rank: int) -> Triple:
    u, sigma, v = found
    kept = min(rank, int((sigma > _NOISE * sigma[0]).sum()))
    return u[:, :kept], sigma[:kept], v[:kept]


def _subspace(matrix: Tensor, size: int) -> Triple:
    generator = torch.Generator().manual_seed(0)  # of its own: equal input gives equal output, whatever ran before
    start = torch.randn(matrix.shape[1], size, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, sigma, v = torch.linalg.svd((basis.T @ matrix).double(), full_matrices=False)
    return basis.double() @ u, sigma, v


def _eigen(matrix: Tensor, *, rank: int | None = None, energy: float | None = None) -> Triple:
    if matrix.shape[0] > matrix.shape[1]:
        v, sigma, u = _eigen(matrix.T, rank=rank, energy=energy)
        return u.T, sigma, v.T
    wide = matrix.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    kept = energy_rank(squares, energy) if rank is None else rank
    kept = min(kept, int((squares > _NOISE**2 * squares[0]).sum()))
    u, sigma = vectors[:, :kept], squares[:kept].sqrt()
    return u, sigma, (u.T @ wide) / sigma[:, None]
