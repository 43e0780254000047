"""Tells of a loss that leaps out of its own noise."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from qhybrid.training.trainer import BandedTrainer

_WINDOW = 100  # steps
_ENOUGH = 20  # of them, before anything is called unusual
_DEVIATIONS = 8.0  # robust standard deviations; of 10,000 steps of normal noise none is as far away
_NORMAL = 1.4826  # the median absolute deviation of normal noise, times this, is its standard deviation


class LossWatch:
    """Whether a loss is a spike, judged by the median of the last steps and their deviations from it."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_WINDOW)
        self._in_a_row = 0

    def is_spike(self, loss: float) -> bool:
        """Take the loss of a step, and say whether it leaps out of those before.

        A spike is not remembered; but where one follows another, that is what is usual from then on.
        """
        if len(self._last) >= _ENOUGH:
            usual = statistics.median(self._last)
            deviation = _NORMAL * statistics.median(abs(each - usual) for each in self._last)
            # Where hardly anything varies, a small step is no spike.
            if loss - usual > max(_DEVIATIONS * deviation, 0.2 * abs(usual)):
                self._in_a_row += 1
                if self._in_a_row == _ENOUGH:
                    self._last.clear()
                return True
        self._in_a_row = 0
        self._last.append(loss)
        return False


class WatchLoss(TrainerCallback):
    """Reports each spike with the rows of its step."""

    def __init__(self, trainer: BandedTrainer, report: Callable[..., Any]) -> None:
        self._trainer, self._report, self._watch = trainer, report, LossWatch()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        loss = self._trainer.step_loss
        if self._watch.is_spike(loss):
            rows = self._trainer.rows_of_step()
            self._report("loss_spike", step=state.global_step + 1, loss=loss, rows=rows)
