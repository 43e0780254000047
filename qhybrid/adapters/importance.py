"""How much each LoRA module matters to the loss: a running average of |w · grad|, from complete gradients.

|w · grad| is what the loss would change by, to first order, were w zero: the sensitivity of AdaLoRA (Zhang et al.,
arXiv 2303.10512, eq. 8), averaged over steps as there (eq. 9). Here it is the mean over all values of a module's A
and B, so that modules of different sizes are compared by what one more parameter in them is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qhybrid.adapters.access import DIRECT, Access

BETA = 0.85  # as AdaLoRA's


class ModuleImportance:
    """Running averages by module. Parameters without a gradient, which are frozen, leave theirs as it is."""

    def __init__(self, modules: Mapping[str, tuple[nn.Parameter, nn.Parameter]]) -> None:
        """
        Args:
            modules: A and B of each module.
        """
        self._modules = dict(modules)
        device = next(iter(self._modules.values()))[0].device if self._modules else None
        self._averages = torch.zeros(len(self._modules), dtype=torch.float64, device=device)

    @torch.no_grad()
    def observe(self, gradient_scale: float = 1.0) -> None:
        """Take in the gradients of a step.

        Args:
            gradient_scale: what the gradients were multiplied with (a loss scaler's factor). With one, gradients
                that are not finite are left out: the scaler will skip the step.
        """
        found = [(index, sensitivity(pair)) for index, pair in enumerate(self._modules.values())]
        trained = [(index, value) for index, value in found if value is not None]
        if not trained:
            return
        now = torch.stack([value for _, value in trained]) / gradient_scale
        indices = torch.tensor([index for index, _ in trained], device=now.device)
        before = self._averages[indices]
        after = BETA * before + (1 - BETA) * now
        if gradient_scale != 1:
            after = torch.where(torch.isfinite(now).all(), after, before)
        self._averages[indices] = after

    def averages(self) -> dict[str, float]:
        """The importance of each module; 0 before the first gradient."""
        return dict(zip(self._modules, self._averages.tolist(), strict=True))

    def load(self, averages: Mapping[str, float]) -> None:
        """Restore what `averages` gave."""
        values = [averages[name] for name in self._modules]
        self._averages.copy_(torch.tensor(values, dtype=torch.float64))


def sensitivity(factors: Sequence[nn.Parameter], access: Access = DIRECT) -> Tensor | None:
    """The mean of |w · grad| over all values of `factors`, in fp64; None where one has no gradient.

    Args:
        access: how values and gradients are reached.
    """
    gradients = [access.gradient(factor) for factor in factors]
    total = size = 0
    for factor, gradient in zip(factors, gradients, strict=True):
        if gradient is None:
            return None
        total = total + (access.values(factor).float() * gradient.float()).abs().sum(dtype=torch.float64)
        size += gradient.numel()
    return total / size
