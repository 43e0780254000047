"""Another model over the very same weights, for several adapters in one process.

peft injects an adapter into the modules of its base, so that several `get_peft_model` wrappers of one base are one
model: their forward passes go through the very same modules. What can be shared is the tensors.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree in which every parameter, buffer and 4-bit scale is that of `model`, not a copy.

    Adapters, hooks, modes and settings of one do not reach the other.

    Args:
        model: a base model as `load_base` gives it: frozen, without adapters.
    """
    assert not any(parameter.requires_grad for parameter in model.parameters()), "what is trained is not shared"
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if getattr(module, "quant_state", None) is not None:
            shared.append(module.quant_state)
    return copy.deepcopy(model, {id(each): each for each in shared})
