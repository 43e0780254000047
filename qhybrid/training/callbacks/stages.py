"""Between two optimizer steps: the stages that are due begin, and are told and written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from qhybrid.disk import write_atomically
from qhybrid.training.run import Run
from qhybrid.training.trainer import BandedTrainer


class BeginStages(TrainerCallback):
    """Feeds the triggers, lets stages begin at the start of a step, and keeps the run's layout.json up to date.

    At the start of the next step, and not at the end of the last: the checkpoint of a step is then of the state
    before, and a run that goes on from it lets the stage begin again, whatever it was interrupted in.
    """

    def __init__(self, trainer: BandedTrainer, run: Run, report: Callable[..., Any]) -> None:
        self._trainer, self._run, self._report = trainer, run, report

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self._trainer.stages is not None and self._trainer.stages.frozen:
            self._trainer.hold_frozen()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self._trainer.stages is not None:
            self._trainer.stages.take_step(self._trainer.step_loss)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if self._trainer.stages is not None and metrics and "eval_loss" in metrics:
            self._trainer.stages.take_evaluation(metrics["eval_loss"])

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        trainer = self._trainer
        if trainer.stages is None:
            return
        changes = trainer.begin_stages()
        if any(change.expanded for change in changes):
            write_atomically(self._run.layout_file, trainer.layout.to_json())
        for change in changes:
            self._report(
                "stage",
                **change.to_dict(),
                frozen=sorted(trainer.stages.frozen),
                lowest_trained_layer=trainer.lowest_trained_layer(),
            )
