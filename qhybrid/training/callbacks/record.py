"""One event for each optimizer step and each evaluation, and the same record for the display."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from transformers import TrainerCallback

from qhybrid.training.events import EventLog
from qhybrid.training.memory import measured_memory
from qhybrid.training.trainer import BandedTrainer


class Display(Protocol):
    """What shows the progress to a person."""

    def begin(self, step: int, total_steps: int) -> None:
        """Training starts after `step`."""

    def step(self, record: dict[str, Any]) -> None:
        """An optimizer step was taken."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """An evaluation ended."""

    def end(self) -> None:
        """Training ended, well or not."""


class RecordSteps(TrainerCallback):
    """Collects each step's figures from the trainer and hands them to the log and the display."""

    def __init__(
        self,
        trainer: BandedTrainer,
        events: EventLog,
        display: Display,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            clock: seconds; one that stands still where the steps of others are taken.
        """
        self._trainer = trainer
        self._clock = clock
        self._events = events
        self._display = display
        self._tokens = 0
        self._started = 0.0
        self._learning_rates: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._started = self._clock()
        self._tokens = self._trainer.num_train_tokens
        self._events.write("begin", step=state.global_step, total_steps=state.max_steps)
        self._display.begin(state.global_step, state.max_steps)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        # Before the scheduler moves them: the rates of this step.
        groups = self._trainer.optimizer.param_groups
        self._learning_rates = {group.get("name", str(i)): group["lr"] for i, group in enumerate(groups)}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        trainer, now = self._trainer, self._clock()
        seconds, tokens = now - self._started, trainer.num_train_tokens - self._tokens
        record: dict[str, Any] = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0, 4),
            "loss": trainer.step_loss,
            "grad_norm": trainer.grad_norm,
            "learning_rates": self._learning_rates,
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "seconds": round(seconds, 4),
            "memory": measured_memory(),
        }
        if trainer.allocators:
            record["regularizer"] = trainer.step_regularizer
            record["live_ranks"] = trainer.live_ranks()
        self._events.write("step", **record)
        self._display.step(record)
        trainer.begin_step()
        self._started, self._tokens = self._clock(), trainer.num_train_tokens

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        record = {"step": state.global_step, **(metrics or {})}
        self._events.write("evaluation", **record)
        self._display.evaluated(record)
        self._started = self._clock()  # the next step's speed is its own

    def on_save(self, args, state, control, **kwargs) -> None:
        self._events.write("checkpoint", step=state.global_step)
        self._started = self._clock()
