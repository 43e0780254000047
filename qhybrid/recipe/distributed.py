"""The recipe's section distributed: processes, ZeRO, and what may be said to DeepSpeed itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from qhybrid.recipe.section import Section

_DEEPSPEED_OWNED = {
    "optimizer": "set training.optim",
    "scheduler": "set training.lr_scheduler_type",
    "fp16": "set model.dtype; adapters train in fp32 under ZeRO",
    "bf16": "set model.dtype; adapters train in fp32 under ZeRO",
    "torch_autocast": "set model.dtype",
    "amp": "set model.dtype",
    "gradient_clipping": "set training.max_grad_norm",
    "gradient_accumulation_steps": "set training.gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "set training.per_device_train_batch_size",
    "train_batch_size": "set training.per_device_train_batch_size",
    "zero_allow_untested_optimizer": "set training.optim",
    "zero_force_ds_cpu_optimizer": "set training.optim",
}
_ZERO_OWNED = {
    "stage": "set distributed.zero_stage",
    "offload_optimizer": "set distributed.offload",
    "offload_param": "set distributed.offload",
}
_PLANNED_SIZES = {
    "reduce_bucket_size": "reduce_bucket_size",
    "overlap_comm": "overlap_comm",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_param_persistence_threshold": "param_persistence_threshold",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_max_reuse_distance": "max_reuse_distance",
}


class DistributedSection(Section):
    """How many processes train together, and what DeepSpeed ZeRO shards among them."""

    processes: Annotated[int, Field(ge=1)] = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # laid over the configuration that qhybrid derives

    @property
    def sizes(self) -> dict[str, Any]:
        """What `deepspeed` sets of the sizes that the memory plan knows, by the planner's names."""
        given = self.deepspeed.get("zero_optimization", {})
        return {ours: given[theirs] for theirs, ours in _PLANNED_SIZES.items() if theirs in given}

    @model_validator(mode="after")
    def _deepspeed_keeps_to_its_own(self) -> Self:
        if self.deepspeed and self.zero_stage == 0:
            raise ValueError("deepspeed has no effect without a zero_stage")
        for key, hint in _DEEPSPEED_OWNED.items():
            if key in self.deepspeed:
                raise ValueError(f"deepspeed.{key} is derived from the recipe: {hint}")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError("deepspeed.zero_optimization must be a mapping")
        for key, hint in _ZERO_OWNED.items():
            if key in zero:
                raise ValueError(f"deepspeed.zero_optimization.{key} is derived from the recipe: {hint}")
        for key in _PLANNED_SIZES.keys() & zero.keys():
            if not isinstance(zero[key], int) or zero[key] < 0:
                raise ValueError(f"deepspeed.zero_optimization.{key} must be a number of values, or true or false")
        return self

    @property
    def is_single(self) -> bool:
        """One process without ZeRO."""
        return self.processes == 1 and self.zero_stage == 0 and self.offload == "none"

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("offload needs a zero_stage of 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError("offload all needs zero_stage 3: only that shards the parameters")
        return self
