"""Modules made shorter for real: fewer rows of A and columns of B, with the error of that on s·B·A.

By energy or rank, each module becomes its best approximation; a rank never grows. By terms, the rank-1 terms
s·b_i·a_i of all modules are put in one order by their norm, and the smallest are dropped, each as a whole.
Unlike the size of single values, that does not depend on how A and B share a factor. DoRA's magnitudes stay.
PiSSA's terms nearly cancel each other, so its change of the whole base is put in singular vectors first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qhybrid.adapters.plain import PlainAdapter, PlainModule, require_untouched_base
from qhybrid.adapters.spectrum import difference, factor_module
from qhybrid.errors import AdapterError, ExportError
from qhybrid.export.derive.combine import overall_error


@dataclass(frozen=True)
class ShortenSettings:
    """How far to go; exactly one of the three.

    Attributes:
        energy: the share of each module's ||s·B·A||² to keep.
        rank: the largest rank of a module.
        prune_terms: the share of all rank-1 terms to drop.

    Raises:
        ExportError: none or several, or out of range.
    """

    energy: float | None = None
    rank: int | None = None
    prune_terms: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.energy, self.rank, self.prune_terms)) != 1:
            raise ExportError("give one of --energy, --rank and --prune-terms")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ExportError(f"the energy is a share above 0 and at most 1, not {self.energy:g}")
        if self.rank is not None and self.rank < 1:
            raise ExportError(f"a rank of {self.rank} is none: it is at least 1")
        if self.prune_terms is not None and not 0 < self.prune_terms < 1:
            raise ExportError(f"--prune-terms is a share between 0 and 1, not {self.prune_terms:g}")


@dataclass(frozen=True)
class ShortenedModule:
    """One module before and after; ranks, ||s·B·A||_F before, and the relative Frobenius error of s·B·A as stored.

    `after` is None where nothing is left of it.
    """

    before: PlainModule
    after: PlainModule | None
    norm: float
    error: float


@dataclass(frozen=True)
class Shortened:
    """A shortened adapter."""

    modules: tuple[ShortenedModule, ...]

    @property
    def kept(self) -> tuple[PlainModule, ...]:
        """What is left."""
        return tuple(module.after for module in self.modules if module.after is not None)

    @property
    def error(self) -> float:
        """The relative Frobenius error of s·B·A over all modules."""
        return overall_error([(module.norm, module.error) for module in self.modules])

    @property
    def num_bytes(self) -> int:
        """Of A, B and the magnitudes that are left."""
        return sum(
            part.numel() * part.element_size()
            for module in self.kept
            for part in (module.a, module.b, module.magnitude)
            if part is not None
        )


def shorten(
    adapter: PlainAdapter,
    settings: ShortenSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Shortened:
    """Shorten the modules of `adapter`, stored in its own dtype; the errors are those of what is stored.

    A LoRA module with s·B·A = 0 is left out. A DoRA module keeps a term of zeros beside its magnitudes.

    Raises:
        AdapterError: PiSSA of peft, nothing would be left, or values beyond what the dtype holds.
    """
    require_untouched_base(adapter)
    modules = [_in_own_terms(module) for module in adapter]
    shorter = (
        _pruned(modules, settings.prune_terms)
        if settings.prune_terms is not None
        else [_truncated(module, settings) for module in modules]
    )
    if not any(after is not None for after in shorter):
        raise AdapterError("nothing would be left of it: it changes the model nowhere")
    trained = getattr(torch, adapter.info.adapter_dtype)
    found = []
    for done, (before, after) in enumerate(zip(adapter, shorter, strict=True)):
        found.append(_measured(before, after and _as_stored(after, before, trained)))
        progress(done + 1, len(shorter))
    return Shortened(tuple(found))


def _in_own_terms(module: PlainModule) -> PlainModule:
    if not module.num_principal:
        return module
    spectrum = factor_module(module)
    return dataclasses.replace(
        spectrum.truncated(max(1, spectrum.energy_rank(1.0)), module.module), magnitude=module.magnitude
    )


def _truncated(module: PlainModule, settings: ShortenSettings) -> PlainModule | None:
    """The best approximation; the module itself where its rank would not become less."""
    spectrum = factor_module(module)
    rank = spectrum.energy_rank(1.0 if settings.energy is None else settings.energy)
    if settings.rank is not None:
        rank = min(rank, settings.rank)
    if rank == 0:
        return _without_terms(module)
    if rank >= module.rank:
        return module
    return dataclasses.replace(spectrum.truncated(rank, module.module), magnitude=module.magnitude)


def _pruned(modules: Sequence[PlainModule], share: float) -> list[PlainModule | None]:
    norms = [_term_norms(module) for module in modules]
    places = [(i, j) for i, of_module in enumerate(norms) for j in range(len(of_module))]
    in_order = torch.cat(norms).sort(stable=True)
    number = max(math.floor(share * len(places)), int((in_order.values == 0).sum()))
    dropped: dict[int, set[int]] = {}
    for place in in_order.indices[:number].tolist():
        i, j = places[place]
        dropped.setdefault(i, set()).add(j)
    return [_without(module, dropped.get(i, set())) for i, module in enumerate(modules)]


def _term_norms(module: PlainModule) -> torch.Tensor:
    """||s·b_i·a_i||_F (r,) in fp64."""
    return abs(module.scaling) * module.b.double().norm(dim=0) * module.a.double().norm(dim=1)


def _without(module: PlainModule, terms: set[int]) -> PlainModule | None:
    kept = [i for i in range(module.rank) if i not in terms]
    if not kept:
        return _without_terms(module)
    if not terms:
        return module
    return dataclasses.replace(module, a=module.a[kept].clone(), b=module.b[:, kept].clone())


def _without_terms(module: PlainModule) -> PlainModule | None:
    """None for LoRA. DoRA scales the rows of W by its magnitudes all the same: one term of zeros carries them."""
    if module.magnitude is None:
        return None
    return dataclasses.replace(module, a=module.a[:1].clone(), b=torch.zeros_like(module.b[:, :1]))


def _measured(before: PlainModule, after: PlainModule | None) -> ShortenedModule:
    norm = factor_module(before).norm
    if after is before or norm == 0:
        return ShortenedModule(before, after, norm, 0.0)
    return ShortenedModule(before, after, norm, 1.0 if after is None else difference(before, after) / norm)


def _as_stored(module: PlainModule, before: PlainModule, trained: torch.dtype) -> PlainModule:
    """A and B as wide as they were, or as trained if that is narrower: AdaLoRA's are fp32 in plain form alone."""
    a, b = (
        new.to(min(old.dtype, trained, key=lambda dtype: dtype.itemsize))
        for new, old in ((module.a, before.a), (module.b, before.b))
    )
    if a is module.a and b is module.b:
        return module
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"{module.module} gets values beyond what {str(a.dtype).removeprefix('torch.')} holds")
    return dataclasses.replace(module, a=a, b=b)
