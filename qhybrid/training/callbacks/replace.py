"""After the first optimizer step: the run that --overwrite set aside is removed for good."""

from __future__ import annotations

from transformers import TrainerCallback

from qhybrid.training.claim import discard_replaced
from qhybrid.training.run import Run


class DiscardReplaced(TrainerCallback):
    """Until a step is taken the new run may still turn out to be a mistake."""

    def __init__(self, run: Run) -> None:
        self._run: Run | None = run

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._run is not None:
            discard_replaced(self._run)
            self._run = None
