"""A trainer that saves and resumes with checkpoints of our own; transformers' are not trusted.

It would write into the final folder, pick the highest number unchecked, and delete by time of change.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from qhybrid.adapters.access import DIRECT
from qhybrid.adapters.allocator import RankAllocator
from qhybrid.adapters.folder import load_weights, save_weights, trained_tensors
from qhybrid.architecture.layout import Layout
from qhybrid.base.tensor_files import read_tensors, write_tensors
from qhybrid.disk import write_bytes
from qhybrid.recipe.schema import Recipe
from qhybrid.redaction import redacted_values
from qhybrid.training.checkpoint import prune, staged
from qhybrid.training.processes import agree, gather, is_several, place
from qhybrid.training.stages import Stages
from qhybrid.training.state import (
    OPTIMIZER,
    optimizer_content,
    random_state,
    read_numbers,
    restore_optimizer,
    restore_random_state,
    write_state,
)
from qhybrid.training.trainer_rows import RowsTrainer
from qhybrid.training.zero import ZeroAccess

ALLOCATORS = "allocators.safetensors"


class EvaluationStopped(Exception):
    """A signal came during an evaluation in training."""


class CheckpointingTrainer(RowsTrainer):
    """What is saved, when, and what a resumed run makes up for."""

    recipe: Recipe
    layout: Layout
    allocators: list[RankAllocator]
    stages: Stages | None
    micro_batch: int | None  # rows that go through the model at once, after running out of memory
    is_stopping: bool  # a signal came
    evaluation_pending: bool  # a signal came before the evaluation of this step was done
    _zero: ZeroAccess | None

    def _inner_training_loop(self, batch_size=None, args=None, resume_from_checkpoint=None, **kwargs):
        """As transformers'; but from a checkpoint at the end, only what came after that is made up for.

        transformers would train one step further.
        """
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            if state.global_step:  # else a task was saved before it began
                self.args.eval_on_start = False  # it was done, and early stopping would count it twice
            if state.global_step >= state.max_steps or self._has_stopped_early(state):
                self.state = state
                if self.is_deepspeed_enabled:  # weights and states come with its engine
                    self._prepare_for_training(
                        state.max_steps, self.get_train_dataloader(), resume_from_checkpoint
                    )
                else:
                    self._start_allocators(state.max_steps, resume_from_checkpoint)
                if self.recipe.training.optim.startswith("schedule_free"):  # the result is in its state
                    self.create_optimizer_and_scheduler(state.max_steps)
                    self._load_optimizer_and_scheduler(resume_from_checkpoint)
                evaluated = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
                missing = self.args.eval_strategy == "epoch" and state.global_step not in evaluated
                if missing or read_numbers(Path(resume_from_checkpoint))["evaluation_pending"]:
                    try:
                        self._determine_best_metric(metrics=self.evaluate(), trial=None)
                    except EvaluationStopped:  # its checkpoint is there already
                        self.evaluation_pending = True
                        self.stop()
                        return TrainOutput(state.global_step, 0.0, {})
                    state.best_model_checkpoint = self._best_checkpoint()
                if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    self._load_best_model()
                return TrainOutput(state.global_step, 0.0, {})
        try:
            return super()._inner_training_loop(
                batch_size=batch_size, args=args, resume_from_checkpoint=resume_from_checkpoint, **kwargs
            )
        except EvaluationStopped:  # of eval_on_start: there is nothing new to save
            self.stop()
            return TrainOutput(self.state.global_step, 0.0, {})

    def _init_training_state(self, *args, **kwargs):
        found = super()._init_training_state(*args, **kwargs)
        self.state.best_model_checkpoint = self._best_checkpoint()  # the folder may have been moved since
        return found

    def _has_stopped_early(self, state: TrainerState) -> bool:
        stopper = state.stateful_callbacks.get("EarlyStoppingCallback")
        if stopper is None or self.recipe.training.early_stopping_patience is None:
            return False
        waited = stopper["attributes"]["early_stopping_patience_counter"]
        return waited >= self.recipe.training.early_stopping_patience

    def is_epoch_evaluation_due(self) -> bool:
        """Whether an evaluation at the end of the epoch follows the step that was just taken."""
        args, state = self.args, self.state
        if args.eval_strategy != IntervalStrategy.EPOCH or not state.global_step:  # a task may wait for its first
            return False
        at_end = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if args.eval_delay > state.epoch or not at_end:
            return False
        return not any(entry["step"] == state.global_step and "eval_loss" in entry for entry in state.log_history)

    def saved(self) -> dict[str, nn.Parameter]:
        """Every parameter that a checkpoint of this trainer holds, by its saved name."""
        return trained_tensors(self.model, self.layout)

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter of the optimizer, by name."""
        return self.saved()

    def _save_checkpoint(self, model, trial) -> None:
        """A checkpoint of our own: gathered from all processes, written by the first, whole or not at all."""
        content = self._checkpoint_content()
        if is_several() and not place().is_main:
            agree(lambda: None)
        else:
            agree(lambda: self._write_checkpoint(*content))
        self.state.best_model_checkpoint = self._best_checkpoint()

    def _checkpoint_content(self) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], dict[str, Any]]:
        """The optimizer's states, the random state of each process, and numbers. Every process must call it."""
        self.store_flos()
        states: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        rng = [random_state()]
        if not self.args.save_only_model or self.is_stopping:  # a stopped run goes on
            states, optimizer = optimizer_content(self._base_optimizer(), self.saved(), self._zero)
            scaler = getattr(self.accelerator, "scaler", None)
            numbers = {
                "optimizer": optimizer,
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "num_train_tokens": self._total_train_tokens,
                "micro_batch": self.micro_batch,
                "evaluation_pending": self.evaluation_pending or self.is_epoch_evaluation_due(),
                "stages": self.stages.state() if self.stages else None,
            }
            rng = gather(rng[0])
        return states, rng, numbers

    def _write_checkpoint(self, states, rng, numbers) -> None:
        checkpoints, step = Path(self.args.output_dir), self.state.global_step
        with staged(checkpoints, step) as folder:
            self.state.best_model_checkpoint = self._best_checkpoint(step)
            self._fill_checkpoint(folder, states, rng, numbers)
        best, limit = self.state.best_model_checkpoint, self.recipe.training.save_total_limit
        prune(checkpoints, newest=step, limit=limit, keep=checkpoints / Path(best).name if best else None)

    def _fill_checkpoint(self, folder: Path, states, rng, numbers) -> None:
        save_weights(self.model, self.layout, folder)
        scores = {f"{a.band}:{key}": value for a in self.allocators for key, value in a.state_dict().items()}
        if scores:
            write_tensors(folder / ALLOCATORS, scores)
        if numbers:
            write_state(folder, tensors=states, rng=rng, numbers=numbers)
        self._take_callback_states()
        text = json.dumps(redacted_values(dataclasses.asdict(self.state)), indent=2, sort_keys=True) + "\n"
        write_bytes(folder / TRAINER_STATE_NAME, text.encode())

    def _best_checkpoint(self, being_written: int | None = None) -> str | None:
        step = self.state.best_global_step
        if not step:
            return self.state.best_model_checkpoint
        best = Path(self.args.output_dir) / f"checkpoint-{step}"
        return str(best) if step == being_written or best.is_dir() else self.state.best_model_checkpoint

    def _take_callback_states(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(state)
                else:
                    self.state.stateful_callbacks[name] = state

    def _base_optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer, below the wrappers of accelerate and DeepSpeed."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer.optimizer if self._zero else optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_weights(self.model, self.layout, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        folder = Path(checkpoint)
        numbers = read_numbers(folder)
        content = self._read_optimizer(folder)
        restore_optimizer(self._base_optimizer(), self.trained(), self._zero, *content)
        self.lr_scheduler.load_state_dict(numbers["scheduler"])
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and numbers["scaler"]:
            scaler.load_state_dict(numbers["scaler"])
        self._total_train_tokens = numbers["num_train_tokens"]
        # DeepSpeed takes an optimizer step for each part; see `_can_split`.
        self.micro_batch = numbers["micro_batch"] if self.recipe.distributed.is_single else None
        self.evaluation_pending = numbers["evaluation_pending"]

    def _read_optimizer(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `optimizer_content` gave."""
        return read_tensors(folder / OPTIMIZER), read_numbers(folder)["optimizer"]

    def _run_epoch(self, model, epoch, train_dataloader, **others) -> None:
        if self.evaluation_pending:  # the evaluation that a signal came before, and what follows from it
            self.evaluation_pending = False
            self._load_rng_state(others["resume_from_checkpoint"])  # the checkpoint that follows holds it
            self.control.should_evaluate = self.control.should_save = True
            self._maybe_log_save_evaluate(self._tr_loss, None, model, None, epoch, None, others["start_time"])
            if self.control.should_training_stop:
                return
        super()._run_epoch(model, epoch, train_dataloader, **others)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, *others, **more) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *others, **more)
        except EvaluationStopped:
            self.evaluation_pending = True
            self.control.should_evaluate = False  # or it would begin again at the end of the epoch
            self.stop()
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _load_rng_state(self, checkpoint: str) -> None:
        if not restore_random_state(Path(checkpoint), place().rank):  # there are more processes than before
            set_seed(self.args.seed + self.state.global_step + place().rank)

    def _load_best_model(self) -> None:
        self._use_averaged_weights()  # or the optimizer would do it later, to the weights that are loaded here
        load_weights(self.model, self.layout, self._best_folder(), self._zero or DIRECT)

    def _best_folder(self) -> Path:
        # By name alone: a state that was tampered with must not lead elsewhere, nor one that was moved.
        return Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name

    def create_model_card(self, *args, **kwargs) -> None:
        """No card: trl's names local paths."""
