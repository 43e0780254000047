"""trl's SFTTrainer with banded adapters: AdaLoRA's regulariser and scores, LoRA+ groups, guards, checkpoints.

Everything here is what trl and transformers leave out or do otherwise for these adapters; the training loop,
the loss, packing, the optimizers and the schedulers are theirs.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_optimizer import is_optimizer_factory

from qhybrid.adapters.access import DIRECT, Access
from qhybrid.adapters.adalora import add_regularizer
from qhybrid.adapters.allocator import RankAllocator, Triplets
from qhybrid.adapters.attach import ADAPTER, adapted_modules, keep_adapter_values
from qhybrid.adapters.dora import hold_norms
from qhybrid.adapters.folder import trained_tensors
from qhybrid.adapters.parameter_groups import parameter_groups
from qhybrid.adapters.preconditioner import clip_gradients, precondition
from qhybrid.adapters.schedule import plan_schedules
from qhybrid.architecture.layout import Layout
from qhybrid.base.tensor_files import read_tensors
from qhybrid.errors import NonFiniteError, QhybridError, RecipeError
from qhybrid.planner.workload import checkpointed_layers
from qhybrid.recipe.schema import Recipe
from qhybrid.training.batches import num_rows, split_batch
from qhybrid.training.memory import is_out_of_memory
from qhybrid.training.processes import StoppedElsewhere, gather, is_several, place
from qhybrid.training.trainer_checkpoints import ALLOCATORS
from qhybrid.training.trainer_stages import StagedTrainer
from qhybrid.training.zero import ZeroAccess, watch_step

_MOST_SKIPPED_STEPS = 30  # fp16: the loss scale starts at 2^16 and is halved each time


class BandedTrainer(StagedTrainer):
    """Trains a model that `adapters.attach` prepared, as its recipe and layout say."""

    _norm_before: float | None = None  # the gradients' of the step, before a preconditioner changed them

    def __init__(
        self,
        *,
        model: PeftModel,
        recipe: Recipe,
        layout: Layout,
        find_rows: Callable[[list[dict[str, Any]]], list[str]],
        report: Callable[..., None],
        **kwargs: Any,
    ) -> None:
        """
        Args:
            find_rows: the names of the data rows that batches were made of.
            report: takes the name of an event and its facts.
        """
        self.recipe = recipe
        self.layout = layout
        self.allocators: list[RankAllocator] = []
        self.gradient_watchers: list[Callable[[float, Access], None]] = []  # see `_finish_gradients`
        self.step_loss = 0.0  # cross-entropy of the optimizer step under way
        self.step_regularizer = 0.0
        self.grad_norm = 0.0
        self._num_non_finite = 0  # steps in a row
        self._zero: ZeroAccess | None = None
        self.micro_batch: int | None = None  # rows that go through the model at once, after running out of memory
        self._stopped = False
        self.evaluation_pending = False  # a signal came before the evaluation of this step was done
        self._step_inputs: list[dict[str, Any]] = []
        self._tokens_before_step = 0
        self._find_rows, self._report = find_rows, report
        self._triplets = {
            row.module: Triplets(
                module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, module.lora_lambda[ADAPTER]
            )
            for row, module in adapted_modules(model, layout)
            if row.kind == "adalora"
        }
        with keep_adapter_values(model):
            super().__init__(model=model, **kwargs)

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the recipe names, over LoRA+ parameter groups."""
        if self.optimizer is not None:
            return self.optimizer
        try:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        except (ImportError, ValueError) as error:  # a library that is missing, or optim_args it cannot read
            raise self._refused("optim", error) from None
        if is_optimizer_factory(optimizer_class) or {"params", "model", "optimizer_dict"} & settings.keys():
            # GaLore, LOMO, Muon and their kin make their own groups.
            wants_gradients = self.recipe.training.preconditioner is not None
            has_rates = any(row.loraplus_lr_ratio != 1 or row.lr_ratio != 1 for row in self.layout)
            if wants_gradients or has_rates or any(row.kind == "adalora" for row in self.layout):
                raise RecipeError(
                    f"training.optim {self.recipe.training.optim} makes its own parameter groups, or consumes "
                    "gradients as they come: lr_ratio, LoRA+, AdaLoRA and a preconditioner do not work with it",
                    hint="choose another optimizer, or leave those out",
                )
            return super().create_optimizer(model)
        if self.allocators and self.recipe.training.optim.startswith("schedule_free"):
            raise RecipeError(
                f"training.optim {self.recipe.training.optim} averages the weights behind the masks of AdaLoRA, "
                "so dropped triplets would come back in the result",
                hint="choose another optimizer, or other kinds of bands",
            )
        try:
            self.optimizer = optimizer_class(self.parameter_groups(), **settings)
        except (TypeError, ValueError) as error:  # adam_beta1 above 1, say
            raise self._refused("optim", error) from None
        return self.optimizer

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters in groups."""
        return parameter_groups(
            self.model,
            self.layout,
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As transformers'; what it refuses is a mistake in the recipe."""
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (TypeError, ValueError, KeyError) as error:  # lr_scheduler_kwargs that are unknown or missing
            hint = "look at training.lr_scheduler_kwargs and training.warmup_steps"
            raise self._refused("lr_scheduler_type", error, hint) from None

    def _refused(self, field: str, error: Exception, hint: str | None = None) -> RecipeError:
        given = getattr(self.recipe.training, field)
        return RecipeError(f"training.{field} {given}: {' '.join(str(error).split())}", hint=hint)

    # ---- AdaLoRA ----

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint):
        if self.is_deepspeed_enabled and resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)  # before DeepSpeed copies the weights
        if (
            self.is_deepspeed_enabled
            and self.recipe.model.dtype == "bfloat16"
            and self.recipe.training.bf16 is not False
        ):
            # Inside of DeepSpeed's forward, which ends an autocast that it did not begin.
            forward = torch.autocast(self.args.device.type, torch.bfloat16)(self.model.forward)
            self.model.forward = forward
        self._start_allocators(max_steps, resume_from_checkpoint)
        # transformers would look for a checkpoint of DeepSpeed's own; ours is loaded below.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_deepspeed_enabled:
            engine = self.accelerator.deepspeed_engine_wrapped.engine
            self._zero = ZeroAccess(engine)
            for allocator in self.allocators:
                allocator.access = self._zero
            watch_step(engine, self._finish_gradients)
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        elif is_several():
            set_seed(self.args.seed + place().rank)  # or dropout would drop the same values in all processes
        self._checkpoint_chosen_layers()
        return prepared

    def _checkpoint_chosen_layers(self) -> None:
        """Of the layers that transformers checkpoints, which are all, keep those of memory.checkpoint_layers."""
        if self.recipe.memory.checkpoint_layers is None:
            return
        layers = self.model.get_base_model().model.layers
        chosen = checkpointed_layers(self.recipe, len(layers))
        for index, layer in enumerate(layers):
            assert isinstance(layer, GradientCheckpointingLayer)
            layer.gradient_checkpointing = index in chosen

    def _start_allocators(self, max_steps: int, resume_from_checkpoint: str | None) -> None:
        schedules = plan_schedules(self.recipe.adapters, self.layout, max_steps)
        self.allocators = [
            RankAllocator(
                band.band,
                {row.module: self._triplets[row.module] for row in self.layout.of_band(band.band)},
                schedules[band.band],
                band.adalora_settings.beta1,
                band.adalora_settings.beta2,
            )
            for band in self._adalora_bands()
        ]
        if resume_from_checkpoint is not None and self.allocators:
            state = read_tensors(Path(resume_from_checkpoint) / ALLOCATORS)
            for allocator in self.allocators:
                prefix = f"{allocator.band}:"
                own = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
                allocator.load_state_dict(own)
        self._start_stages(max_steps, resume_from_checkpoint)

    def _adalora_bands(self):
        return [band for band in self.recipe.adapters if band.kind == "adalora"]

    def live_ranks(self) -> dict[str, int]:
        """The kept rank of every AdaLoRA module."""
        return {name: rank for allocator in self.allocators for name, rank in allocator.live_ranks().items()}

    def num_live_triplets(self) -> int:
        """The triplets that add to the model: their λ is not zero."""
        return sum(int(triplets.lam.count_nonzero()) for triplets in self._triplets.values())

    # ---- one step ----

    @property
    def access(self) -> Access:
        """How whole values and gradients of what is trained are reached."""
        return self._zero or DIRECT

    @property
    def num_train_tokens(self) -> int:
        """Tokens that were trained on so far, padding left out."""
        return int(self._total_train_tokens)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One micro-batch; after the last one of a step, AdaLoRA's scores and regulariser. Returns the loss."""
        if not self._step_inputs:
            self._tokens_before_step = self._total_train_tokens
        self._step_inputs.append(inputs)
        failure = None
        try:
            loss = self._in_parts(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not is_out_of_memory(error) or not self._can_split():
                raise
            failure = str(error).splitlines()[0]  # not the error itself: its frames hold the tensors
        if failure is not None:
            loss = self._again_in_smaller_parts(model, num_items_in_batch, failure)
        if not math.isfinite(self.step_loss) and not is_several():
            raise self._non_finite("loss", self.step_loss, [inputs])
        if self.accelerator.sync_gradients and self._zero is None:  # DeepSpeed's step is watched, and is over
            self._finish_gradients()
        return loss

    def _in_parts(self, model, inputs, num_items_in_batch) -> Tensor:
        """The batch at once or, after running out of memory, in parts of `micro_batch` rows."""
        parts = split_batch(inputs, self.micro_batch)
        # Or the parts would not add up; and DeepSpeed would step after each.
        assert len(parts) == 1 or (num_items_in_batch is not None and self._zero is None)
        loss = torch.zeros((), device=self.args.device)
        for part in parts:
            part_loss = super().training_step(model, part, num_items_in_batch)
            self.step_loss += part_loss.item()
            loss = loss + part_loss
        return loss

    def _can_split(self) -> bool:
        """Whether fewer rows can go through the model: several processes would have to agree in mid-step."""
        rows = num_rows(self._step_inputs[-1])
        return self.recipe.distributed.is_single and min(rows, self.micro_batch or rows) > 1

    def _again_in_smaller_parts(self, model, num_items_in_batch, failure: str) -> Tensor:
        """Take the micro-batches of this step again, in parts of half as many rows.

        The gradients add up to the same; dropout, though, draws other masks.
        """
        rows = num_rows(self._step_inputs[-1])
        was = min(rows, self.micro_batch or rows)
        self.micro_batch = (was + 1) // 2
        self._report(
            "out_of_memory",
            step=self.state.global_step + 1,
            rows=was,
            rows_from_now_on=self.micro_batch,
            message=failure,
        )
        model.zero_grad()
        self.step_loss, self._total_train_tokens = 0.0, self._tokens_before_step
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        failure_again = None
        try:
            for inputs in self._step_inputs:
                loss = self._in_parts(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.micro_batch == 1:
                raise
            failure_again = str(error).splitlines()[0]
        if failure_again is not None:
            return self._again_in_smaller_parts(model, num_items_in_batch, failure_again)
        return loss

    def stop(self) -> None:
        """Have the training end here; `was_stopped` says so afterwards."""
        self._stopped = self.control.should_training_stop = True

    @property
    def was_stopped(self) -> bool:
        """Whether a signal ended the training before its last step, or before the evaluation after it."""
        return self._stopped and (self.state.global_step < self.state.max_steps or self.evaluation_pending)

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def begin_step(self) -> None:
        """Forget the figures and batches of the step that was taken."""
        self.step_loss = self.step_regularizer = 0.0
        self._step_inputs = []

    def rows_of_step(self) -> list[str]:
        """The data rows of the step under way, in all processes."""
        return [row for rows in gather(self._find_rows(self._step_inputs)) for row in rows]

    def _non_finite(self, what: str, value: float, batches: list[dict[str, Any]]) -> QhybridError:
        rows = [row for rows in gather(self._find_rows(batches)) for row in rows]
        step = self.state.global_step + 1
        self._report("non_finite", step=step, what=what, value=value, rows=rows)
        shown = ", ".join(rows[:8]) + (" …" if len(rows) > 8 else "")
        if not place().is_main:
            return StoppedElsewhere(f"the {what} is {value}")
        look = f", or look at the rows of the batch: {shown}" if rows else ""
        return NonFiniteError(
            f"the {what} is {value} at step {step}; the step was not taken",
            hint=f"lower training.learning_rate{look}",
        )

    def _finish_gradients(self) -> None:
        """Gradients are complete here, not yet clipped, and the weights not yet updated.

        Later, clipping would weigh the steps differently, and under DeepSpeed the gradients are gone.
        """
        scaler = getattr(self.accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        if self.stages is not None:
            self.stages.observe(scale)
        for watch in self.gradient_watchers:
            watch(scale, self.access)
        both = zip(self._adalora_bands(), self.allocators, strict=True)
        bands = [(band, allocator) for band, allocator in both if not allocator.paused]
        for band, allocator in bands:
            if not band.adalora_settings.regularizer_in_scores:
                self._observe(allocator, scale)
        training = self.recipe.training
        if training.preconditioner is not None:
            trained = trained_tensors(self.model, self.layout).values()
            self._norm_before = clip_gradients(trained, training.max_grad_norm, scale, self.access)
            precondition(self.model, self.layout, training.preconditioner_delta, self.access)
        for band, allocator in bands:
            settings = band.adalora_settings
            if settings.regularizer_weight > 0:
                triplets = [self._triplets[row.module] for row in self.layout.of_band(band.band)]
                pairs = [(t.p, t.q) for t in triplets]
                added = add_regularizer(pairs, settings.regularizer_weight, scale, self.access)
                self.step_regularizer += added.item()
            if settings.regularizer_in_scores:
                self._observe(allocator, scale)
        if self._zero is not None:
            self._zero.forget_gradients()

    def _observe(self, allocator: RankAllocator, scale: float) -> None:
        if self.state.global_step < allocator.schedule.last_allocation:
            allocator.observe(scale)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self._norm_before is not None and math.isfinite(grad_norm):
            grad_norm = self._norm_before
        self.grad_norm = float(grad_norm)
        if is_several():  # each has trl's loss of its own rows, times the number of processes
            losses = gather(self.step_loss)
            self.step_loss = sum(losses) / len(losses)
        self._num_non_finite = 0 if math.isfinite(self.grad_norm) else self._num_non_finite + 1
        # fp16's loss scaler skips such a step and halves its factor; when that does not help, nothing will.
        if self._num_non_finite > (_MOST_SKIPPED_STEPS if self.args.fp16 else 0):
            # Several processes meet here: one's loss has become the gradient of all.
            lossless = math.isfinite(self.step_loss)
            what, value = ("gradient norm", self.grad_norm) if lossless else ("loss", self.step_loss)
            raise self._non_finite(what, value, self._step_inputs)
        return grad_norm

    def train(self, *args, **kwargs):
        """As transformers' train; DoRA's norms are computed once for each optimizer step."""
        with hold_norms(self.model):
            output = super().train(*args, **kwargs)
        self._use_averaged_weights()
        return output

    def _use_averaged_weights(self) -> None:
        """Schedule-free optimizers train on other weights than their result, which `eval` puts in place."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
