"""An adapter that several tasks train together, beside one of each task: W + s·B·A + s_t·B_t·A_t.

The shared factors are the very same parameters in the model of every task. The idea of a shared and a task's own
low-rank part is that of MTL-LoRA (arXiv 2410.09437) and HydraLoRA (2404.19245); their routers and the matrices
between A and B are not here, so that the sum stays an ordinary LoRA of rank r + r_t.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import nn

from qhybrid.adapters.attach import ADAPTER, peft_config
from qhybrid.adapters.folder import layer_and_target, trained_tensors
from qhybrid.adapters.plain import PlainModule, plain_modules
from qhybrid.architecture.layout import Layout
from qhybrid.recipe.tasks import SHARED

Factors = Mapping[str, nn.Parameter]  # by the names of `trained_tensors`


def attach_shared(
    model: PeftModel, layout: Layout, *, dtype: torch.dtype, factors: Factors | None = None
) -> Factors:
    """Add the shared adapter to a model that has its own, in place; both are trained, and add up.

    Args:
        layout: of the shared adapter, of kinds lora and rslora.
        dtype: of A and B, where they are new. Their initial values follow torch's global generator: seed it first.
        factors: those of another task's model, to be shared with it.

    Returns:
        The factors that the model has now.
    """
    assert all(row.kind in ("lora", "rslora") for row in layout), "only these can be added up"
    model.add_adapter(SHARED, peft_config(layout), autocast_adapter_dtype=False)
    base = model.get_base_model()
    for row in layout:
        module = base.get_submodule(row.module)
        a, b = module.lora_A[SHARED], module.lora_B[SHARED]
        if factors is None:
            a.to(dtype), b.to(dtype)
            if row.init == "gaussian":
                nn.init.normal_(a.weight, std=1 / row.rank)
        else:
            a.weight, b.weight = factors[f"{row.module}.lora_A"], factors[f"{row.module}.lora_B"]
        module.scaling[SHARED] = row.scaling
        if row.dropout:
            module.lora_dropout[SHARED] = nn.Dropout(row.dropout)
    model.base_model.set_adapter([ADAPTER, SHARED])
    return trained_tensors(model, layout, SHARED)


@torch.no_grad()
def concatenated(model: PeftModel, shared: Layout, own: Layout) -> tuple[PlainModule, ...]:
    """The shared adapter and the model's own as one, exactly: A = [A; A_t], B = [s·B, s_t·B_t], with scaling 1.

    Returns:
        In fp32, in the order of the layers; with the modules that only one of them has.
    """
    parts = plain_modules(shared, trained_tensors(model, shared, SHARED))
    parts += plain_modules(own, trained_tensors(model, own))
    by_module: dict[str, list[PlainModule]] = {}
    for part in parts:
        by_module.setdefault(part.module, []).append(part)
    return tuple(
        PlainModule(
            module,
            torch.cat([part.a.float() for part in same]),
            torch.cat([part.scaling * part.b.float() for part in same], dim=1),
            1.0,
        )
        for module, same in sorted(by_module.items(), key=lambda item: layer_and_target(item[0])[0])
    )
