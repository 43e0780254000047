"""After each optimizer step: AdaLoRA's masks, and DoRA's norms made stale."""

from __future__ import annotations

from transformers import TrainerCallback

from qhybrid.adapters.dora import refresh_norms
from qhybrid.training.events import EventLog
from qhybrid.training.trainer import BandedTrainer


class AllocateRanks(TrainerCallback):
    """Runs the allocators between the optimizer's update and the next forward pass."""

    def __init__(self, trainer: BandedTrainer, events: EventLog) -> None:
        self._trainer = trainer
        self._events = events

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        for allocator in self._trainer.allocators:
            schedule = allocator.schedule
            self._events.write(
                "adalora_schedule",
                band=allocator.band,
                total_steps=schedule.total_steps,
                warmup_steps=schedule.warmup_steps,
                final_steps=schedule.final_steps,
                interval=schedule.interval,
                init_budget=schedule.init_budget,
                target_budget=schedule.target_budget,
            )

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        step = state.global_step + 1  # the trainer counts after this
        for allocator in self._trainer.allocators:
            if allocator.allocate(step):
                self._events.write(
                    "allocation",
                    step=step,
                    band=allocator.band,
                    budget=allocator.schedule.budget(step),
                    live_ranks=allocator.live_ranks(),
                )
        refresh_norms(self._trainer.model)
