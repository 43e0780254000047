"""Several adapters into one, module by module, on ΔW = s·B·A: any ranks, alphas, bands and targets.

cat              A = [A_i], B = [w_i·s_i·B_i]: the weighted sum exactly; ranks add up
svd, linear      the weighted sum, at a lower rank: to a share of its energy, or at the sources' largest rank
magnitude_prune  each ΔW_i keeps its largest values, then the weighted sum
ties             each ΔW_i keeps its largest values; of the weighted ones the heavier sign decides, and the mean of
                 those that agree with it is taken (Yadav et al., arXiv 2306.01708, on the task vectors w_i·ΔW_i)
dare_linear      values are dropped at random and the rest scaled up, then the weighted sum (Yu et al., 2311.03099)
dare_ties        dropped so, then signs as in ties

peft's names and its `*_svd` arithmetic. One difference: peft elects the sign before it weights, so that a negative
weight votes for what it then subtracts, and a small one outvotes a large one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from qhybrid.adapters.folder import layer_and_target
from qhybrid.adapters.low_rank import approximate, frobenius
from qhybrid.adapters.plain import PlainAdapter, PlainModule, require_untouched_base
from qhybrid.adapters.spectrum import Factored, factor
from qhybrid.errors import AdapterError, ExportError

CombineMethod = Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[str, ...] = get_args(CombineMethod)
DEFAULT_ENERGY = 0.99
DEFAULT_DENSITY = 0.5
_CANCELLED = 1e-12  # a sum so small beside its parts is what rounding left of zero


@dataclass(frozen=True)
class CombineSettings:
    """How to combine.

    Attributes:
        rank: of every module of the result, where it has so much. None: by `energy`, or the sources' largest.
        energy: the share of ||ΔW||² to keep in each module; of svd 0.99 where neither is given.
        density: the share of each ΔW_i's values that ties, dare and magnitude_prune keep; None: 0.5.
        seed: of what dare drops; None: 0.

    Raises:
        ExportError: a setting that has no effect, or is out of range.
    """

    method: CombineMethod
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.method == "cat" and (self.rank is not None or self.energy is not None):
            raise ExportError("cat is exact and takes no rank and no energy", hint="--method svd takes them")
        if self.rank is not None and self.energy is not None:
            raise ExportError("give a rank or an energy, not both")
        if self.rank is not None and self.rank < 1:
            raise ExportError(f"a rank of {self.rank} is none: it is at least 1")
        for name, share in (("energy", self.energy), ("density", self.density)):
            if share is not None and not 0 < share <= 1:
                raise ExportError(f"the {name} is a share above 0 and at most 1, not {share:g}")
        if self.density is not None and not self.is_dense:
            raise ExportError(f"--density has no effect with {self.method}")
        if self.seed is not None and not self.method.startswith("dare"):
            raise ExportError(f"--seed has no effect with {self.method}, which draws nothing at random")

    @property
    def is_dense(self) -> bool:
        """Whether the method works on single values of ΔW, and so forms it in full."""
        return self.method not in ("cat", "svd", "linear")


@dataclass(frozen=True)
class CombinedModule:
    """One module of the result; ||ΔW||_F of what the method asks for, and ||ΔW − s·B·A||_F / ||ΔW||_F."""

    module: PlainModule
    norm: float
    error: float


def combine(
    sources: Sequence[tuple[PlainAdapter, float]],
    settings: CombineSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CombinedModule]:
    """Combine adapters of one base, each with its weight; modules in the order of the layers.

    Modules in which nothing is left, because their parts cancel, are left out. At the peak, the methods on single
    values hold (2 + number of sources) matrices in fp32 of the largest module.

    Raises:
        AdapterError: DoRA, or PiSSA of peft; modules of other shapes, a module outside the layers, values beyond
            fp32, or nothing is left at all.
        ExportError: a weight that is 0 or not finite.
    """
    assert sources
    for adapter, weight in sources:
        if not math.isfinite(weight) or weight == 0:
            raise ExportError(f"the weight of {adapter.source} is {weight:g}", hint="leave out what adds nothing")
        _require_sums(adapter)
    places: dict[str, list[tuple[int, float, PlainModule]]] = {}
    for index, (adapter, weight) in enumerate(sources):
        for module in adapter:
            places.setdefault(module.module, []).append((index, weight, module))
    for name, parts in places.items():
        if len({part.shape for _, _, part in parts}) > 1:
            shapes = " and ".join(sorted({f"{part.shape[0]}×{part.shape[1]}" for _, _, part in parts}))
            raise AdapterError(f"{name} is {shapes} in different adapters", hint="they belong to different bases")
    found = []
    names = sorted(places, key=lambda name: layer_and_target(name)[0])
    for done, name in enumerate(names):
        combined = _combined(places[name], settings)
        if combined.norm > 0:
            found.append(combined)
        progress(done + 1, len(names))
    if not found:
        raise AdapterError("nothing is left: the adapters cancel each other, or are all zero")
    return found


def overall_error(norms_and_errors: Sequence[tuple[float, float]]) -> float:
    """The relative Frobenius error over all modules, from each one's norm and relative error."""
    whole = math.hypot(*(norm for norm, _ in norms_and_errors))
    return math.hypot(*(norm * error for norm, error in norms_and_errors)) / whole if whole else 0.0


def _require_sums(adapter: PlainAdapter) -> None:
    if adapter.dora:
        raise AdapterError(
            f"{adapter.source} has DoRA modules ({adapter.dora[0].module}, for example), whose change is no sum",
            hint="merge it into the model (qhybrid export ADAPTER OUT --to merged), or make LoRA of it with an "
            "error that is printed (qhybrid export ADAPTER OUT --to peft --dora-to-lora RANK)",
        )
    require_untouched_base(adapter)


def _combined(parts: list[tuple[int, float, PlainModule]], settings: CombineSettings) -> CombinedModule:
    name = parts[0][2].module
    largest = max(module.rank for _, _, module in parts)
    if settings.is_dense:
        dense = _dense(parts, settings)
        if not math.isfinite(frobenius(dense)):
            raise _beyond_fp32(name)
        rank = (settings.rank or largest) if settings.energy is None else None
        found = approximate(dense, rank=rank, energy=settings.energy)
        return CombinedModule(PlainModule(name, found.a, found.b, 1.0), found.norm, found.error)
    a = torch.cat([module.a.double() for _, _, module in parts])
    b = torch.cat([weight * module.scaling * module.b.double() for _, weight, module in parts], dim=1)
    if not torch.isfinite(b.float()).all():
        raise _beyond_fp32(name)
    exact = factor(b, a, 1.0)
    if exact.norm <= _CANCELLED * float(a.norm() * b.norm()):
        return CombinedModule(PlainModule(name, a[:1].float(), b[:, :1].float(), 1.0), 0.0, 0.0)
    if settings.method == "cat":
        return CombinedModule(PlainModule(name, a.float(), b.float(), 1.0), exact.norm, 0.0)
    rank = _rank(exact, settings, largest)
    return CombinedModule(exact.truncated(rank, name), exact.norm, exact.error(rank))


def _beyond_fp32(name: str) -> AdapterError:
    return AdapterError(f"{name} gets values beyond what fp32 holds", hint="give smaller weights")


def _rank(exact: Factored, settings: CombineSettings, largest: int) -> int:
    needed = exact.energy_rank(1.0)  # beyond it there are zeros
    if settings.rank is not None:
        return min(settings.rank, needed)
    if settings.energy is not None or settings.method == "svd":
        return exact.energy_rank(settings.energy or DEFAULT_ENERGY)
    return min(largest, needed)


def _dense(parts: list[tuple[int, float, PlainModule]], settings: CombineSettings) -> Tensor:
    """What the method makes of the ΔW_i (out, in), in fp32."""
    density = settings.density or DEFAULT_DENSITY
    weighted = []
    for index, weight, module in parts:
        delta = module.delta()
        if settings.method.startswith("dare"):
            drop_values(delta, density, f"{settings.seed or 0}:{index}:{module.module}")
        else:
            trim_values(delta, density)
        weighted.append(delta.mul_(weight))
    return disjoint_mean(weighted) if settings.method.endswith("ties") else _sum(weighted)


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def disjoint_mean(tensors: list[Tensor]) -> Tensor:
    """The mean, at each place, of the values whose sign is that of the sum; 0 where the sum is.

    TIES, steps 2 and 3 of algorithm 1 in arXiv 2306.01708.
    """
    elected = _sum(tensors).sign_()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected, dtype=torch.uint8)
    for tensor in tensors:
        agrees = tensor.sign() == elected
        agrees &= elected != 0
        total += tensor * agrees
        count += agrees
    return total.div_(count.clamp_min_(1))


def trim_values(delta: Tensor, density: float) -> None:
    """Set all but the largest values to 0, in place. Values as large as the smallest that is kept are kept too."""
    count = max(1, round(density * delta.numel()))
    if count == delta.numel():
        return
    sizes = delta.abs().flatten().numpy()
    smallest = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    delta[delta.abs() < float(smallest)] = 0


def drop_values(delta: Tensor, density: float, seed: str) -> None:
    """Keep each value with the probability `density`, divided by it; else set it to 0. In place.

    DARE, eq. 2 and 3 of arXiv 2311.03099 with p = 1 − density. Equal seeds drop the same places.
    """
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    delta *= torch.rand(delta.shape, generator=generator) < density
    delta /= density
