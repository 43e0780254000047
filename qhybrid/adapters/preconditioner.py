"""Riemannian preconditioning: the clipped gradient of each factor times the inverse of its block of a metric.

Zhang and Pilanci, arXiv 2402.02347: g_A <- (BᵀB + δI)⁻¹ g_A and g_B <- g_B (AAᵀ + δI)⁻¹, before the optimizer sees
them. The metric says how far the product X moves when one factor w does: M_w = JᵀJ with J = ∂X/∂w. Here X is what
the module adds to W, so s belongs to it, and the size of a step does not hang on alpha:

    s·B·A     (LoRA, rsLoRA; DoRA inside its norm):  M_A = s²·BᵀB        M_B = s²·AAᵀ
    s·P·Λ·Q   (AdaLoRA):                             M_Q = s²·Λ·PᵀP·Λ    M_P = s²·Λ·QQᵀ·Λ    M_Λ = s²·PᵀP ⊙ QQᵀ

Without δ and with plain SGD the change of X is then the same for all factors of one X.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import Tensor, nn

from qhybrid.adapters.access import DIRECT, Access
from qhybrid.adapters.attach import ADAPTER, adapted_modules
from qhybrid.adapters.spectrum import gram
from qhybrid.architecture.layout import Layout


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, gradient_scale: float = 1.0, access: Access = DIRECT
) -> float:
    """Scale all gradients down to `max_norm` together, as torch's clip_grad_norm_; 0 leaves them as they are.

    Clipping comes before preconditioning, as with peft's optimizer. After it, while B is small, the norm would be
    that of the A's, and clipping would take their steps from all others.

    Args:
        gradient_scale: what the gradients are multiplied with (a loss scaler's factor).
        access: how gradients are reached.

    Returns:
        The norm before, without the scale. Gradients that are not finite are left for others to find.
    """
    found = [(parameter, access.gradient(parameter)) for parameter in parameters]
    gradients = [(parameter, gradient) for parameter, gradient in found if gradient is not None]
    norm = torch.stack([gradient.float().norm() for _, gradient in gradients]).norm().item() / gradient_scale
    if max_norm and max_norm < norm < math.inf:
        for parameter, gradient in gradients:
            access.set_gradient(parameter, gradient * (max_norm / norm))
    return norm


@torch.no_grad()
def precondition(model: PeftModel, layout: Layout, delta: float, access: Access = DIRECT) -> None:
    """Precondition the complete gradients of one optimizer step, in place: of A, B, P, Q and Λ.

    It is linear in the gradients, so a loss scaler's factor stays in them. Magnitudes keep theirs.

    Args:
        delta: δ. With 0 every factor must have full rank.
        access: how values and gradients are reached.
    """
    for _, module in adapted_modules(model, layout):
        a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        square = module.scaling[ADAPTER] ** 2
        gram_a, gram_b = gram(access.values(a)), gram(access.values(b).T)
        if hasattr(module, "lora_lambda"):
            lam = module.lora_lambda[ADAPTER]
            _multiply(lam, square * gram_a * gram_b, delta, access)
            values = access.values(lam).double()
            square = square * torch.outer(values, values)
        _multiply(a, square * gram_b, delta, access)
        _multiply(b, square * gram_a, delta, access, from_right=True)


def _multiply(
    factor: nn.Parameter, metric: Tensor, delta: float, access: Access, from_right: bool = False
) -> None:
    """Multiply the factor's gradient by (M + δI)⁻¹: (r, r), inverted in fp64 and applied in fp32 at least."""
    gradient = access.gradient(factor)
    if gradient is None:
        return
    damped = metric + delta * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L).to(wide.dtype)
    access.set_gradient(factor, wide @ inverse if from_right else inverse @ wide)
