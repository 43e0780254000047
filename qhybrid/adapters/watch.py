"""What can be told of adapters while they train: the spectrum of each module's change, and its importance.

Both are cheap enough for that: no matrix of the size of W is formed, and only r×r ones are decomposed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from qhybrid.adapters.access import DIRECT, Access
from qhybrid.adapters.attach import ADAPTER, adapted_modules
from qhybrid.adapters.importance import sensitivity
from qhybrid.adapters.spectrum import Spectrum, gram, singular_values
from qhybrid.architecture.layout import Layout


@dataclass(frozen=True)
class _Grams:
    """Of one module: s·B (AdaLoRA: s·P·Λ) and A; both (r, r)."""

    module: str
    b: Tensor
    a: Tensor


@torch.no_grad()
def spectra(model: PeftModel, layout: Layout, access: Access = DIRECT) -> dict[str, Spectrum]:
    """The singular values of s·B·A of every module; for DoRA inside the norm, for AdaLoRA those of s·P·Λ·Q.

    Each is right to some 1e-8 of its module's largest one (`singular_values`).

    Args:
        access: how values are reached.

    Returns:
        By module in the layout's order, on the CPU; as many values as the rank of the matrices.
    """
    by_rank: dict[int, list[_Grams]] = defaultdict(list)
    for row, module in adapted_modules(model, layout):
        a, b = (access.values(part[ADAPTER].weight) for part in (module.lora_A, module.lora_B))
        gram_b = module.scaling[ADAPTER] ** 2 * gram(b.T)
        if row.kind == "adalora":
            lam = access.values(module.lora_lambda[ADAPTER]).double()
            gram_b = gram_b * torch.outer(lam, lam)
        by_rank[len(gram_b)].append(_Grams(row.module, gram_b, gram(a)))
    found = {}
    for grams in by_rank.values():
        sigma = singular_values(torch.stack([one.b for one in grams]), torch.stack([one.a for one in grams])).cpu()
        found |= {one.module: Spectrum(values) for one, values in zip(grams, sigma, strict=True)}
    return {row.module: found[row.module] for row in layout}


@torch.no_grad()
def importance(
    model: PeftModel, layout: Layout, gradient_scale: float = 1.0, access: Access = DIRECT
) -> dict[str, float]:
    """The mean of |w · ∂L/∂w| over the values of A and B (P and Q) of every module.

    That is AdaLoRA's sensitivity (arXiv 2303.10512, eq. 8), for whole modules of every kind: to first order, by
    how much the loss would change if a value were zero. Modules without a gradient, as frozen ones, are left out.

    Args:
        gradient_scale: what the gradients were multiplied with (a loss scaler's factor).
        access: how values and gradients are reached.
    """
    found = {
        row.module: sensitivity((module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight), access)
        for row, module in adapted_modules(model, layout)
    }
    trained = {module: value for module, value in found.items() if value is not None}
    if not trained:
        return {}
    means = torch.stack(list(trained.values())) / gradient_scale
    return dict(zip(trained, means.tolist(), strict=True))
