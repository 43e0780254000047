"""More rank for LoRA modules in training, without changing what the model computes; and bands that stand still.

W + s·B·A with A' = [A; A_new] and B' = [B, 0] is W + s·B'·A' as long as s stays: the new columns of B are zero, so
only they have a gradient at first, as at the start of a run. Were the new rows of A zero too, neither would ever
have one. The idea is IncreLoRA's (arXiv 2308.12043); which modules grow is the caller's choice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from qhybrid.adapters.attach import ADAPTER, adapted_modules
from qhybrid.adapters.dora import refresh_norms
from qhybrid.adapters.folder import trained_tensors
from qhybrid.architecture.growth import grown
from qhybrid.architecture.layout import Layout, LayoutRow


@torch.no_grad()
def expand(
    model: PeftModel, layout: Layout, ranks: Mapping[str, int], optimizer: torch.optim.Optimizer, *, seed: int
) -> Layout:
    """Raise the ranks of some modules between two optimizer steps, in the parameters that there are.

    The optimizer's states get zeros for the new values: what has no past has no momentum.

    Args:
        layout: of `model` as it is.
        ranks: the new rank of each module that grows, above the old one; none of them AdaLoRA's.
        optimizer: every state must have its parameter's shape or be a number (`planner.optimizers.GROWING`).
        seed: of the new rows, which are the same whatever else draws random numbers, in every process.

    Returns:
        The layout of `model` from now on.
    """
    after = grown(layout, ranks)
    for row, module in adapted_modules(model, layout):
        if row.module not in ranks:
            continue
        rank = ranks[row.module]
        a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        new_rows = initial_rows(row, rank, seed).to(a.device, a.dtype)
        _resize(module, torch.cat([a, new_rows]), torch.cat([b, b.new_zeros(b.shape[0], rank - row.rank)], dim=1))
        for parameter in (a, b):
            _pad_states(optimizer, parameter)
    refresh_norms(model)
    return after


def initial_rows(row: LayoutRow, rank: int, seed: int) -> Tensor:
    """The rows that A gets on top of its own: (rank - row.rank, in) in fp32, drawn as at the start of a run."""
    digest = hashlib.sha256(f"{seed} {row.module} {row.rank}".encode()).digest()  # a rank is only left once
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    rows = torch.empty(rank - row.rank, row.in_features)
    if row.init == "gaussian":
        return nn.init.normal_(rows, std=1 / rank, generator=generator)
    return nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)  # whatever the number of rows


def _resize(module: LoraLayer, a: Tensor, b: Tensor) -> None:
    """Give a module other matrices A (r, in) and B (out, r), in the parameters that it has."""
    down, up, rank = module.lora_A[ADAPTER], module.lora_B[ADAPTER], a.shape[0]
    for linear, values in ((down, a), (up, b)):
        linear.weight.grad = None  # of another shape
        linear.weight.data = values
    down.out_features = up.in_features = rank
    module.r[ADAPTER] = rank
    module.lora_alpha[ADAPTER] = module.scaling[ADAPTER] * rank  # as attach writes it; the scaling stays


def _pad_states(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if not torch.is_tensor(value) or value.dim() == 0:
            continue  # a count of steps
        assert value.dim() == 2, f"{type(optimizer).__name__} keeps {key} in another shape than the parameter's"
        padded = value.new_zeros(parameter.shape)
        padded[: value.shape[0], : value.shape[1]] = value
        state[key] = padded


@torch.no_grad()
def take_ranks(model: PeftModel, layout: Layout) -> None:
    """Give every module matrices of the ranks of `layout`, for values that are loaded after training has ended."""
    for row, module in adapted_modules(model, layout):
        a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        if a.shape[0] != row.rank:
            _resize(module, a.new_empty(row.rank, a.shape[1]), b.new_empty(b.shape[0], row.rank))


def freeze(model: PeftModel, layout: Layout, bands: Collection[str]) -> None:
    """Train all bands but `bands`. A frozen parameter has no gradient, so no optimizer moves it or its states."""
    of_band = {row.module: row.band for row in layout}
    for name, parameter in trained_tensors(model, layout).items():
        trains = of_band[name.rpartition(".")[0]] not in bands
        parameter.requires_grad_(trains)
        if not trains:
            parameter.grad = None
