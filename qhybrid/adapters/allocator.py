"""AdaLoRA's rank allocator: the importance scores and the masks of one band.

Zhang et al., arXiv 2303.10512, eq. 7 to 11 and algorithm 1. peft's allocator is not used: nobody calls it under
trl, its final phase never comes when tfinal is 0, ties prune too many, and a resume loses its averages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qhybrid.adapters.access import DIRECT, Access
from qhybrid.adapters.schedule import BudgetSchedule


@dataclass(frozen=True)
class Triplets:
    """The trained factors of one module: Q (r, in), P (out, r) and Λ (r,)."""

    q: nn.Parameter
    p: nn.Parameter
    lam: nn.Parameter


class RankAllocator:
    """Scores the triplets of one band and keeps the most important ones within the budget.

    Only λ is zeroed, so a triplet that was dropped can grow back until the final choice. Call `observe` when the
    gradients of a step are complete and the weights not yet updated, and `allocate` after the update.
    """

    def __init__(
        self,
        band: str,
        modules: Mapping[str, Triplets],
        schedule: BudgetSchedule,
        beta1: float,
        beta2: float,
        access: Access = DIRECT,
    ) -> None:
        self.band = band
        self.schedule = schedule
        self.access = access
        self.paused = False  # the band is frozen: it has no gradients, and nothing of it may change
        self.num_allocations = 0
        self._modules = dict(modules)
        self._beta1, self._beta2 = beta1, beta2
        # fp32 whatever the adapters' dtype: these averages differ by less than bf16 can tell.
        self._importance: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        for name, triplets in self._modules.items():
            for factor, parameter in _factors(triplets):
                self._importance[f"{name}.{factor}"] = torch.zeros_like(parameter, dtype=torch.float32)
                self._uncertainty[f"{name}.{factor}"] = torch.zeros_like(parameter, dtype=torch.float32)
        self._masks = {
            name: torch.ones_like(t.lam, dtype=torch.bool, requires_grad=False)
            for name, t in self._modules.items()
        }

    @torch.no_grad()
    def observe(self, gradient_scale: float = 1.0) -> None:
        """Update the averages with I = |w · grad| (eq. 8 to 10).

        Args:
            gradient_scale: what the gradients were multiplied with (a loss scaler's factor).
        """
        if self.paused or (gradient_scale != 1 and not self._gradients_are_finite()):
            return  # the loss scaler will skip this step; its infinities must not enter the averages
        for name, triplets in self._modules.items():
            for factor, parameter in _factors(triplets):
                key = f"{name}.{factor}"
                importance, uncertainty = self._importance[key], self._uncertainty[key]
                gradient = self.access.gradient(parameter)
                if gradient is None:
                    sensitivity = torch.zeros_like(importance)
                else:
                    values = self.access.values(parameter).float()
                    sensitivity = (values * gradient.float()).abs_().div_(gradient_scale)
                importance.lerp_(sensitivity, 1 - self._beta1)
                uncertainty.lerp_(sensitivity.sub_(importance).abs_(), 1 - self._beta2)

    def _gradients_are_finite(self) -> bool:
        parameters = [p for triplets in self._modules.values() for _, p in _factors(triplets)]
        gradients = [self.access.gradient(parameter) for parameter in parameters]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)

    def scores(self) -> dict[str, Tensor]:
        """S (r,) of every module: s(λ_i) + mean s(P_·i) + mean s(Q_i·), with s = importance · uncertainty."""

        def s(key: str) -> Tensor:
            return self._importance[key] * self._uncertainty[key]

        return {
            name: s(f"{name}.lambda") + s(f"{name}.p").mean(0) + s(f"{name}.q").mean(1) for name in self._modules
        }

    @torch.no_grad()
    def allocate(self, step: int) -> bool:
        """After optimizer step number `step` (from 1): choose anew if it is due, and zero what is dropped.

        Returns:
            Whether a new choice was made.
        """
        if self.paused:
            return False
        schedule = self.schedule
        late = step > schedule.last_allocation and sum(self.live_ranks().values()) > schedule.target_budget
        due = schedule.is_due(step) or late  # it was frozen when the final choice was due
        if due:
            scores = torch.cat(list(self.scores().values()))
            # A stable sort keeps exactly the budget, ties included, and the same triplets on every machine.
            keep = torch.argsort(scores, descending=True, stable=True)[: self.schedule.budget(step)]
            mask = torch.zeros_like(scores, dtype=torch.bool)
            mask[keep] = True
            sizes = [len(chosen) for chosen in self._masks.values()]
            self._masks = dict(zip(self._masks, mask.split(sizes), strict=True))
            self.num_allocations += 1
        if due or step > self.schedule.last_allocation:
            for name, triplets in self._modules.items():
                kept = self.access.values(triplets.lam).masked_fill(~self._masks[name], 0)
                self.access.assign(triplets.lam, kept)
        return due

    def live_ranks(self) -> dict[str, int]:
        """The number of kept triplets of every module."""
        return {name: int(mask.sum()) for name, mask in self._masks.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resume needs, at full size, as tensors."""
        state = {f"importance.{key}": value for key, value in self._importance.items()}
        state |= {f"uncertainty.{key}": value for key, value in self._uncertainty.items()}
        state |= {f"mask.{name}": mask.to(torch.uint8) for name, mask in self._masks.items()}
        state["num_allocations"] = torch.tensor(self.num_allocations)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave; every tensor must be there, with its shape."""
        expected = self.state_dict()
        if expected.keys() != state.keys():
            raise KeyError(f"allocator state differs in {sorted(expected.keys() ^ state.keys())[:3]}")
        for kind, own in (("importance", self._importance), ("uncertainty", self._uncertainty)):
            for key, value in own.items():
                value.copy_(state[f"{kind}.{key}"])
        for name, mask in self._masks.items():
            self._masks[name] = state[f"mask.{name}"].to(mask.device, torch.bool)
        self.num_allocations = int(state["num_allocations"])


def _factors(triplets: Triplets) -> tuple[tuple[str, nn.Parameter], ...]:
    return ("p", triplets.p), ("q", triplets.q), ("lambda", triplets.lam)
