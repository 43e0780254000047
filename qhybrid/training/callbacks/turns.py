"""Where one of several tasks lets the others go on: after each optimizer step."""

from __future__ import annotations

from transformers import TrainerCallback

from qhybrid.training.coroutine import Coroutine


class TakeTurns(TrainerCallback):
    """Pauses the training loop. To be added before `StopWhenAsked`, which then finds what was asked meanwhile.

    At the pause the gradients are used up and no activation is alive. What follows from the step, an evaluation
    or a checkpoint, belongs to the next turn, but for the last step.
    """

    def __init__(self, loop: Coroutine) -> None:
        self._loop = loop

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._loop.pause()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step < state.max_steps:
            self._loop.pause()

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self._loop.check()

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        self._loop.check()
