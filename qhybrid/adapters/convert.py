"""From the adapters in a model to plain LoRA and DoRA factors that peft alone understands."""

from __future__ import annotations

import dataclasses

from peft import LoraConfig, PeftModel
from torch import Tensor

from qhybrid.adapters.adalora import lora_factors
from qhybrid.adapters.attach import ADAPTER, adapted_modules
from qhybrid.architecture.layout import Layout


@dataclasses.dataclass(frozen=True)
class PlainModule:
    """One module as peft stores it: W + scaling·B·A, with magnitudes for DoRA."""

    module: str
    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scaling: float
    magnitude: Tensor | None = None  # (out,), DoRA only

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


def to_plain(model: PeftModel, layout: Layout) -> tuple[list[PlainModule], list[PlainModule]]:
    """Every module in plain form: those that are LoRA (AdaLoRA folded in exactly), and those that are DoRA.

    AdaLoRA modules whose rank became 0 are left out: they add nothing.
    """
    lora: list[PlainModule] = []
    dora: list[PlainModule] = []
    for row, module in adapted_modules(model, layout):
        a, b = (part[ADAPTER].weight.detach() for part in (module.lora_A, module.lora_B))
        if row.kind == "dora":
            magnitude = module.lora_magnitude_vector[ADAPTER].weight.detach()
            dora.append(PlainModule(row.module, a, b, row.scaling, magnitude))
        elif row.kind == "adalora":
            a, b = lora_factors(a, b, module.lora_lambda[ADAPTER].detach(), row.scaling)
            if a.shape[0]:
                lora.append(PlainModule(row.module, a, b, 1.0))
        else:
            lora.append(PlainModule(row.module, a, b, row.scaling))
    return lora, dora


def plain_peft_config(modules: list[PlainModule], base_model: str) -> LoraConfig:
    """The peft configuration of plain modules; alpha is s·r, so that peft's alpha/r is s."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
        use_dora=any(module.magnitude is not None for module in modules),
        r=max(module.rank for module in modules),
        lora_alpha=max(module.rank for module in modules),
        target_modules=[module.module for module in modules],
        rank_pattern={module.module: module.rank for module in modules},
        alpha_pattern={module.module: module.scaling * module.rank for module in modules},
    )


def plain_peft_state(modules: list[PlainModule]) -> dict[str, Tensor]:
    """The tensors of plain modules under the names of peft's adapter_model.safetensors."""
    state: dict[str, Tensor] = {}
    for module in modules:
        prefix = f"base_model.model.{module.module}"
        state[f"{prefix}.lora_A.weight"] = module.a.contiguous()
        state[f"{prefix}.lora_B.weight"] = module.b.contiguous()
        if module.magnitude is not None:
            state[f"{prefix}.lora_magnitude_vector"] = module.magnitude.contiguous()
    return state
