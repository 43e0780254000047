"""The principal part that PiSSA trains, and what is left of a weight without it: what is frozen, and quantised.

W = (W − s·B0·A0) + s·B0·A0 (Meng et al., arXiv 2404.02948, eq. 2 to 4). The loader takes the part out of each
weight and notes on the layer what it took, so that no adapter can be put on a base that it does not belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qhybrid.errors import ModelError

_CHUNK_SIZE = 2**19  # weights that are widened at a time
_ATTRIBUTE = "principal_part"  # of a layer


@dataclass(frozen=True, eq=False)
class PrincipalPart:
    """s·B0·A0 of one weight W (out, in), of A0 (k, in) and B0 (out, k) as the adapter stores them."""

    a: Tensor
    b: Tensor
    scaling: float

    def residual(self, rows: Tensor, start: int = 0) -> Tensor:
        """Rows of W − s·B0·A0, in new memory.

        In fp64, whose sums of these products do not depend on their order in any bit that survives the rounding:
        another machine, or another number of threads, finds the same rows.

        Args:
            rows: (n, in) of W from row `start` on, in the dtype of the training, which is the result's.
        """
        a, b = (factor.to(rows.device, torch.float64) for factor in (self.a, self.b[start : start + len(rows)]))
        return torch.addmm(rows.double(), b, a, alpha=-self.scaling).to(rows.dtype)

    def take_out_of(self, weight: Tensor) -> None:
        """W (out, in) becomes W − s·B0·A0 in its own memory; the scratch memory is that of some MiB of rows."""
        a, b = (factor.to(weight.device, torch.float64) for factor in (self.a, self.b))
        wide, num_rows = PrincipalPart(a, b, self.scaling), max(1, _CHUNK_SIZE // weight.shape[1])
        for start in range(0, len(weight), num_rows):
            rows = weight[start : start + num_rows]
            rows.copy_(wide.residual(rows, start))

    def equals(self, other: PrincipalPart | None) -> bool:
        """Whether both are the same values, in whatever dtypes."""
        return (
            other is not None
            and self.scaling == other.scaling
            and all(
                one.shape == two.shape and torch.equal(one.cpu().float(), two.cpu().float())
                for one, two in ((self.a, other.a), (self.b, other.b))
            )
        )


Parts = Mapping[str, PrincipalPart]  # by the modules' names


def same_parts(one: Parts, other: Parts) -> bool:
    """Whether two bases without these parts are one base."""
    return one.keys() == other.keys() and all(part.equals(other[name]) for name, part in one.items())


def mark_without(layer: nn.Module, part: PrincipalPart) -> None:
    """Note on a layer that its weight is what is left without `part`."""
    setattr(layer, _ATTRIBUTE, part)


def part_missing_in(layer: nn.Module) -> PrincipalPart | None:
    """What was taken out of a layer's weight when it was loaded; None for a whole weight."""
    return getattr(layer, _ATTRIBUTE, None)


def parts_missing_in(model: nn.Module) -> dict[str, PrincipalPart]:
    """The same for all layers of a base model, by their names; of one under peft, by the names in the base."""
    return {
        name.removesuffix(".base_layer"): part
        for name, module in model.named_modules()
        if (part := part_missing_in(module)) is not None
    }


def require_weights_of(model: nn.Module, parts: Parts) -> None:
    """Refuse parts of weights that a model does not have.

    Raises:
        ModelError: a part of no linear module, or of one with another shape.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, part in parts.items():
        linear, shape = linears.get(name), (len(part.b), part.a.shape[1])
        own = None if linear is None else (linear.out_features, linear.in_features)
        if own != shape:
            raise ModelError(
                f"{name} is {'not there' if own is None else f'{own[0]}×{own[1]}'} in the base model and "
                f"{shape[0]}×{shape[1]} in the adapter",
                hint="the adapter belongs to another base model",
            )


def stored_quantized(path: str) -> ModelError:
    """The refusal of a model that has no 16-bit weights to take a principal part of."""
    return ModelError(
        f"{path} is stored quantised, and PiSSA takes its part out of the 16-bit weights",
        hint="use the original 16-bit model; quantization.method nf4 quantises it while loading",
    )
