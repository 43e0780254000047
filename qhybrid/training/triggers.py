"""What a stage may wait for: a loss that no longer falls, or modules that use nearly all of their rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qhybrid.recipe.stages import PlateauSection, SpectrumSection


class Plateau:
    """Whether a loss has stopped falling, since this began to watch it."""

    def __init__(self, settings: PlateauSection) -> None:
        self._settings = settings
        self._best: float | None = None
        self._waited = 0  # values without an improvement
        self._window: list[float] = []  # training losses of a value under way

    @property
    def is_reached(self) -> bool:
        """Whether so many values in a row brought no improvement."""
        return self._waited >= self._settings.patience

    def take_evaluation(self, loss: float) -> None:
        """An evaluation's loss."""
        if self._settings.metric == "eval_loss":
            self._take(loss)

    def take_step(self, loss: float) -> None:
        """An optimizer step's loss; the mean of each window of steps is one value."""
        if self._settings.metric == "train_loss":
            self._window.append(loss)
            if len(self._window) == self._settings.window_steps:
                self._take(sum(self._window) / len(self._window))
                self._window = []

    def _take(self, value: float) -> None:
        best = math.inf if self._best is None else self._best
        margin = self._settings.threshold * abs(best) if math.isfinite(best) else 0.0  # for a loss of any sign
        if value < best - margin:
            self._best, self._waited = value, 0
        else:
            self._waited += 1

    def state(self) -> dict[str, Any]:
        """What a resume needs, as JSON."""
        return {"best": self._best, "waited": self._waited, "window": list(self._window)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        self._best, self._waited, self._window = state["best"], state["waited"], list(state["window"])


class Saturation:
    """Which modules use nearly all of their rank; with hysteresis, and a pause after each change of a module.

    The rules of a run share it.
    """

    def __init__(self) -> None:
        self._waiting: set[str] = set()  # were expanded by a rule, and have not been released yet
        self._changed: dict[str, int] = {}  # the step of each module's last change

    def choose(self, step: int, used: Mapping[str, float], settings: SpectrumSection) -> list[str]:
        """The modules to be expanded now by a rule, the fullest first.

        Args:
            used: the share of its rank that each module uses.
        """
        self._waiting -= {module for module, share in used.items() if share <= settings.release}
        full = [m for m, share in used.items() if share >= settings.threshold and m not in self._waiting]
        latest = step - settings.interval
        rested = [module for module in full if self._changed.get(module, latest) <= latest]
        return sorted(rested, key=lambda module: -used[module])

    def expanded(self, step: int, module: str, *, by_rule: bool = True) -> None:
        """A module has been expanded; if not by a rule, its share need not have fallen before one does."""
        self._changed[module] = step
        if by_rule:
            self._waiting.add(module)

    def state(self) -> dict[str, Any]:
        """What a resume needs, as JSON."""
        return {"waiting": sorted(self._waiting), "changed": dict(self._changed)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        self._waiting, self._changed = set(state["waiting"]), dict(state["changed"])
