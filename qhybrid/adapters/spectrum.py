"""The singular values of s·B·A, and the best approximations of lower rank, without ever forming the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qhybrid.adapters.plain import PlainModule


@dataclass(frozen=True)
class Factored:
    """s·B·A = U·diag(σ)·V, σ descending; all in fp64."""

    u: Tensor  # (out, r)
    sigma: Tensor  # (r,)
    v: Tensor  # (r, in)

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(self.sigma.norm())

    def energy_rank(self, energy: float) -> int:
        """The fewest singular values whose squares sum to that share of all; 0 for a product of zeros."""
        squares = self.sigma.square()
        if squares.sum() == 0:
            return 0
        shares = squares.cumsum(0) / squares.sum()
        return min(int((shares < energy * (1 - 1e-12)).sum()) + 1, len(squares))

    @property
    def stable_rank(self) -> float:
        """||·||_F² / ||·||₂²: at most the rank, and not moved by small singular values."""
        return float(self.sigma.square().sum() / self.sigma[0].square()) if self.norm > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007)."""
        if self.norm == 0:
            return 0.0
        shares = self.sigma / self.sigma.sum()
        return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))

    def error(self, rank: int) -> float:
        """||M − M_rank||_F / ||M||_F of the best approximation of that rank (Eckart and Young)."""
        return float(self.sigma[rank:].norm()) / self.norm if self.norm > 0 else 0.0

    def truncated(self, rank: int, name: str) -> PlainModule:
        """The best approximation of that rank for the module `name`: scaling 1, fp32, shared evenly by A and B."""
        share = self.sigma[:rank].sqrt()
        return PlainModule(name, (share[:, None] * self.v[:rank]).float(), (self.u[:, :rank] * share).float(), 1.0)


def factor(b: Tensor, a: Tensor, scaling: float) -> Factored:
    """The singular value decomposition of s·B·A from QR of B and Aᵀ and an r×r one.

    Args:
        b: (out, r). a: (r, in).
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, sigma, v = torch.linalg.svd(scaling * (r_b @ r_a.T))
    k = len(sigma)
    return Factored(q_b @ u[:, :k], sigma, v[:k] @ q_a.T)
