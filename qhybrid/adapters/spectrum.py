"""The singular values of s·B·A, and the best approximations of lower rank, without ever forming the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qhybrid.adapters.plain import PlainModule

_ROUNDING = 1e-12  # of the energies' running sum, so that an energy of 1 does not ask for rounding noise


@dataclass(frozen=True)
class Spectrum:
    """The singular values of s·B·A, and what they say of its rank."""

    sigma: Tensor  # (k,) in fp64, descending

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(self.sigma.norm())

    def energy_rank(self, energy: float) -> int:
        """The fewest singular values whose squares sum to that share of all; 0 for a product of zeros."""
        return energy_rank(self.sigma.square(), energy)

    @property
    def stable_rank(self) -> float:
        """||·||_F² / ||·||₂²: at most the rank, and not moved by small singular values."""
        return float((self.sigma / self.sigma[0]).square().sum()) if self.norm > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values' shares of their sum (Roy and Vetterli, EUSIPCO 2007)."""
        if self.norm == 0:
            return 0.0
        shares = self.sigma / self.sigma.sum()
        return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))

    def error(self, rank: int) -> float:
        """||M − M_rank||_F / ||M||_F of the best approximation of that rank (Eckart and Young, 1936)."""
        return float(self.sigma[rank:].norm()) / self.norm if self.norm > 0 else 0.0

    def figures(self) -> dict[str, float]:
        """What is told of a module."""
        return {
            "norm": self.norm,
            "largest": float(self.sigma[0]),
            "energy_rank_90": self.energy_rank(0.9),
            "energy_rank_99": self.energy_rank(0.99),
            "stable_rank": self.stable_rank,
            "effective_rank": self.effective_rank,
        }


@dataclass(frozen=True)
class Factored(Spectrum):
    """s·B·A = U·diag(σ)·V; all in fp64."""

    u: Tensor  # (out, k)
    v: Tensor  # (k, in)

    def truncated(self, rank: int, name: str) -> PlainModule:
        """The best approximation of that rank for the module `name`: scaling 1, fp32, √σ in A and in B alike."""
        share = self.sigma[:rank].sqrt()
        return PlainModule(name, (share[:, None] * self.v[:rank]).float(), (self.u[:, :rank] * share).float(), 1.0)


def factor(b: Tensor, a: Tensor, scaling: float) -> Factored:
    """The singular value decomposition of s·B·A from QR of B and of Aᵀ and that of an r×r matrix.

    Args:
        b: (out, r). a: (r, in). r may exceed both.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, sigma, v = torch.linalg.svd(scaling * (r_b @ r_a.T), full_matrices=False)
    return Factored(sigma, q_b @ u, v @ q_a.T)


def gram(rows: Tensor) -> Tensor:
    """All inner products of the rows (r, n): (r, r) in fp64, where their squares lose nothing that counts."""
    wide = rows.double()
    return wide @ wide.T


def singular_values(gram_b: Tensor, gram_a: Tensor) -> Tensor:
    """Those of B·A from BᵀB and AAᵀ, as the roots of the eigenvalues of BᵀB·AAᵀ. Cheap, also on a GPU.

    Squares halve the digits: each value is right to some 1e-8 of the largest one, where `factor` has 1e-15.

    Args:
        gram_b: (..., r, r) in fp64. gram_a: as large.

    Returns:
        (..., r), descending.
    """
    squares, vectors = torch.linalg.eigh(gram_b)
    root = vectors * squares.clamp_min(0).sqrt()[..., None, :]  # root·rootᵀ = BᵀB
    return torch.linalg.eigvalsh(root.mT @ gram_a @ root).clamp_min(0).sqrt().flip(-1)


def factor_module(module: PlainModule) -> Factored:
    """As `factor`; of DoRA what is inside the norm."""
    return factor(module.b, module.a, module.scaling)


def difference(one: PlainModule, other: PlainModule) -> float:
    """||s₁·B₁·A₁ − s₂·B₂·A₂||_F of two modules of one shape and any ranks."""
    b = torch.cat([one.scaling * one.b.double(), -other.scaling * other.b.double()], dim=1)
    return factor(b, torch.cat([one.a.double(), other.a.double()]), 1.0).norm


def energy_rank(squares: Tensor, energy: float) -> int:
    """The fewest of some squared singular values (k,), descending, that sum to that share of all."""
    total = squares.sum()
    if total == 0:
        return 0
    missing = squares.cumsum(0) / total < energy * (1 - _ROUNDING)
    return min(int(missing.sum()) + 1, len(squares))
