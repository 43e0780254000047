"""What an adapter is made of: its bands, the rank that its modules use, and the spectrum of each change."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qhybrid.adapters.folder import layer_and_target, read_plain
from qhybrid.adapters.info import INFO, AdapterInfo, read_adapter
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.adapters.spectrum import factor_module
from qhybrid.architecture.layout import Layout
from qhybrid.errors import AdapterError
from qhybrid.export.derive.derived import stored_size

NO_BAND = "all"  # of adapters without bands, which peft's are
_DIGITS = 6  # of the singular values in JSON


@dataclass(frozen=True)
class ModuleReport:
    """One module. Of DoRA the figures are those of s·B·A, which is inside the norm; of PiSSA of s·B·A − s·B0·A0.

    Attributes:
        rank: of the matrices as stored; for AdaLoRA the initial one.
        live_rank: rank-1 terms that are not zero; for AdaLoRA those that the allocator left.
        norm: ||s·B·A||_F. largest: the largest singular value.
        energy_rank_90, energy_rank_99: the fewest singular values with that share of ||s·B·A||².
        singular_values: descending; as many as terms are live.
    """

    module: str
    layer: int
    target: str
    band: str
    kind: str
    rank: int
    live_rank: int
    parameters: int
    norm: float
    largest: float
    energy_rank_90: int
    energy_rank_99: int
    stable_rank: float
    effective_rank: float
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class BandReport:
    """The sums of a band; `norm` is over all its modules."""

    band: str
    kind: str
    layers: tuple[int, int]
    modules: int
    rank: tuple[int, int]  # the least and the largest
    rank_sum: int
    live_rank: int
    energy_rank_99: int
    parameters: int
    norm: float


@dataclass(frozen=True)
class Report:
    """An adapter: what is known of it, and its bands and modules."""

    folder: Path
    info: AdapterInfo
    is_own: bool  # qhybrid's folder, which knows how its base was loaded
    base_minus: str | None  # settings of peft's PiSSA, see PlainAdapter
    num_pissa: int  # modules that training began with a part of the weight
    num_bytes: int
    bands: tuple[BandReport, ...]
    modules: tuple[ModuleReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        info = dataclasses.asdict(self.info)
        if not self.is_own:  # peft's folders do not say how the base was loaded
            info = {key: info[key] for key in ("base_model", "base_revision", "adapter_dtype")}
        return {
            "folder": str(self.folder),
            "bytes": self.num_bytes,
            "pissa": self.base_minus or self.num_pissa or None,
            "adapter": info,
            "bands": [dataclasses.asdict(band) for band in self.bands],
            "modules": [dataclasses.asdict(module) for module in self.modules],
        }


def inspect_adapter(
    folder: Path, pattern: str | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Read an adapter and measure its modules; no base model is needed.

    Args:
        pattern: modules whose name, or a part of it between dots, matches this shell pattern; None for all.

    Raises:
        AdapterError: no adapter, a damaged one, or no module matches.
        ModelError: a file of the adapter is a link to another place.
    """
    adapter = read_plain(folder)
    is_own = (adapter.source / INFO).is_file()
    layout = read_adapter(adapter.source)[0] if is_own else None
    wanted = _wanted(adapter, layout, pattern)
    modules = []
    for done, (name, plain) in enumerate(wanted.items()):
        modules.append(_measured(name, plain, layout))
        progress(done + 1, len(wanted))
    return Report(
        folder=adapter.source,
        info=adapter.info,
        is_own=is_own,
        base_minus=adapter.base_minus,
        num_pissa=len(adapter.principal_parts),
        num_bytes=stored_size(adapter.source).file,
        bands=_bands(modules),
        modules=tuple(modules),
    )


def _wanted(adapter: PlainAdapter, layout: Layout | None, pattern: str | None) -> dict[str, PlainModule | None]:
    """The modules that match, in the order of the layers; None for one of which AdaLoRA left no rank."""
    plain = {module.module: module for module in adapter}
    names = [row.module for row in layout] if layout else sorted(plain, key=lambda name: layer_and_target(name)[0])
    found = {name: plain.get(name) for name in names if _matches(name, pattern)}
    if not found:
        raise AdapterError(
            f"no module matches {pattern!r}", hint=f"a name is {names[0]}; q_proj and layers.3 are patterns too"
        )
    return found


def _matches(name: str, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*")


def _measured(name: str, plain: PlainModule | None, layout: Layout | None) -> ModuleReport:
    layer, target = layer_and_target(name)
    row = next((row for row in layout if row.module == name), None) if layout else None
    sigma: tuple[float, ...] = ()
    figures: dict[str, Any] = {
        "norm": 0.0, "largest": 0.0, "energy_rank_90": 0, "energy_rank_99": 0, "stable_rank": 0.0,
        "effective_rank": 0.0,
    }  # fmt: skip
    live = parameters = 0
    if plain is not None:
        spectrum = factor_module(plain)
        terms = (plain.b.float().norm(dim=0) > 0) & (plain.a.float().norm(dim=1) > 0)
        live = int(terms[: plain.native.rank].sum())
        parameters = sum(part.numel() for part in (plain.a, plain.b, plain.magnitude) if part is not None)
        sigma = tuple(float(f"{value:.{_DIGITS}g}") for value in spectrum.sigma[: int(terms.sum())].tolist())
        figures = spectrum.figures()
    kind = "lora" if plain is None or plain.magnitude is None else "dora"
    return ModuleReport(
        module=name,
        layer=layer,
        target=target,
        band=row.band if row else NO_BAND,
        kind=row.kind if row else kind,
        rank=row.rank if row else plain.rank if plain else 0,
        live_rank=live,
        parameters=row.num_parameters if row else parameters,
        singular_values=sigma,
        **figures,
    )


def _bands(modules: list[ModuleReport]) -> tuple[BandReport, ...]:
    """One for each band and kind, in the order in which they appear."""
    found = []
    for band, kind in dict.fromkeys((module.band, module.kind) for module in modules):
        own = [module for module in modules if (module.band, module.kind) == (band, kind)]
        layers = [module.layer for module in own]
        ranks = [module.rank for module in own]
        found.append(
            BandReport(
                band=band,
                kind=kind,
                layers=(min(layers), max(layers)),
                modules=len(own),
                rank=(min(ranks), max(ranks)),
                rank_sum=sum(ranks),
                live_rank=sum(module.live_rank for module in own),
                energy_rank_99=sum(module.energy_rank_99 for module in own),
                parameters=sum(module.parameters for module in own),
                norm=math.hypot(*(module.norm for module in own)),
            )
        )
    return tuple(found)
