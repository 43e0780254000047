"""What goes through chosen modules of a frozen model: their inputs, and the gradients of their outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

InputSink = Callable[[str, Tensor], None]  # the module's name, and x (..., in)
GradientSink = Callable[[str, Tensor, Tensor], None]  # ..., x (..., in), and the gradient of y (..., out)


class _Tap(torch.autograd.Function):
    """The identity on y; its backward pass hands x and the gradient of y to a sink.

    x is a saved tensor, so that activation checkpointing forgets it and brings it back.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (x,) = ctx.saved_tensors
        ctx.sink(x, gradient)
        return gradient, None, None


@contextlib.contextmanager
def tapped_inputs(model: nn.Module, modules: Sequence[str], sink: InputSink) -> Iterator[None]:
    """Inside the block, `sink` sees the input of each of `modules` in every forward pass."""

    def hook_of(name: str):
        return lambda module, inputs, output: sink(name, inputs[0].detach())

    with _hooked(model, modules, hook_of):
        yield


@contextlib.contextmanager
def tapped_gradients(model: PreTrainedModel, modules: Sequence[str], sink: GradientSink) -> Iterator[None]:
    """Inside the block, `sink` sees x and dL/dy of each of `modules` in every backward pass.

    No parameter needs a gradient: the embeddings' output gets one. Layers are checkpointed, so that no more than
    one layer's activations are there at once. The model's mode is put back.
    """

    def hook_of(name: str):
        def hook(module, inputs, output):
            return _Tap.apply(output, inputs[0].detach(), lambda x, gradient: sink(name, x, gradient))

        return hook

    was_training = model.training
    model.train()  # transformers checkpoints in this mode only
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    try:
        with _hooked(model, modules, hook_of):
            yield
    finally:
        model.disable_input_require_grads()
        model.gradient_checkpointing_disable()
        model.train(was_training)


@contextlib.contextmanager
def _hooked(model: nn.Module, modules: Sequence[str], hook_of: Callable[[str], Callable]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
