"""The singular values of s·B·A, and the best approximations of lower rank, without ever forming the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qhybrid.adapters.plain import PlainModule

_ROUNDING = 1e-12  # of the energies' running sum, so that an energy of 1 does not ask for rounding noise


@dataclass(frozen=True)
class Factored:
    """s·B·A = U·diag(σ)·V, σ descending; all in fp64."""

    u: Tensor  # (out, k)
    sigma: Tensor  # (k,)
    v: Tensor  # (k, in)

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
    return Factored(q_b @ u, sigma, v @ q_a.T)


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
