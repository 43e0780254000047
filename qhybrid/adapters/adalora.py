"""AdaLoRA on a (quantised) linear layer: W + s·P·Λ·Q, and the regulariser that keeps P and Q orthogonal.

Zhang et al., arXiv 2303.10512, eq. 3 to 5. P (out, r) is peft's lora_B, Q (r, in) its lora_A, and Λ (r,) a vector
beside them. s is constant (alpha over the initial rank), so that pruning a triplet leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from qhybrid.adapters.access import DIRECT, Access

INITIAL_STD = 0.02  # of P and Q, as in the authors' code
_SMALLEST_NORM = 1e-12  # the regulariser's gradient is 0 where P and Q are orthonormal already


def add_lambda(module: LoraLayer, adapter: str, rank: int) -> None:
    """Give a LoRA layer the vector Λ (rank,) in fp32, zero, and peft the knowledge that it is trained."""
    device = module.lora_A[adapter].weight.device
    if not hasattr(module, "lora_lambda"):
        module.lora_lambda = nn.ParameterDict()
        module.adapter_layer_names = (*module.adapter_layer_names, "lora_lambda")
    module.lora_lambda[adapter] = nn.Parameter(torch.zeros(rank, dtype=torch.float32, device=device))


class AdaLoraVariant(LoraVariant):
    """Plugs P·Λ·Q into a peft LoRA layer. `init` is not used: `adapters.attach` adds Λ."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        """The layer's output (..., out), given its input x (..., in) and the base layer's output."""
        scaled = module.lora_lambda[active_adapter] * module.scaling[active_adapter]
        hidden = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        return result + module.lora_B[active_adapter](hidden * scaled.to(hidden.dtype))

    @staticmethod
    def _delta(module: LoraLayer, adapter: str) -> Tensor:
        q, p = module.lora_A[adapter].weight.float(), module.lora_B[adapter].weight.float()
        return module.scaling[adapter] * (p * module.lora_lambda[adapter]) @ q

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W + s·P·Λ·Q (out, in) in the dtype of `orig_weight`."""
        merged = orig_weight.float() + AdaLoraVariant._delta(module, active_adapter)
        return merged.detach().to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """As `merge_safe`, in place."""
        orig_weight.data.copy_(AdaLoraVariant.merge_safe(module, active_adapter, orig_weight.data))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W again, from the merged weight."""
        weight = orig_weight.float() - AdaLoraVariant._delta(module, active_adapter)
        return weight.detach().to(orig_weight.dtype)


@torch.no_grad()
def add_regularizer(
    pairs: Sequence[tuple[nn.Parameter, nn.Parameter]],
    weight: float,
    scale: float = 1.0,
    access: Access = DIRECT,
) -> Tensor:
    """Add the gradient of weight·R to the gradients of P and Q, and return weight·R.

    R is the mean of ||PᵀP − I|| and ||QQᵀ − I|| (Frobenius) over all P and Q, in fp32, as the authors' code and
    peft compute it, so the published weights and peft's orth_reg_weight mean the same here. The paper's eq. 4 has
    squares and a sum; with those and the same weight, R alone is above the usual clipping norm on a 7B model, and
    clipping would then scale down the other bands' gradients with it.

    It is added to complete gradients instead of to the loss, so that it counts once for each optimizer step
    whatever the accumulation, and the caller chooses whether importance scores see it.

    Args:
        pairs: P (out, r) and Q (r, in) of each module, at least one, with gradients.
        weight: gamma.
        scale: what the gradients are multiplied with (a loss scaler's factor).
        access: how values and gradients are reached.
    """
    total = torch.zeros((), device=pairs[0][0].device)
    step = weight * scale / len(pairs)  # d||PᵀP − I|| = 2P(PᵀP − I)/||PᵀP − I||, and there are two of them a pair
    for p, q in pairs:
        wide_p, wide_q = access.values(p).float(), access.values(q).float()
        identity = torch.eye(wide_q.shape[0], device=wide_q.device)
        of_p, of_q = wide_p.T @ wide_p - identity, wide_q @ wide_q.T - identity
        norm_p, norm_q = of_p.norm(), of_q.norm()
        total += norm_p + norm_q
        access.add_to_gradient(p, step * (wide_p @ of_p / norm_p.clamp_min(_SMALLEST_NORM)))
        access.add_to_gradient(q, step * (of_q @ wide_q / norm_q.clamp_min(_SMALLEST_NORM)))
    return weight * total / (2 * len(pairs))


def lora_factors(q: Tensor, p: Tensor, lam: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The live triplets as plain LoRA factors with scaling 1: B·A = s·P·Λ·Q exactly.

    Each λ' = s·λ is shared evenly: A = sqrt|λ'|·Q, B = sign(λ')·sqrt|λ'|·P.

    Args:
        q: (r, in). p: (out, r). lam: (r,). scaling: s.

    Returns:
        A (live, in) and B (out, live) in fp32; live may be 0.
    """
    live = lam != 0
    share = (lam[live].double() * scaling).abs().sqrt()
    a = share[:, None] * q[live].double()
    b = p[:, live].double() * (share * lam[live].double().sign())
    return a.float(), b.float()
