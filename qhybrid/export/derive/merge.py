"""Adapters of one base model merged into one adapter folder, with a record of how and how exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qhybrid.adapters.bases import require_one_base
from qhybrid.adapters.folder import read_plain
from qhybrid.export.derive.combine import CombinedModule, CombineSettings, combine, overall_error
from qhybrid.export.derive.derived import common_info, name_of, stored_size, write_derived
from qhybrid.export.output import require_free

BAND, RECORD = "merged", "merge.json"


@dataclass(frozen=True)
class Merge:
    """What was merged, and what came of it."""

    modules: tuple[CombinedModule, ...]
    left_out: tuple[str, ...]  # modules in which nothing is left
    notes: tuple[str, ...]
    num_bytes: int  # of the weights file
    num_parameters: int

    @property
    def error(self) -> float:
        """The relative Frobenius error over all modules."""
        return overall_error([(module.norm, module.error) for module in self.modules])


def merge(
    out: Path,
    sources: Sequence[tuple[Path, float]],
    settings: CombineSettings,
    *,
    same_base: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merge:
    """Combine the adapters in the folders `sources`, each with its weight, and write the result to `out`.

    Raises:
        AdapterError: a source that cannot be read, or cannot be combined with the others.
        ExportError: `out` is taken or no usable name, or a weight that is 0 or not finite.
        ModelError: a file of a source is a link to another place.
        OSError: the disk is full or fails. Nothing is left behind.
    """
    require_free(out)
    adapters = [read_plain(folder) for folder, _ in sources]
    notes = require_one_base(adapters, same_base=same_base)
    notes += [
        f"{adapter.source} is PiSSA; what is merged is its change of the whole base, of twice the rank"
        for adapter in adapters
        if adapter.principal_parts
    ]
    info, differences = common_info(adapters)
    weights = [weight for _, weight in sources]
    found = combine(list(zip(adapters, weights, strict=True)), settings, progress)
    kept = {combined.module.module for combined in found}
    named = dict.fromkeys(module.module for adapter in adapters for module in adapter)
    left_out = tuple(name for name in named if name not in kept)
    record: dict[str, Any] = {
        "method": settings.method,
        **{key: value for key, value in dataclasses.asdict(settings).items() if value is not None},
        "sources": [
            {"name": name_of(adapter), "weight": weight} for adapter, weight in zip(adapters, weights, strict=True)
        ],
        "error": overall_error([(module.norm, module.error) for module in found]),
        "modules": [
            {"module": c.module.module, "rank": c.module.rank, "norm": c.norm, "error": c.error} for c in found
        ],
        "left_out": list(left_out),
    }
    write_derived(
        out,
        [combined.module for combined in found],
        dataclasses.replace(info, adapter_dtype="float32"),
        adapters,
        band=BAND,
        record_file=RECORD,
        record=record,
    )
    size = stored_size(out)
    return Merge(tuple(found), left_out, (*notes, *differences), size.file, size.values)
