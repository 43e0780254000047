"""Simulates a recipe's training: the model, the adapters, the trainer and the loss of a real run, on meta tensors.

Two optimizer steps are taken, because the states that the first one makes are there in the second one's backward
pass. No weights are needed, nothing is downloaded, and nothing is written.
"""

from __future__ import annotations

import gc
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from qhybrid.adapters.attach import attach
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import spec_from_config
from qhybrid.planner.memory import predict_largest
from qhybrid.recipe.load import resolve
from qhybrid.recipe.schema import Recipe
from qhybrid.simulation.allocator import replay
from qhybrid.simulation.liger import liger_layers
from qhybrid.simulation.rehearsal import SCHEDULE_STEPS, full_rows, shortened, two_word_tokenizer
from qhybrid.simulation.shell import meta_base, tensors_of
from qhybrid.simulation.stand_ins import Device, Functions, answers_of, device_behaviour, scratch_of
from qhybrid.simulation.tracker import CUDA_ROUNDING, StorageTracker, Timeline
from qhybrid.training.arguments import training_arguments
from qhybrid.training.callbacks.allocate import AllocateRanks
from qhybrid.training.trainer import BandedTrainer


@dataclass(frozen=True)
class Simulation:
    """What a simulated run held, in bytes."""

    peak_bytes: int
    moment: str  # the phase in which the peak came: forward, backward or optimizer
    components: dict[str, int]  # what was alive at the peak
    moments: dict[str, int]  # the most that was alive in each phase
    resting_bytes: int  # alive between two steps
    reserved_bytes: int  # on CUDA what torch's allocator takes from the device for all that, else the peak
    timeline: Timeline


def simulate(
    recipe: Recipe, config: dict[str, Any], *, device: Device = "cuda", padded: bool = False
) -> Simulation:
    """Simulate `recipe` on a model with this config.json, every row as long as training.max_length.

    Args:
        device: whose kernels and rounding to assume.
        padded: whether the batches have padding, so that the attention mask must be built.

    Raises:
        QhybridError: what a real run would raise before its first step.
    """
    recipe = resolve(recipe)
    spec = spec_from_config(config)
    layout, _ = predict_largest(recipe, spec, build_layout(recipe, spec), device=device, padded=padded)
    asked, recipe = recipe.training, _on_meta(shortened(recipe))
    recipe = recipe.model_copy(update={"stages": ()})  # which begin later than the steps that are simulated
    tracker = StorageTracker(
        rounding=CUDA_ROUNDING if device == "cuda" else 1,
        scratch=scratch_of(device),
        answers=answers_of(padded=padded),
    )
    with tempfile.TemporaryDirectory() as folder, device_behaviour(device, tracker) as functions:
        shell = meta_base(recipe, config)
        roles: dict[int, str] = {}
        for name, tensor in tensors_of(shell):
            tracker.follow(tensor, name)
            quantized = recipe.quantization.method == "nf4" and _is_quantized(name, shell)
            _mark(tracker, roles, tensor, "base weights" if quantized else "unquantised weights")
        fused = asked.use_liger_kernel and device == "cuda"
        with tracker, liger_layers(shell, wanted=fused, options=asked.liger_kernel_config):
            model = attach(shell, layout, dtype=getattr(torch, recipe.adapter_dtype))
            for name, tensor in tensors_of(model):
                kind = "adapters" if tensor.requires_grad else "DoRA norms"
                if "lora_" in name:
                    _mark(tracker, roles, tensor, kind)
            trainer = _trainer(recipe, layout, model, Path(folder), tracker, functions, roles, device)
            start = len(tracker.timeline.events)
            trainer.train()
        resting = tracker.timeline.alive_bytes()
    return _result(tracker.timeline, start, roles, resting, device)


def _on_meta(recipe: Recipe) -> Recipe:
    """The trainer takes a meta tensor for one of the CPU's; `liger_layers` stands for Liger's own patches."""
    training = recipe.training.model_copy(update={"use_cpu": True, "use_liger_kernel": False})
    return recipe.model_copy(update={"training": training})


def _is_quantized(name: str, shell: nn.Module) -> bool:
    module = shell.get_submodule(name.removesuffix(".quant_state").rpartition(".")[0])
    return getattr(module, "quant_state", None) is not None and not name.endswith(".bias")


def _mark(tracker: StorageTracker, roles: dict[int, str], tensor: Tensor, role: str) -> None:
    number = tracker.number_of(tensor)
    if number is not None:
        roles.setdefault(number, role)


class _MetaTrainer(BandedTrainer):
    """The trainer of a real run; its batches are moved to the meta device."""

    tracker: StorageTracker
    functions: Functions
    roles: dict[int, str]
    simulated: Device

    def _move_model_to_device(self, model, device) -> None:
        """A meta tensor cannot be moved."""

    def _prepare_input(self, data):
        data = super()._prepare_input(data)
        return data.to("meta") if isinstance(data, Tensor) else data

    def _start_allocators(self, max_steps: int, resume_from_checkpoint: str | None) -> None:
        super()._start_allocators(SCHEDULE_STEPS, resume_from_checkpoint)
        for allocator in self.allocators:
            for tensor in allocator.state_dict().values():
                if tensor.is_meta:
                    _mark(self.tracker, self.roles, tensor, "AdaLoRA scores")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        for group in optimizer.param_groups:
            if self.simulated == "cuda" and group.get("fused") is None and "foreach" in group:
                group["foreach"] = True  # torch's default on CUDA
        return optimizer

    def compute_loss(self, *args, **kwargs):
        self.tracker.phase = "forward"
        with self.functions.autocast_cache():
            loss = super().compute_loss(*args, **kwargs)
        self.tracker.phase = "backward"
        return loss

    def training_step(self, *args, **kwargs) -> Tensor:
        super().training_step(*args, **kwargs)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                _mark(self.tracker, self.roles, parameter.grad, "gradients")
        self.tracker.phase = "optimizer"
        return torch.ones(())  # the loop adds it up on the trainer's own device


class _NoLog:
    """An event log of a run that leaves nothing behind."""

    def write(self, event: str, **facts: Any) -> None:
        return


class _MarkStates(AllocateRanks):
    """After the optimizer: its states are known. The masks and norms are handled as in a real run."""

    def __init__(self, trainer: _MetaTrainer) -> None:
        super().__init__(trainer, events=_NoLog())
        self._meta_trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        return

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        super().on_optimizer_step(args, state, control, **kwargs)
        trainer = self._meta_trainer
        for values in trainer.optimizer.state.values():
            for value in values.values():
                if isinstance(value, Tensor) and value.is_meta:
                    _mark(trainer.tracker, trainer.roles, value, "optimizer states")


def _trainer(
    recipe: Recipe,
    layout: Layout,
    model: nn.Module,
    folder: Path,
    tracker: StorageTracker,
    functions: Functions,
    roles: dict[int, str],
    device: Device,
) -> _MetaTrainer:
    arguments = training_arguments(recipe, folder)
    trainer = _MetaTrainer(
        model=model,
        recipe=recipe,
        layout=layout,
        find_rows=lambda batches: [],
        report=lambda event, **facts: None,
        args=arguments,
        train_dataset=full_rows(recipe),
        processing_class=two_word_tokenizer(),
    )
    trainer.accelerator.device_placement = False  # a meta tensor cannot be moved to the trainer's device
    trainer.tracker, trainer.functions, trainer.roles, trainer.simulated = tracker, functions, roles, device
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_MarkStates(trainer))
    return trainer


def _result(timeline: Timeline, start: int, roles: dict[int, str], resting: int, device: Device) -> Simulation:
    gc.collect()
    peak, event = timeline.peak(start)
    components: dict[str, int] = defaultdict(int)
    for number in timeline.alive_at(event):
        allocation = timeline.allocations[number]
        components[roles.get(number, "activations and scratch")] += allocation.num_bytes
    moment = timeline.allocations[timeline.events[event][0]].phase
    reserved = replay(timeline).reserved_bytes if device == "cuda" else peak
    return Simulation(peak, moment, dict(components), _moments(timeline, start), resting, reserved, timeline)


def _moments(timeline: Timeline, start: int) -> dict[str, int]:
    alive = 0
    moments: dict[str, int] = defaultdict(int)
    for index, (number, change) in enumerate(timeline.events):
        alive += change
        if index >= start and change > 0:
            phase = timeline.allocations[number].phase
            moments[phase] = max(moments[phase], alive)
    return dict(moments)
