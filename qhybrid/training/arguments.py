"""From the recipe's training section to trl's SFTConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig

from qhybrid.errors import RecipeError
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.training_fields import OUR_FIELDS, OWNED_ELSEWHERE
from qhybrid.redaction import redacted_values


class ReportedConfig(SFTConfig):
    """trl's arguments; trackers are told them, and write them, redacted."""

    def to_dict(self) -> dict[str, Any]:
        """As trl's."""
        return redacted_values(super().to_dict())


def training_arguments(recipe: Recipe, checkpoints: Path, deepspeed: dict[str, Any] | None = None) -> SFTConfig:
    """The arguments of trl's trainer for this recipe.

    Args:
        deepspeed: DeepSpeed's configuration, with ZeRO.

    Raises:
        RecipeError: trl or transformers refuse a value; the message is theirs.
    """
    training = recipe.training
    values = {
        name: getattr(training, name)
        for name in type(training).model_fields
        if name not in OUR_FIELDS and name not in OWNED_ELSEWHERE
    }
    if training.bf16 is None:
        values["bf16"] = recipe.model.dtype == "bfloat16" and not training.fp16
    if not torch.cuda.is_available():
        values["use_cpu"] = True  # transformers wants it said before it trains in bf16 on a CPU
    if training.metric_for_best_model is None and (
        training.early_stopping_patience is not None or training.save_strategy == "best"
    ):
        values["metric_for_best_model"] = "eval_loss"
    if training.preconditioner is not None:
        values["max_grad_norm"] = (
            0.0  # gradients are clipped before they are preconditioned; see training/trainer.py
        )
    if deepspeed is not None:
        values["deepspeed"] = deepspeed
        values["bf16"] = False  # or accelerate would have DeepSpeed cast what is trained; see training/zero.py
    if recipe.distributed.processes > 1:
        values["ddp_backend"] = "gloo" if values.get("use_cpu") else "nccl"
        values["ddp_find_unused_parameters"] = False
    if recipe.model.dtype == "float16":
        values["fp16"] = True  # the loss must be scaled, or small gradients vanish
    values |= {
        "output_dir": str(checkpoints),
        "disable_tqdm": True,  # qhybrid draws the progress
        "save_total_limit": None,  # qhybrid prunes, and only after the newer checkpoint is sealed
        "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting after a resume
        # The data comes tokenised, with its labels and in the right template.
        "chat_template_path": None,
        "assistant_only_loss": False,
        "completion_only_loss": None,
    }
    try:
        arguments = ReportedConfig(**values)
        if recipe.distributed.is_single:
            arguments._n_gpu = 1  # several visible GPUs do not mean DataParallel, which trl refuses
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()  # says so if its library is missing
        return arguments
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(f"training: {' '.join(str(error).split())}") from None
