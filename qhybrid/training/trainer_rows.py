"""trl's SFTTrainer, fed with rows in an order of our own, and evaluated by the token."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

from qhybrid.adapters.dora import refresh_norms
from qhybrid.data.tokenize import has_trained_token
from qhybrid.errors import RecipeError
from qhybrid.training.order import EpochOrder, WithBlankRow
from qhybrid.training.processes import gather


class RowsTrainer(SFTTrainer):
    """What goes into the model in training and in evaluation, and the loss of the latter."""

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """trl's packing of the tokenised rows; a pack that was cut out of prompts alone is left out."""
        prepared = super()._prepare_dataset(
            dataset, processing_class, args, packing, formatting_func, dataset_name
        )
        return prepared.filter(lambda row: has_trained_token(row["labels"])) if packing else prepared

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
        alone = self.args.world_size == 1  # then a last batch may have fewer rows, as in plain trl
        order = EpochOrder(
            len(dataset),
            strategy=strategy,
            seed=seed,
            fill_to=1 if alone or self.args.dataloader_drop_last else batch_size * self.args.world_size,
            lengths=[len(ids) for ids in dataset["input_ids"]] if strategy == "group_by_length" else None,
            step_rows=batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
        )
        rows = WithBlankRow(self._remove_unused_columns(dataset, description=description))
        return super()._get_dataloader(rows, description, batch_size, lambda _: order, is_training, dataloader_key)

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
