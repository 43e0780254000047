"""Optimizer parameter groups: learning rates of bands and of LoRA+, and no weight decay where it would do harm."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from qhybrid.adapters.attach import ADAPTER, adapted_modules
from qhybrid.architecture.layout import Layout


def parameter_groups(
    model: PeftModel, layout: Layout, *, learning_rate: float, weight_decay: float, adapter: str = ADAPTER
) -> list[dict[str, Any]]:
    """The trained parameters in named groups, none of them empty.

    All of a band gets `lr_ratio` times the rate. LoRA+ (arXiv 2402.12354): B gets ratio times the rate of A.
    Magnitudes and Λ get no weight decay: it would pull ||W|| and the pruning decision towards zero.

    Args:
        adapter: peft's name of it.

    Returns:
        Groups with "params", "lr", "weight_decay" and "name", in a fixed order.
    """
    members: dict[tuple[str, float, float], list[nn.Parameter]] = {}

    def add(name: str, ratio: float, decay: float, parameter: nn.Parameter) -> None:
        name += f"×{ratio:g}" if ratio != 1 else ""
        members.setdefault((name, ratio, decay), []).append(parameter)

    for row, module in adapted_modules(model, layout):
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        ratio = row.lr_ratio
        if row.kind == "adalora":
            add("adalora.PQ", ratio, weight_decay, a)
            add("adalora.PQ", ratio, weight_decay, b)
            add("adalora.lambda", ratio, 0.0, module.lora_lambda[adapter])
            continue
        add("lora.A", ratio, weight_decay, a)
        add("lora.B", ratio * row.loraplus_lr_ratio, weight_decay, b)
        if row.kind == "dora":
            add("dora.magnitude", ratio, 0.0, module.lora_magnitude_vector[adapter].weight)
    return [
        {"params": parameters, "lr": learning_rate * ratio, "weight_decay": decay, "name": name}
        for (name, ratio, decay), parameters in members.items()
    ]
