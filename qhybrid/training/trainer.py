"""trl's SFTTrainer with banded adapters: AdaLoRA's regulariser and scores, LoRA+ groups, guards, checkpoints.

Everything here is what trl and transformers leave out or do otherwise for these adapters; the training loop,
the loss, packing, the optimizers and the schedulers are theirs.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerState, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from qhybrid.adapters.access import DIRECT
from qhybrid.adapters.adalora import add_regularizer
from qhybrid.adapters.allocator import RankAllocator, Triplets
from qhybrid.adapters.attach import ADAPTER, adapted_modules, keep_adapter_values
from qhybrid.adapters.dora import hold_norms, refresh_norms
from qhybrid.adapters.folder import LAYOUT, WEIGHTS, load_weights, trained_tensors
from qhybrid.adapters.parameter_groups import parameter_groups
from qhybrid.adapters.schedule import plan_schedules
from qhybrid.architecture.layout import Layout
from qhybrid.data.tokenize import has_trained_token
from qhybrid.errors import NonFiniteError, QhybridError, RecipeError
from qhybrid.planner.workload import checkpointed_layers
from qhybrid.recipe.schema import Recipe
from qhybrid.redaction import redacted_values
from qhybrid.training.checkpoint import prune, read_tensors, staged, write_bytes, write_tensors
from qhybrid.training.memory import is_out_of_memory
from qhybrid.training.order import EpochOrder, WithBlankRow
from qhybrid.training.processes import StoppedElsewhere, agree, gather, is_several, place
from qhybrid.training.state import (
    optimizer_content,
    random_state,
    read_numbers,
    restore_optimizer,
    restore_random_state,
    write_state,
)
from qhybrid.training.zero import ZeroAccess, watch_step

ALLOCATORS = "allocators.safetensors"
_MOST_SKIPPED_STEPS = 30  # fp16: the loss scale starts at 2^16 and is halved each time


class EvaluationStopped(Exception):
    """A signal came during an evaluation in training."""


def split_batch(inputs: dict[str, Any], rows: int | None) -> list[dict[str, Any]]:
    """A batch in parts of at most `rows` rows; tensors without a row for each stay as they are."""
    total = len(inputs["input_ids"])
    if rows is None or rows >= total:
        return [inputs]
    return [
        {
            key: value[begin : begin + rows] if torch.is_tensor(value) and len(value) == total else value
            for key, value in inputs.items()
        }
        for begin in range(0, total, rows)
    ]


class BandedTrainer(SFTTrainer):
    """Trains a model that `adapters.attach` prepared, as its recipe and layout say."""

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

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        """As transformers', in an order that does not depend on how batches are split among processes."""
        strategy = self.args.train_sampling_strategy if is_training else "sequential"
        if strategy == "batch_rebalance":  # it makes batches itself
            return super()._get_dataloader(
                dataset, description, batch_size, sampler_fn, is_training, dataloader_key
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order = EpochOrder(
            len(dataset),
            strategy=strategy,
            seed=seed,
            fill_to=1 if self.args.dataloader_drop_last else batch_size * self.args.world_size,
            lengths=[len(ids) for ids in dataset["input_ids"]] if strategy == "group_by_length" else None,
            step_rows=batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
        )
        rows = WithBlankRow(self._remove_unused_columns(dataset, description=description))
        return super()._get_dataloader(rows, description, batch_size, lambda _: order, is_training, dataloader_key)

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
            state = read_tensors(Path(resume_from_checkpoint) / ALLOCATORS)
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
        assert len(parts) == 1 or num_items_in_batch is not None  # or the parts would not add up
        loss = torch.zeros((), device=self.args.device)
        for part in parts:
            part_loss = super().training_step(model, part, num_items_in_batch)
            self.step_loss += part_loss.item()
            loss = loss + part_loss
        return loss

    def _can_split(self) -> bool:
        """Whether fewer rows can go through the model: several processes would have to agree in mid-step."""
        rows = len(self._step_inputs[-1]["input_ids"])
        return self.recipe.distributed.is_single and min(rows, self.micro_batch or rows) > 1

    def _again_in_smaller_parts(self, model, num_items_in_batch, failure: str) -> Tensor:
        """Take the micro-batches of this step again, in parts of half as many rows: an exact retry."""
        rows = len(self._step_inputs[-1]["input_ids"])
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
        for band, allocator in zip(self._adalora_bands(), self.allocators, strict=True):
            settings = band.schedule
            still_choosing = self.state.global_step < allocator.schedule.last_allocation
            if still_choosing and not settings.regularizer_in_scores:
                allocator.observe(scale)
            if settings.regularizer_weight > 0:
                triplets = [self._triplets[row.module] for row in self.layout.of_band(band.band)]
                pairs = [(t.p, t.q) for t in triplets]
                access = allocator.access
                self.step_regularizer += add_regularizer(pairs, settings.regularizer_weight, scale, access).item()
            if still_choosing and settings.regularizer_in_scores:
                allocator.observe(scale)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
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
        sums = gather((self._log_probability, self._num_scored))
        log_probability, num_scored = (sum(parts) for parts in zip(*sums, strict=True))
        output.metrics[f"{metric_key_prefix}_loss"] = -log_probability / max(1, num_scored)
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

    def _save_checkpoint(self, model, trial) -> None:
        """A checkpoint of our own: gathered from all processes, written by the first, whole or not at all."""
        self.store_flos()
        named = trained_tensors(self.model, self.layout)
        states: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        rng = [random_state()]
        if not self.args.save_only_model or self.control.should_training_stop:  # a stopped run goes on
            states, optimizer = optimizer_content(self._base_optimizer(), named, self._zero)
            scaler = getattr(self.accelerator, "scaler", None)
            numbers = {
                "processes": place().world,
                "optimizer": optimizer,
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "num_train_tokens": self._total_train_tokens,
                "micro_batch": self.micro_batch,
                "evaluation_pending": self.evaluation_pending,
            }
            rng = gather(rng[0])
        if is_several() and not place().is_main:
            agree(lambda: None)
        else:
            agree(lambda: self._write_checkpoint(named, states, rng, numbers))
        self.state.best_model_checkpoint = self._best_checkpoint()

    def _write_checkpoint(self, named, states, rng, numbers) -> None:
        checkpoints, step = Path(self.args.output_dir), self.state.global_step
        with staged(checkpoints, step) as folder:
            write_tensors(folder / WEIGHTS, named, {"format": "pt"})
            write_bytes(folder / LAYOUT, self.layout.to_json().encode())
            scores = {f"{a.band}:{key}": value for a in self.allocators for key, value in a.state_dict().items()}
            if scores:
                write_tensors(folder / ALLOCATORS, scores)
            if numbers:
                write_state(folder, tensors=states, rng=rng, numbers=numbers)
            self.state.best_model_checkpoint = self._best_checkpoint(step)
            self._take_callback_states()
            text = json.dumps(redacted_values(dataclasses.asdict(self.state)), indent=2, sort_keys=True) + "\n"
            write_bytes(folder / TRAINER_STATE_NAME, text.encode())
        best, limit = self.state.best_model_checkpoint, self.recipe.training.save_total_limit
        prune(checkpoints, newest=step, limit=limit, keep=checkpoints / Path(best).name if best else None)

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
        named = trained_tensors(self.model, self.layout)
        restore_optimizer(self._base_optimizer(), named, self._zero, folder, numbers["optimizer"])
        self.lr_scheduler.load_state_dict(numbers["scheduler"])
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and numbers["scaler"]:
            scaler.load_state_dict(numbers["scaler"])
        self.micro_batch = numbers["micro_batch"]
        self.evaluation_pending = numbers["evaluation_pending"]

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
        # By name alone: a state that was tampered with must not lead elsewhere, nor one that was moved.
        best = Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name
        load_weights(self.model, self.layout, best, self._zero or DIRECT)

    def create_model_card(self, *args, **kwargs) -> None:
        """No card: trl's names local paths."""
