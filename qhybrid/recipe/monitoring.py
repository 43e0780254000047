"""The recipe's section monitoring: what is measured of the adapters while they train."""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from qhybrid.recipe.section import Section

# Steps between two measurements where the recipe gives a fraction of the run: short runs would spend more on them.
SHORTEST_INTERVAL = 20


class MonitoringSection(Section):
    """Spectra and importance of every module, written into the event log."""

    # Below 1 a fraction of all optimizer steps, but no fewer than 20; 1 and above a number of steps; 0: never.
    spectrum_steps: Annotated[float, Field(ge=0)] = 0.05
    importance: bool = True  # at the same steps

    @field_validator("spectrum_steps")
    @classmethod
    def _is_a_fraction_or_a_number(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError("above 1 it is a whole number of steps")
        return value

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.spectrum_steps == 0 and not self.importance:
            raise ValueError("importance has no effect with spectrum_steps 0, which measures nothing")
        return self

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether something is measured at optimizer step `step`, from 1: at each interval's end and the last."""
        if self.spectrum_steps == 0:
            return False
        interval = int(self.spectrum_steps)
        if interval == 0:
            interval = max(SHORTEST_INTERVAL, math.ceil(self.spectrum_steps * total_steps))
        return step % interval == 0 or step == total_steps
