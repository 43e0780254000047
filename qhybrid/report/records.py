"""The records of a run's files and of its event log that a report reads, as far as it reads them."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict

from qhybrid.planner.plan import RankCap


class Record(BaseModel):
    """Base of what is read: fields that are not known here are passed over, numbers may be written as text."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Step(Record):
    """An optimizer step, as `training.callbacks.record` writes it."""

    step: int
    loss: float
    grad_norm: float = math.nan
    learning_rates: dict[str, float] = {}
    tokens: int = 0
    seconds: float = 0.0
    memory: dict[str, int] = {}


class Allocation(Record):
    """What AdaLoRA left of the ranks of one band, from `training.callbacks.allocate`."""

    step: int
    band: str
    budget: int
    live_ranks: dict[str, int]


class Schedule(Record):
    """The schedule of one AdaLoRA band."""

    band: str
    total_steps: int
    warmup_steps: int
    final_steps: int
    interval: int
    init_budget: int
    target_budget: int


class ModuleSpectrum(Record):
    """The singular values of a module's s·B·A, and what they say; of DoRA what is inside the norm."""

    rank: int
    live_rank: int
    norm: float
    energy_rank_99: int
    effective_rank: float
    singular_values: tuple[float, ...]


class Spectra(Record):
    """A measurement of `training.callbacks.monitor`."""

    step: int
    modules: dict[str, ModuleSpectrum]


class Importance(Record):
    """A running average of every module's importance, from `training.callbacks.monitor`."""

    step: int
    modules: dict[str, float]


class Growth(Record):
    """A module that a stage expanded."""

    before: int
    after: int


class StageChange(Record):
    """What a stage did after a step, from `training.callbacks.stages`."""

    step: int
    stage: str
    passed_over: bool
    expanded: dict[str, Growth]
    froze: list[str]
    unfroze: list[str]
    num_parameters_before: int
    num_parameters: int


class PlanFacts(Record):
    """plan.json, as `planner.plan` writes it; sizes in bytes."""

    model: str = ""
    device: str
    needed_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    host_bytes: int
    download_bytes: int
    num_trained_parameters: int
    peak_moment: str
    components: dict[str, int]
    moments: dict[str, int]
    budget_bytes: int | None = None
    budget_source: str = ""
    rank_caps: list[RankCap] = []
    for_this_data: PlanFacts | None = None

    @property
    def counts(self) -> str:
        """The name of what is measured of that which `needed_bytes` counts."""
        return "process_bytes" if self.device == "cpu" else "cuda_used_bytes"


class SourceFacts(Record):
    """One source of audit.json, as `data.audit` writes it."""

    path: str
    format: str
    rows_in: int
    kept: int
    repaired: int
    dropped: int
    duplicates: int
    truncated_rows: int
    used_rows: int
    share: float
    tokens: dict[str, float]
    dropped_by_reason: dict[str, dict[str, Any]] = {}
    repaired_by_reason: dict[str, dict[str, Any]] = {}


class AuditFacts(Record):
    """audit.json."""

    sources: list[SourceFacts]
    eval_sources: list[SourceFacts]
    totals: dict[str, int]
    warnings: list[str]
