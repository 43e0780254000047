"""trl's SFTTrainer with banded adapters: AdaLoRA's regulariser and scores, LoRA+ groups, guards, checkpoints.

Everything here is what trl and transformers leave out or do otherwise for these adapters; the training loop,
the loss, packing, the optimizers and the schedulers are theirs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from qhybrid.adapters.adalora import add_regularizer
from qhybrid.adapters.allocator import RankAllocator, Triplets
from qhybrid.adapters.attach import ADAPTER, adapted_modules, keep_adapter_values
from qhybrid.adapters.dora import hold_norms, refresh_norms
from qhybrid.adapters.folder import load_weights, save_weights
from qhybrid.adapters.parameter_groups import parameter_groups
from qhybrid.adapters.schedule import plan_schedules
from qhybrid.architecture.layout import Layout
from qhybrid.data.tokenize import has_trained_token
from qhybrid.errors import NonFiniteError, RecipeError
from qhybrid.planner.workload import checkpointed_layers
from qhybrid.recipe.schema import Recipe
from qhybrid.training.checkpoint import prune, seal

ALLOCATORS = "allocators.safetensors"
_MOST_SKIPPED_STEPS = 30  # fp16: the loss scale starts at 2^16 and is halved each time


class BandedTrainer(SFTTrainer):
    """Trains a model that `adapters.attach` prepared, as its recipe and layout say."""

    def __init__(self, *, model: PeftModel, recipe: Recipe, layout: Layout, **kwargs: Any) -> None:
        self.recipe = recipe
        self.layout = layout
        self.allocators: list[RankAllocator] = []
        self.step_loss = 0.0  # cross-entropy of the optimizer step under way
        self.step_regularizer = 0.0
        self.grad_norm = 0.0
        self._num_non_finite = 0  # steps in a row
        self._triplets = {
            row.module: Triplets(
                module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, module.lora_lambda[ADAPTER]
            )
            for row, module in adapted_modules(model, layout)
            if row.kind == "adalora"
        }
        with keep_adapter_values(model):
            super().__init__(model=model, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """trl's packing of the tokenised rows; a pack that was cut out of prompts alone is left out."""
        prepared = super()._prepare_dataset(
            dataset, processing_class, args, packing, formatting_func, dataset_name
        )
        return prepared.filter(lambda row: has_trained_token(row["labels"])) if packing else prepared

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
            if any(row.loraplus_lr_ratio != 1 or row.kind == "adalora" for row in self.layout):
                raise RecipeError(
                    f"training.optim {self.recipe.training.optim} makes its own parameter groups, or "
                    "consumes gradients as they come: LoRA+ rates and AdaLoRA do not work with it",
                    hint="choose another optimizer, or other kinds of bands",
                )
            return super().create_optimizer(model)
        if self.allocators and self.recipe.training.optim.startswith("schedule_free"):
            raise RecipeError(
                f"training.optim {self.recipe.training.optim} averages the weights behind the masks of AdaLoRA, "
                "so dropped triplets would come back in the result",
                hint="choose another optimizer, or other kinds of bands",
            )
        groups = parameter_groups(
            self.model,
            self.layout,
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
        )
        try:
            self.optimizer = optimizer_class(groups, **settings)
        except (TypeError, ValueError) as error:  # adam_beta1 above 1, say
            raise self._refused("optim", error) from None
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As transformers'; what it refuses is a mistake in the recipe."""
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (TypeError, ValueError, KeyError) as error:  # lr_scheduler_kwargs that are unknown or missing
            hint = "look at training.lr_scheduler_kwargs and training.warmup_steps"
            raise self._refused("lr_scheduler_type", error, hint) from None

    def get_train_dataloader(self):
        """As transformers'; what torch refuses, and batches that never fill, are mistakes in the recipe."""
        try:
            loader = super().get_train_dataloader()
        except ValueError as error:
            raise RecipeError(f"training.dataloader_…: {' '.join(str(error).split())}") from None
        if len(loader) == 0:
            raise RecipeError(
                f"{len(self.train_dataset)} rows do not fill one batch of {self._train_batch_size}, and "
                "training.dataloader_drop_last leaves the rest out",
                hint="lower training.per_device_train_batch_size, or leave dataloader_drop_last out",
            )
        return loader

    def _refused(self, field: str, error: Exception, hint: str | None = None) -> RecipeError:
        given = getattr(self.recipe.training, field)
        return RecipeError(f"training.{field} {given}: {' '.join(str(error).split())}", hint=hint)

    # ---- AdaLoRA ----

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint):
        self._start_allocators(max_steps, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
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
                band.schedule.beta1,
                band.schedule.beta2,
            )
            for band in self._adalora_bands()
        ]
        if resume_from_checkpoint is not None and self.allocators:
            state = load_file(str(Path(resume_from_checkpoint) / ALLOCATORS))
            for allocator in self.allocators:
                prefix = f"{allocator.band}:"
                own = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
                allocator.load_state_dict(own)

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
    def num_train_tokens(self) -> int:
        """Tokens that were trained on so far, padding left out."""
        return int(self._total_train_tokens)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One micro-batch; after the last one of a step, AdaLoRA's scores and regulariser. Returns the loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss += loss.item()
        if not math.isfinite(self.step_loss):
            raise NonFiniteError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; the step was not taken",
                hint="lower the learning rate, or look at the batch: the event log has the step",
            )
        if self.accelerator.sync_gradients:
            self._finish_gradients()
        return loss

    def _finish_gradients(self) -> None:
        """Gradients are complete here, not yet clipped, and the weights not yet updated.

        Later, clipping would weigh the steps differently, and under DeepSpeed the gradients are gone.
        """
        scaler = getattr(self.accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        for band, allocator in zip(self._adalora_bands(), self.allocators, strict=True):
            settings = band.schedule
            still_choosing = self.state.global_step < allocator.schedule.last_allocation
            if still_choosing and not settings.regularizer_in_scores:
                allocator.observe(scale)
            if settings.regularizer_weight > 0:
                triplets = [self._triplets[row.module] for row in self.layout.of_band(band.band)]
                pairs = [(t.p, t.q) for t in triplets]
                self.step_regularizer += add_regularizer(pairs, settings.regularizer_weight, scale).item()
            if still_choosing and settings.regularizer_in_scores:
                allocator.observe(scale)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.grad_norm = float(grad_norm)
        self._num_non_finite = 0 if math.isfinite(self.grad_norm) else self._num_non_finite + 1
        # fp16's loss scaler skips such a step and halves its factor; when that does not help, nothing will.
        if self._num_non_finite > (_MOST_SKIPPED_STEPS if self.args.fp16 else 0):
            raise NonFiniteError(
                f"the gradient norm is {self.grad_norm} at step {self.state.global_step + 1}; "
                "the step was not taken",
                hint="lower the learning rate or training.max_grad_norm",
            )
        return grad_norm

    def _inner_training_loop(self, batch_size=None, args=None, resume_from_checkpoint=None, **kwargs):
        """As transformers'; but from a checkpoint at the end, only what came after that is made up for.

        transformers would train one step further.
        """
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            if state.global_step >= state.max_steps or self._has_stopped_early(state):
                self.state = state
                self._start_allocators(state.max_steps, resume_from_checkpoint)
                if self.recipe.training.optim.startswith("schedule_free"):  # the result is in its state
                    self.create_optimizer_and_scheduler(state.max_steps)
                    self._load_optimizer_and_scheduler(resume_from_checkpoint)
                evaluated = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
                if self.args.eval_strategy == "epoch" and state.global_step not in evaluated:
                    self.evaluate()
                if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    self._load_best_model()
                return TrainOutput(state.global_step, 0.0, {})
        return super()._inner_training_loop(
            batch_size=batch_size, args=args, resume_from_checkpoint=resume_from_checkpoint, **kwargs
        )

    def _has_stopped_early(self, state: TrainerState) -> bool:
        stopper = state.stateful_callbacks.get("EarlyStoppingCallback")
        if stopper is None or self.recipe.training.early_stopping_patience is None:
            return False
        waited = stopper["attributes"]["early_stopping_patience_counter"]
        return waited >= self.recipe.training.early_stopping_patience

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

    # ---- evaluation ----

    def evaluate(self, *args, **kwargs):
        """As trl's evaluate; the random state is put back, so that evaluating does not change the training."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        # Schedule-free optimizers swap the weights for the evaluation, so norms must not be kept across it.
        refresh_norms(self.model)
        with torch.random.fork_rng(devices):
            metrics = super().evaluate(*args, **kwargs)
        refresh_norms(self.model)
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As transformers'; its loss is the cross-entropy of a token, whatever the batches and the training loss.

        transformers takes the mean over batches, in which the tokens of a short batch weigh more.
        """
        self._log_probability, self._num_scored = 0.0, 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = -self._log_probability / max(1, self._num_scored)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As trl's; the log-probabilities of the batch, from trl's fused head, are added for `evaluation_loop`."""
        outputs: list[Any] = []
        hook = model.register_forward_hook(lambda module, arguments, output: outputs.append(output))
        try:
            prediction = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            hook.remove()
        fused = outputs[-1]  # before it comes, with label smoothing, a pass for the loss alone
        self._log_probability += fused.log_probs.sum(dtype=torch.float64).item()
        self._num_scored += int(fused.label_mask.sum())
        return prediction

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save_weights(self.model, self.layout, folder)
        state = {f"{a.band}:{key}": value for a in self.allocators for key, value in a.state_dict().items()}
        if state:
            save_file({key: value.cpu() for key, value in state.items()}, str(folder / ALLOCATORS))

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        checkpoints, step = Path(self.args.output_dir), self.state.global_step
        seal(checkpoints / f"checkpoint-{step}")
        best, limit = self.state.best_model_checkpoint, self.recipe.training.save_total_limit
        prune(checkpoints, newest=step, limit=limit, keep=Path(best) if best else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_weights(self.model, self.layout, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._use_averaged_weights()  # or the optimizer would do it later, to the weights that are loaded here
        load_weights(self.model, self.layout, Path(self.state.best_model_checkpoint))

    def create_model_card(self, *args, **kwargs) -> None:
        """No card: trl's names local paths."""
