"""Training of tasks that share an adapter: one optimizer state for it, and one checkpoint of all tasks.

What each task does changes what the others train on, so nothing of one task can be saved, or gone back to, alone.
A checkpoint is of the run of all, and its number is that of all steps taken:

checkpoint-120/shared.safetensors      the factors that all share
checkpoint-120/optimizer.safetensors   what the optimizers remember of them, with state.json
checkpoint-120/tasks/NAME/             a checkpoint of the task, as of a run of its own
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from qhybrid.adapters.folder import save_plain
from qhybrid.adapters.parameter_groups import parameter_groups
from qhybrid.adapters.shared import attach_shared, concatenated
from qhybrid.architecture.concatenate import concatenate
from qhybrid.architecture.layout import Layout
from qhybrid.base.tensor_files import read_tensors, write_tensors
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.tasks import FOLDER, SHARED
from qhybrid.training.checkpoint import prune, staged
from qhybrid.training.session import Session
from qhybrid.training.state import optimizer_content, write_state
from qhybrid.training.trainer import BandedTrainer

_WEIGHTS = "shared.safetensors"


class SharedAdapter:
    """The adapter that all tasks train: its factors, and what the optimizers remember of them."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self.layout, self._seed = layout, seed
        self.factors: dict[str, nn.Parameter] = {}
        self._states: dict[str, dict[str, Any]] = {}

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """The factors by names that no task's own have."""
        return {f"{SHARED}.{name}": factor for name, factor in self.factors.items()}

    def attach(self, model: PeftModel, dtype: torch.dtype) -> None:
        """Add it to the model of a task; with the first one it gets its initial values."""
        if not self.factors:
            set_seed(self._seed)
        self.factors = dict(attach_shared(model, self.layout, dtype=dtype, factors=self.factors or None))

    def link(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer remember of the factors what all the others do, and they what it has read."""
        for name, factor in self.factors.items():
            common = self._states.setdefault(name, {})
            common.update(optimizer.state.get(factor, {}))
            optimizer.state[factor] = common

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        """Take the factors of a checkpoint of all."""
        for name, values in read_tensors(checkpoint / _WEIGHTS).items():
            self.factors[name].copy_(values)


class SharedTrainer(BandedTrainer):
    """Trains a task's own adapter and the shared one, both at the rates of the task."""

    def __init__(self, *, shared: SharedAdapter, together: Together, **kwargs: Any) -> None:
        self._shared, self._together = shared, together
        self._resumed_from: Path | None = None  # later: where it was saved last
        super().__init__(**kwargs)

    def trained(self) -> dict[str, nn.Parameter]:
        """As always, and the shared factors."""
        return super().trained() | self._shared.named

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As always, and those of the shared factors."""
        groups = parameter_groups(
            self.model,
            self._shared.layout,
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            adapter=SHARED,
        )
        return super().parameter_groups() + [{**group, "name": f"{SHARED}.{group['name']}"} for group in groups]

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._shared.link(self._base_optimizer())  # accelerate had its own copy made of all states
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self._resumed_from = Path(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._shared.load(_of_all(self._resumed_from))

    def _read_optimizer(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = super()._read_optimizer(folder)
        common, others = super()._read_optimizer(_of_all(folder))
        return tensors | common, {**numbers, "scalars": numbers["scalars"] | others["scalars"]}

    def _save_checkpoint(self, model, trial) -> None:
        self._together.save(self)

    def write_shared(self, folder: Path) -> None:
        """Write what is of no task into a checkpoint of all."""
        write_tensors(folder / _WEIGHTS, self._shared.factors)
        states, numbers = optimizer_content(self._base_optimizer(), self._shared.named, None)
        write_state(folder, tensors=states, rng=[], numbers={"optimizer": numbers})

    def was_saved(self, folder: Path) -> None:
        """`folder` has what `write_own` wrote. An earlier one may be pruned."""
        self._resumed_from = folder

    def write_own(self, folder: Path) -> None:
        """Write what is of this task, which may have paused after a step, before what follows from it."""
        if self.optimizer is None:  # it was resumed at its end, and has not changed
            assert self._resumed_from is not None
            shutil.copytree(self._resumed_from, folder)
            return
        folder.mkdir(parents=True)
        pending = self.evaluation_pending
        self.evaluation_pending |= self.control.should_evaluate
        content = self._checkpoint_content()
        self.evaluation_pending = pending
        self._fill_checkpoint(folder, *content)


def _of_all(checkpoint: Path) -> Path:
    """The checkpoint of all tasks that the one of a task lies in."""
    return checkpoint.parent.parent


class Member(Protocol):
    """One of the tasks, as far as a checkpoint of all needs it."""

    name: str
    trainer: SharedTrainer

    def in_place(self) -> AbstractContextManager[None]:
        """Its random numbers, while the block runs."""
        ...


class Together:
    """The checkpoints of all tasks. `members` are added before training begins."""

    def __init__(self, checkpoints: Path, recipe: Recipe) -> None:
        self._checkpoints, self._limit = checkpoints, recipe.training.save_total_limit
        self._newest = -1
        self.members: Sequence[Member] = ()

    def save(self, by: SharedTrainer) -> None:
        """Write a checkpoint of all, from the loop of one of them, while the others have paused."""
        step = sum(member.trainer.state.global_step for member in self.members)
        if by.is_stopping and step == self._newest:
            return  # the first that was stopped has saved all, and no step was taken since
        with staged(self._checkpoints, step) as folder:
            by.write_shared(folder)
            for member in self.members:
                own = folder / FOLDER / member.name
                if member.trainer is by:
                    by.write_own(own)
                else:
                    with member.in_place():
                        member.trainer.write_own(own)
        self._newest = step
        for member in self.members:
            member.trainer.was_saved(self._checkpoints / f"checkpoint-{step}" / FOLDER / member.name)
        prune(self._checkpoints, newest=step, limit=self._limit, keep=None)


class SharedSession(Session):
    """A session with the shared adapter beside its own, which ends as one adapter that has both."""

    def __init__(self, *args: Any, shared: SharedAdapter, together: Together, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared, self._together = shared, together

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """Both adapters."""
        adapted = super().attach(model)
        self._shared.attach(adapted, getattr(torch, self.prepared.recipe.adapter_dtype))
        return adapted

    def make_trainer(self, **settings: Any) -> BandedTrainer:
        """One for both adapters."""
        return SharedTrainer(shared=self._shared, together=self._together, **settings)

    @property
    def layout(self) -> Layout:
        """That of both as one adapter."""
        return concatenate(self._shared.layout, self.trainer.layout)

    def save(self, folder: Path) -> None:
        """Write both as one adapter, in fp32: s·B may have more digits than B."""
        modules = concatenated(self.trainer.model, self._shared.layout, self.trainer.layout)
        save_plain(modules, dataclasses.replace(self.info, adapter_dtype="float32"), folder, SHARED)
