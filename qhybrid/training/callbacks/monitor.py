"""Spectra and importance of every module, some twenty times in a run, into the event log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qhybrid.adapters.access import Access
from qhybrid.adapters.watch import importance, spectra
from qhybrid.training.events import EventLog, read_events
from qhybrid.training.trainer import BandedTrainer

_DIGITS = 4
_KEPT = 0.85  # of the running average at each measurement: AdaLoRA's beta1


class Monitor(TrainerCallback):
    """Measures at the steps that the recipe's section monitoring names. Nothing of the training changes.

    All processes measure, because ZeRO gathers what is read; the event log of all but the first leads nowhere.
    """

    def __init__(self, trainer: BandedTrainer, events: EventLog, file: Path) -> None:
        """
        Args:
            file: the event log's, where a resumed run finds its averages.
        """
        self._trainer, self._events, self._file = trainer, events, file
        self._settings = trainer.recipe.monitoring
        self._average: dict[str, float] = {}
        if self._settings.importance:
            trainer.gradient_watchers.append(self._take_importance)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step and self._file.is_file():
            earlier = [e for e in read_events(self._file, "importance") if e["step"] <= state.global_step]
            self._average = earlier[-1]["modules"] if earlier else {}

    def _is_due(self, step: int) -> bool:
        return self._settings.is_due(step, self._trainer.state.max_steps)

    def _take_importance(self, scale: float, access: Access) -> None:
        trainer, step = self._trainer, self._trainer.state.global_step + 1
        if not self._is_due(step):
            return
        found = importance(trainer.model, trainer.layout, scale, access)
        if not all(map(math.isfinite, found.values())):
            return  # the loss scaler will skip this step, or the run will end with it
        # What is written is what is averaged on: a resumed run reads it.
        before = {**found, **self._average}
        now = {name: new + _KEPT * (before[name] - new) for name, new in found.items()}
        self._average = {**self._average, **_rounded(now)}  # what is frozen keeps its own
        self._events.write("importance", step=step, modules=self._average)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self._is_due(state.global_step):
            return
        trainer = self._trainer
        found = spectra(trainer.model, trainer.layout, trainer.access)
        live = trainer.live_ranks()
        modules = {
            module: {
                "rank": len(spectrum.sigma),
                "live_rank": live.get(module, len(spectrum.sigma)),
                **spectrum.figures(),
                "singular_values": spectrum.sigma.tolist(),
            }
            for module, spectrum in found.items()
        }
        self._events.write("spectra", step=state.global_step, modules=_rounded(modules))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
