"""results.json: what a sweep found, as dataclasses that are written once and read back by whoever shows them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qhybrid.disk import write_atomically
from qhybrid.errors import SweepError

FORMAT_VERSION = 1
RESULTS = "results.json"

LOWER_IS_BETTER = frozenset({"loss"})  # of all metrics
RunStatus = Literal["finished", "pruned", "diverged"]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95% interval, from the bootstrap over seeds and held-out rows."""

    __pydantic_config__ = _STRICT

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Of a difference: whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class RunResult:
    """One run of an arm: at one learning rate, from one seed."""

    __pydantic_config__ = _STRICT

    name: str  # its folder below runs/, "uniform/lr-0.001-seed-0"
    arm: str
    learning_rate: float
    seed: int
    phase: Literal["search", "final"]  # what it was started for
    counts: bool  # among the seeds at the best rate, which the arm's figures are of
    status: RunStatus
    step: int  # optimizer steps taken
    total_steps: int
    metrics: dict[str, float]  # on the held-out rows; empty unless finished
    seconds: float  # of the optimizer steps, and of finding ranks from data before them
    other_seconds: float  # of the process beside them: start, loading, evaluation, saving
    peak_bytes: int | None  # of the process in training, or of the GPU's memory; None unless finished
    note: str = ""  # why it was pruned, or what diverged


@dataclass(frozen=True)
class ModuleRank:
    """The rank of one module."""

    __pydantic_config__ = _STRICT

    layer: int
    target: str  # "q_proj"
    kind: str
    rank: int


@dataclass(frozen=True)
class ArmResult:
    """One arm: what it is, and its figures at its best learning rate."""

    __pydantic_config__ = _STRICT

    name: str
    description: str  # one line: "lora, rank 4 everywhere"
    is_control: bool
    status: RunStatus  # pruned or diverged: no learning rate was left, so it has no figures
    parameters: int  # of the adapter at the end; the mean where runs differ
    trained_parameters: int  # in training; AdaLoRA at its initial rank
    mean_rank: float  # as planned for the end, weighted by the modules' sizes
    ranks: tuple[ModuleRank, ...]  # at the end of the run from the first seed; as planned where there is none
    best_learning_rate: float | None
    is_best_at_edge: bool  # no rate was tried beyond it, so it may not be the best
    seeds: tuple[int, ...]  # that finished at the best rate
    metrics: dict[str, Estimate]
    differences: dict[str, Estimate]  # to the control, in pairs of one seed and one row; where there are any
    seconds: float | None  # as in `RunResult`, the mean
    peak_bytes: int | None  # the largest of its runs
    is_on_front: bool  # no other arm is at least as good in quality, memory and time, and better in one


@dataclass(frozen=True)
class SweepResults:
    """A whole sweep. Arms are in the order in which the recipe names them, runs in that of their start."""

    __pydantic_config__ = _STRICT

    recipe: str  # the name of the recipe's file
    model: str
    device: Literal["cpu", "cuda"]
    control: str
    parameters: int  # of each arm at the end, within the rank of one module
    metrics: tuple[str, ...]  # the first one chose the learning rates
    learning_rates: tuple[float, ...]
    search_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    num_rows: int  # held out
    jobs: int  # runs at a time, at most; above 1 they took each other's time
    threads: int  # of each run
    arms: tuple[ArmResult, ...]
    runs: tuple[RunResult, ...]
    notes: tuple[str, ...]  # what a reader must know
    versions: dict[str, str]
    date: str  # ISO 8601

    def arm(self, name: str) -> ArmResult:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def best_first(self) -> tuple[ArmResult, ...]:
        """The arms by the first metric; those without figures come last."""
        first = self.metrics[0]
        sign = 1 if first in LOWER_IS_BETTER else -1
        measured = [arm for arm in self.arms if first in arm.metrics]
        gone = [arm for arm in self.arms if first not in arm.metrics]
        return (*sorted(measured, key=lambda arm: sign * arm.metrics[first].mean), *gone)

    def runs_of(self, arm: str) -> tuple[RunResult, ...]:
        """All runs of an arm."""
        return tuple(run for run in self.runs if run.arm == arm)


_CONTENT = TypeAdapter(SweepResults)


def write_results(results: SweepResults, folder: Path) -> Path:
    """Write results.json into a sweep's folder, in one step."""
    content: dict[str, Any] = {"format_version": FORMAT_VERSION, **dataclasses.asdict(results)}
    file = folder / RESULTS
    write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return file


def read_results(folder: Path) -> SweepResults:
    """Read what `write_results` wrote.

    Args:
        folder: of a sweep, or the file itself.

    Raises:
        SweepError: there is none, it is of another format version, or not what a sweep writes.
    """
    file = folder / RESULTS if folder.is_dir() else folder
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.pop("format_version")
    except FileNotFoundError:
        raise SweepError(
            f"there is no {file}", hint="a sweep writes it when all its runs have ended: start it again to go on"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SweepError(f"not the results of a sweep: {error}", where=str(file)) from None
    if version != FORMAT_VERSION:
        raise SweepError(f"format version {version} is not {FORMAT_VERSION}", where=str(file))
    try:
        return _CONTENT.validate_python(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise SweepError(f"not the results of a sweep: {where}: {fault['msg']}", where=str(file)) from None
