"""AdaLoRA's budget schedule: how many triplets a band keeps after each optimizer step. Imports no torch.

Zhang et al., arXiv 2303.10512, section 3.3. Their eq. 14 has a misprint; this is the form that the text describes
and that the authors' code has. The last phase is a length, not the step where it begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qhybrid.architecture.layout import Layout
from qhybrid.errors import RecipeError, found_at
from qhybrid.recipe.band import AdaLoraSection, BandSection

_DEFAULT_ALLOCATIONS = 20  # in the decay, where the recipe gives no interval


@dataclass(frozen=True)
class BudgetSchedule:
    """How many triplets a band may keep after each optimizer step. Steps count from 1 to total_steps."""

    total_steps: int  # T
    warmup_steps: int  # t_i: all triplets live
    final_steps: int  # t_f: the length of the last phase, in which the choice is fixed
    interval: int  # ΔT
    init_budget: int
    target_budget: int

    @property
    def last_allocation(self) -> int:
        """The step of the final choice, T - t_f."""
        return self.total_steps - self.final_steps

    def budget(self, step: int) -> int:
        """b(t): constant, then cubic, then constant, rounded to the nearest whole number."""
        if step <= self.warmup_steps:
            return self.init_budget
        if step >= self.last_allocation:
            return self.target_budget
        left = 1 - (step - self.warmup_steps) / (self.last_allocation - self.warmup_steps)
        return math.floor(self.target_budget + (self.init_budget - self.target_budget) * left**3 + 0.5)

    def is_due(self, step: int) -> bool:
        """Whether an allocation happens after `step`."""
        if step == self.last_allocation:
            return True
        in_decay = self.warmup_steps < step < self.last_allocation
        return in_decay and (step - self.warmup_steps) % self.interval == 0

    @classmethod
    def plan(
        cls, settings: AdaLoraSection, *, band: str, total_steps: int, init_budget: int, target_budget: int
    ) -> BudgetSchedule:
        """Fit the recipe's settings to the real number of optimizer steps.

        Raises:
            RecipeError: warm-up and final phase leave no step for an allocation.
        """

        def steps(value: float) -> int:
            return int(value) if value >= 1 or value == 0 else int(value * total_steps)

        warmup, final = steps(settings.warmup), steps(settings.final)
        decay = total_steps - warmup - final
        if decay < 1:
            raise RecipeError(
                f"band {band!r}: AdaLoRA has no step to allocate in: the run has {total_steps} optimizer steps, "
                f"warm-up takes {warmup} and the final phase {final}",
                hint="train for more steps, or lower adalora.warmup and adalora.final (below 1: a fraction)",
            )
        if settings.interval is not None and settings.interval > decay:
            raise RecipeError(
                f"band {band!r}: adalora.interval {settings.interval} is longer than the decay of {decay} steps",
                hint="choose a shorter interval, or leave it out",
            )
        interval = settings.interval or max(1, decay // _DEFAULT_ALLOCATIONS)
        return cls(total_steps, warmup, final, interval, init_budget, target_budget)


def plan_schedules(bands: tuple[BandSection, ...], layout: Layout, total_steps: int) -> dict[str, BudgetSchedule]:
    """The schedule of every AdaLoRA band, by the band's name, for a run of `total_steps` optimizer steps.

    Raises:
        RecipeError: as `BudgetSchedule.plan`.
    """
    schedules = {}
    for band in bands:
        if band.kind != "adalora":
            continue
        with found_at("adapters", band.band, "adalora"):
            schedules[band.band] = BudgetSchedule.plan(
                band.adalora_settings,
                band=band.band,
                total_steps=total_steps,
                init_budget=sum(row.rank for row in layout.of_band(band.band)),
                target_budget=sum(row.target_rank for row in layout.of_band(band.band)),
            )
    return schedules
