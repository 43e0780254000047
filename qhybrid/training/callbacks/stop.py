"""A signal stops the run after the step, the evaluation's batch or the checkpoint under way, with a checkpoint."""

from __future__ import annotations

from transformers import TrainerCallback

from qhybrid.training.processes import any_of
from qhybrid.training.signals import StopSignals
from qhybrid.training.trainer import BandedTrainer
from qhybrid.training.trainer_checkpoints import EvaluationStopped


class StopWhenAsked(TrainerCallback):
    """Asks at every step, batch of an evaluation and checkpoint. To be added after all other callbacks."""

    def __init__(self, trainer: BandedTrainer, signals: StopSignals) -> None:
        self._trainer = trainer
        self._signals = signals

    def _asked(self) -> bool:
        return any_of(self._signals.received is not None)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._asked():
            # The evaluation that is due is made up for when the run goes on.
            self._trainer.evaluation_pending = control.should_evaluate or self._trainer.is_epoch_evaluation_due()
            control.should_evaluate = False
            control.should_save = True
            self._trainer.stop()

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        # Called for an epoch that was left early, too.
        if self._trainer.is_stopping:
            control.should_evaluate = control.should_save = False

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        if self._trainer.is_in_train and self._asked():
            raise EvaluationStopped

    def on_save(self, args, state, control, **kwargs) -> None:
        if self._asked():
            self._trainer.evaluation_pending |= self._trainer.is_epoch_evaluation_due()  # as in the checkpoint
            self._trainer.stop()
