"""How allocator, regulariser and preconditioner read and change trained parameters and their gradients.

Where torch holds them whole that is plain. DeepSpeed ZeRO holds them in shards and keeps fp32 copies:
training/zero.py has the same five methods for it.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Access(Protocol):
    """Whole values and gradients of trained parameters. Several processes must all call it in one order."""

    def values(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's values, whole; not to be changed."""
        ...

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The complete gradient of the step, whole; None where there is none."""
        ...

    def add_to_gradient(self, parameter: nn.Parameter, addition: Tensor) -> None:
        """Add to the gradient, before the optimizer sees it."""
        ...

    def set_gradient(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Put other values in the gradient's place, before the optimizer sees it."""
        ...

    def assign(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Change the values, in every copy that there is."""
        ...


class DirectAccess:
    """The parameters and gradients as torch has them."""

    def values(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad

    def add_to_gradient(self, parameter: nn.Parameter, addition: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.add_(addition.to(parameter.grad.dtype))

    def set_gradient(self, parameter: nn.Parameter, values: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.copy_(values)

    def assign(self, parameter: nn.Parameter, values: Tensor) -> None:
        parameter.data.copy_(values)


DIRECT = DirectAccess()
