"""Several adapters into one, module by module, on ΔW = s·B·A: any ranks, alphas, bands and targets.

cat              A = [A_i], B = [w_i·s_i·B_i]: the weighted sum exactly; ranks add up
svd, linear      the weighted sum, at a lower rank: to a share of energy, or at the sources' largest rank
ties             each ΔW_i keeps its largest values; where signs differ, the heavier sign decides, and the mean of
                 the weighted values that agree with it is taken (Yadav et al., arXiv 2306.01708)
dare_linear      values are dropped at random and the rest scaled up, then summed (Yu et al., arXiv 2311.03099)
dare_ties        dropped so, then signs as in ties
magnitude_prune  each ΔW_i keeps its largest values, then summed
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qhybrid.adapters.plain import PlainAdapter, PlainModule, require_untouched_base
from qhybrid.adapters.spectrum import Factored, factor
from qhybrid.errors import AdapterError

CombineMethod = Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[str, ...] = get_args(CombineMethod)
DEFAULT_ENERGY = 0.99


@dataclass(frozen=True)
class CombineSettings:
    """How to combine.

    Attributes:
        rank: of every module of the result, where it has so much. None: by `energy`, or the sources' largest.
        energy: the share of ||ΔW||² to keep in each module.
        density: the share of each ΔW_i's values that ties, dare and magnitude_prune keep.
        seed: of what dare drops.
    """

    method: CombineMethod
    rank: int | None = None
    energy: float | None = None
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method == "cat" and (self.rank is not None or self.energy is not None):
            raise AdapterError("cat is exact and takes no rank and no energy", hint="--method svd takes them")
        if self.rank is not None and self.energy is not None:
            raise AdapterError("give a rank or an energy, not both")


@dataclass(frozen=True)
class CombinedModule:
    """One module of the result, and ||ΔW − s·B·A|| / ||ΔW|| of what the method asks for."""

    module: PlainModule
    error: float


def combine(
    sources: Sequence[tuple[PlainAdapter, float]],
    settings: CombineSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CombinedModule]:
    """Combine adapters of one base, each with its weight; modules in the order in which they are met.

    Raises:
        AdapterError: a DoRA band, a PiSSA adapter, or modules of other shapes.
    """
    assert sources
    for adapter, _ in sources:
        _require_sums(adapter)
    places: dict[str, list[tuple[int, float, PlainModule]]] = {}
    for index, (adapter, weight) in enumerate(sources):
        for module in adapter:
            places.setdefault(module.module, []).append((index, weight, module))
    found = []
    for done, (name, parts) in enumerate(places.items()):
        if len({part.shape for _, _, part in parts}) > 1:
            shapes = " and ".join(sorted({f"{part.shape[0]}×{part.shape[1]}" for _, _, part in parts}))
            raise AdapterError(f"{name} is {shapes} in different adapters", hint="they belong to different bases")
        found.append(_combined(parts, settings))
        progress(done + 1, len(places))
    return found


def _require_sums(adapter: PlainAdapter) -> None:
    if adapter.dora:
        raise AdapterError(
            f"{adapter.source} has DoRA modules ({adapter.dora[0].module}, for example), whose change is no sum",
            hint="merge them into the model (qhybrid export ADAPTER --to merged), or LoRA of them with an error "
            "that is printed (qhybrid export --to peft --dora-to-lora)",
        )
    require_untouched_base(adapter)


def _combined(parts: list[tuple[int, float, PlainModule]], settings: CombineSettings) -> CombinedModule:
    like = parts[0][2]
    if settings.method in ("cat", "svd", "linear"):
        a = torch.cat([m.a.double() for _, _, m in parts])
        b = torch.cat([weight * m.scaling * m.b.double() for _, weight, m in parts], dim=1)
        if settings.method == "cat":
            return CombinedModule(PlainModule(like.module, a.float(), b.float(), 1.0), 0.0)
        exact = factor(b, a, 1.0)
    else:
        exact = _factor_dense(_dense(parts, settings))
    largest = max(m.rank for _, _, m in parts)
    rank = _rank(exact, settings, largest)
    return CombinedModule(exact.truncated(rank, like.module), exact.error(rank))


def _rank(exact: Factored, settings: CombineSettings, largest: int) -> int:
    if settings.rank is not None:
        return max(1, min(settings.rank, len(exact.sigma)))
    if settings.energy is not None or settings.method == "svd":
        return max(1, exact.energy_rank(settings.energy or DEFAULT_ENERGY))
    return min(largest, len(exact.sigma))


def _dense(parts: list[tuple[int, float, PlainModule]], settings: CombineSettings) -> Tensor:
    """What the method makes of the ΔW_i (out, in), in fp32."""
    deltas, weights = [], []
    for index, weight, module in parts:
        delta = module.delta()
        if settings.method.startswith("dare"):
            delta = _dropped(delta, settings, f"{index}:{module.module}")
        else:
            delta = _trimmed(delta, settings.density)
        deltas.append(delta)
        weights.append(weight)
    weighted = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    whole = torch.stack(weighted).sum(0)
    if not settings.method.endswith("ties"):
        return whole
    elected = whole.sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for value in weighted:
        agrees = (value.sign() == elected) & (value != 0)
        total += torch.where(agrees, value, 0)
        count += agrees
    return total / count.clamp_min(1)


def _trimmed(delta: Tensor, density: float) -> Tensor:
    """The largest values, so many of them; the others are zero."""
    count = max(1, round(density * delta.numel()))
    kept = torch.zeros_like(delta).flatten()
    places = delta.abs().flatten().topk(count).indices
    kept[places] = delta.flatten()[places]
    return kept.view_as(delta)


def _dropped(delta: Tensor, settings: CombineSettings, name: str) -> Tensor:
    """Values kept with the probability `density` and divided by it; the same for the same seed and name."""
    digest = hashlib.sha256(f"{settings.seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return delta * (torch.rand(delta.shape, generator=generator) < settings.density) / settings.density


def _factor_dense(delta: Tensor) -> Factored:
    u, sigma, v = torch.linalg.svd(delta.double(), full_matrices=False)
    return Factored(u, sigma, v)
