"""Adapters that are no LoRA on the model as it is, made into that: PiSSA exactly, DoRA by an approximation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qhybrid.adapters.low_rank import approximate
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.errors import AdapterError
from qhybrid.export.merged.rows import merged_weight

WeightOf = Callable[[str], Tensor]  # a module's weight (out, in), by the module's name


@dataclass(frozen=True)
class Approximated:
    """One DoRA module as LoRA.

    Attributes:
        error: ||ΔW − B·A|| / ||ΔW||, with the Frobenius norm.
    """

    module: PlainModule
    error: float


def pissa_to_lora(adapter: PlainAdapter, weight_of: WeightOf) -> PlainAdapter:
    """The same function as LoRA on the untouched base, at twice the rank; exact.

    PiSSA (Meng et al., arXiv 2404.02948, eq. 2 to 4) trains A and B on W − s·B0·A0, where B0 and A0 are the
    principal part of W. So ΔW = s·B·A − s·B0·A0, that is A' = [A; A0] and B' = [B, −B0]. peft saves neither the
    residual nor B0 and A0: they are computed again. Magnitudes of DoRA stay: what they scale is the same sum.

    Args:
        weight_of: the weights that peft initialised from, in the dtype of the training.

    Raises:
        AdapterError: the principal part was found by a random method.
    """
    if adapter.base_minus is None:
        return adapter
    if adapter.base_minus != "pissa":
        raise AdapterError(
            f"{adapter.source} was initialised by {adapter.base_minus}, a random method that gives another "
            "principal part each time",
            hint="have peft convert it when saving, with path_initial_model_for_weight_conversion",
        )
    modules = []
    for module in adapter:
        u, sigma, v = torch.linalg.svd(weight_of(module.module).double(), full_matrices=False)
        share = (sigma[: module.rank] / module.scaling).sqrt()
        a0, b0 = share[:, None] * v[: module.rank], u[:, : module.rank] * share
        modules.append(
            PlainModule(
                module.module,
                torch.cat([module.a.double(), a0]).float(),
                torch.cat([module.b.double(), -b0], dim=1).float(),
                module.scaling,
                module.magnitude,
            )
        )
    return dataclasses.replace(adapter, modules=tuple(modules), base_minus=None)


def dora_to_lora(
    adapter: PlainAdapter, weight_of: WeightOf, rank: int
) -> tuple[PlainAdapter, tuple[Approximated, ...]]:
    """DoRA modules as LoRA of `rank`: the best approximation of their true ΔW, with its error.

    ΔW = m ⊙ (W + s·B·A)/||W + s·B·A|| − W (arXiv 2402.09353, eq. 5) has full rank, so none is exact.

    Args:
        weight_of: the weights that the adapter was trained on: of a 4-bit base the dequantised ones.
    """
    modules, approximated = [], []
    for module in adapter:
        if module.magnitude is None:
            modules.append(module)
            continue
        weight = weight_of(module.module).float()
        merged = merged_weight(
            weight, module, quantized=False, double_quant=False, dtype=torch.float32, out_dtype=torch.float32
        )
        found = approximate(merged - weight, rank=rank)
        short = PlainModule(module.module, found.a, found.b, 1.0)
        approximated.append(Approximated(short, found.error))
        modules.append(short)
    return dataclasses.replace(adapter, modules=tuple(modules)), tuple(approximated)
