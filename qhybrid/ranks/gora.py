"""GoRA: ranks and initial values from the gradients of the frozen weights (He et al., arXiv 2502.12171).

Importance of a module is the mean of |W ⊙ G|, with G the gradient of the loss over some rows of the training data;
its rank is in proportion to importance/√(in + out). A stays random, and B starts so that s·B·A is the part of a
gradient step −γ·G that A's rows can hold.

On a 4-bit base W is the dequantised weight, one module at a time, and so is what is added to G on the device. The
sums are fp32 on the host, for as many modules at once as `memory` holds; the next ones take the rows again. Of G
only G·Aᵀ is kept, for an A of the largest rank that the module may get: its first r rows are the A of rank r.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qhybrid.adapters.dora import dequantized_weight
from qhybrid.architecture.layout import LayoutRow
from qhybrid.data.tokenize import IGNORED_LABEL, EncodedRow
from qhybrid.errors import NonFiniteError
from qhybrid.evaluation.forward import batches, scored_logits
from qhybrid.ranks.groups import in_groups
from qhybrid.ranks.observe import tapped_gradients

_FP32_BYTES = 4
MIN_SHARE, MAX_SHARE = 0.5, 4.0  # of the reference rank: the paper's limits (4 and 32 around 8)
GAMMA = 0.05  # the authors' default


@dataclass(frozen=True)
class Probe:
    """What is kept of a module's gradient."""

    importance: float  # mean |W ⊙ G|
    norm: float  # ‖G‖_F
    a: Tensor  # (r_max, in) fp32: what A starts with, of which the first r rows are taken
    gradient_on_a: Tensor  # G·Aᵀ (out, r_max) fp32


def probe_gradients(
    model: PreTrainedModel,
    losses: Callable[[], Iterable[Tensor]],
    modules: Sequence[LayoutRow],
    largest: Mapping[str, int],
    *,
    memory: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Probe]:
    """The probes of all modules.

    Args:
        losses: gives the parts of the loss, one micro-batch after the other, each time it is called.
        largest: r_max by module.
        memory: bytes of host memory for sums of gradients; one module is always taken.
        seed: of A.
        progress: told how many of how many forward and backward passes over the rows are done.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
    """
    by_name = {row.module: row for row in modules}
    sizes = {row.module: row.in_features * row.out_features * _FP32_BYTES for row in modules}
    groups = list(in_groups(sizes, memory))
    probes: dict[str, Probe] = {}
    for done, group in enumerate(groups):
        progress(done, len(groups))
        sums = {name: torch.zeros(by_name[name].out_features, by_name[name].in_features) for name in group}

        def add(name: str, x: Tensor, gradient: Tensor, sums: dict[str, Tensor] = sums) -> None:
            flat_x, flat_g = x.flatten(0, -2).float(), gradient.flatten(0, -2).float()
            sums[name] += (flat_g.T @ flat_x).to("cpu")

        with tapped_gradients(model, group, add):
            for loss in losses():
                loss.backward()
        for name in group:
            gradient = sums.pop(name)
            weight = dequantized_weight(model.get_submodule(name)).to("cpu", torch.float32)
            importance = float((weight * gradient).abs().mean(dtype=torch.float64))
            if not math.isfinite(importance):
                raise NonFiniteError(
                    f"the gradient of {name} on the rows that decide the ranks is not finite",
                    hint="try other rows (ranks.rows), or model.dtype float32",
                )
            a = initial_a(by_name[name], largest[name], seed)
            probes[name] = Probe(
                importance=importance,
                norm=float(gradient.norm()),
                a=a,
                gradient_on_a=gradient @ a.T,
            )
    progress(len(groups), len(groups))
    return probes


def token_losses(model: PreTrainedModel, rows: Sequence[EncodedRow], batch_size: int) -> Iterator[Tensor]:
    """The mean cross-entropy of all scored tokens of `rows`, in parts that sum to it: one step's loss."""
    total = sum(int((row.labels[1:] != IGNORED_LABEL).sum()) for row in rows)
    for batch in batches(rows, batch_size, model):
        logits, targets = scored_logits(model, batch)
        yield nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / total


def initial_a(row: LayoutRow, rank: int, seed: int) -> Tensor:
    """A (rank, in) as LoRA starts it, kaiming-uniform with a = √5: the same for a module in every order."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed}:{row.module}").getrandbits(63))
    bound = 1 / math.sqrt(row.in_features)  # √6 / √((1 + a²)·in)
    return torch.empty(rank, row.in_features).uniform_(-bound, bound, generator=generator)


def wishes(probes: Mapping[str, Probe], modules: Sequence[LayoutRow]) -> list[float]:
    """What every module would like, up to a common factor: importance/√(in + out), eq. 8 and 9."""
    return [probes[row.module].importance / math.sqrt(row.in_features + row.out_features) for row in modules]


def initial_values(probe: Probe, row: LayoutRow, gamma: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) in fp32: B = −ξ·G·Aᵀ·(A·Aᵀ)⁻¹ with ξ = γ·√(in/r)/s, eq. 10 to 13.

    G·Aᵀ·(A·Aᵀ)⁻¹·A is G on the r directions of A, about √(r/in) of its norm, so ‖s·B·A‖ is about γ·‖G‖.
    """
    a = probe.a[: row.rank].double()
    on_a = probe.gradient_on_a[:, : row.rank].double()
    factor = -gamma * math.sqrt(row.in_features / row.rank) / row.scaling
    b = factor * torch.linalg.solve(a @ a.T, on_a, left=False)
    return a.float(), b.float()
