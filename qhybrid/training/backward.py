"""Where the backward pass ends: at the lowest layer that still trains something, not at the embeddings.

With activation checkpointing transformers and trl make the embeddings' output need a gradient: the backward pass
would run through every frozen layer below. Frozen bands save time only if it does not.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


class BackwardEnd:
    """Ends the backward pass of a model at a layer that may change during training."""

    def __init__(self, model: PeftModel, *, reentrant: bool) -> None:
        """
        Args:
            model: with activation checkpointing as it is to be when all layers train.
            reentrant: whether that is torch's reentrant form, which wants an input that needs a gradient.
        """
        base = model.get_base_model().model
        self._embeddings: nn.Module = base.get_input_embeddings()
        self._layers: list[GradientCheckpointingLayer] = list(base.layers)
        self._checkpointed = [layer.gradient_checkpointing for layer in self._layers]
        self._reentrant = reentrant
        self._hooks = []

    def move_to(self, lowest: int) -> None:
        """Let the layers below number `lowest` compute and keep nothing for a backward pass."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for number, (layer, checkpointed) in enumerate(zip(self._layers, self._checkpointed, strict=True)):
            # A layer that keeps nothing needs no recomputation; the reentrant form would warn about it.
            layer.gradient_checkpointing = checkpointed and number >= lowest
        if lowest == 0:
            return
        # After the hooks of transformers and trl, which make it need a gradient.
        self._hooks.append(self._embeddings.register_forward_hook(lambda module, inputs, output: output.detach()))
        layer = self._layers[lowest]
        if self._reentrant and layer.gradient_checkpointing:
            self._hooks.append(layer.register_forward_pre_hook(_need_gradient))


def _need_gradient(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if torch.is_grad_enabled() and not inputs[0].requires_grad:
        inputs[0].requires_grad_()
