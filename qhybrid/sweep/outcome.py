"""outcome.json: how one run of a sweep ended, with the figures of each held-out row. Written last, in one step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qhybrid.architecture.layout import Layout
from qhybrid.disk import write_atomically
from qhybrid.errors import SweepError
from qhybrid.sweep.budget import parameters_at_end
from qhybrid.sweep.results import ModuleRank, RunStatus
from qhybrid.training.events import read_events
from qhybrid.training.run import Run, versions

OUTCOME = "outcome.json"
FORMAT_VERSION = 1
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class RowFigures:
    """Of each held-out row, in the order of the data; what was not asked for is empty."""

    __pydantic_config__ = _STRICT

    fingerprint: str  # of the rows' tokens and labels
    losses: tuple[float, ...]  # summed over the row's scored tokens, in nats
    tokens: tuple[int, ...]  # scored ones
    exact: tuple[bool | None, ...] = ()  # None: the row has no prompt
    expected: tuple[int, ...] = ()  # labels, as indices
    predicted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    __pydantic_config__ = _STRICT

    status: RunStatus
    step: int
    total_steps: int
    seconds: float  # of the optimizer steps, and of finding ranks from data before them
    other_seconds: float  # of the process beside them
    peak_bytes: int | None
    eval_losses: dict[int, float]  # by step, of the evaluations in training
    ranks: tuple[ModuleRank, ...] = ()  # at the end; AdaLoRA's are those it has left. Empty unless finished
    parameters: int = 0  # of the finished adapter: Σ rank·(in + out), and DoRA's magnitudes
    rows: RowFigures | None = None  # None unless finished
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)


_CONTENT = TypeAdapter(Outcome)


def outcome_of(
    run: Run,
    status: RunStatus,
    *,
    process_seconds: float,
    until: int | None = None,
    peak_bytes: int | None = None,
    rows: RowFigures | None = None,
    adapter_of_step: int | None = None,
    note: str = "",
) -> Outcome:
    """What a run's log says, as an outcome.

    Args:
        process_seconds: since its process was started.
        until: the last step that counts; all when left out.
        adapter_of_step: the step whose adapter was kept and scored; the last one when left out.
    """
    events = run.events_file
    last = {record["step"]: record for record in _logged(events, "step", until)}  # resumed runs log some twice
    evaluations = _logged(events, "evaluation", until)
    begun = _logged(events, "begin", None)
    seconds = sum(record["seconds"] for record in last.values()) + _seconds_of_ranking(events)
    layout = None
    if rows is not None:
        layout = _at_the_end(run, last[adapter_of_step or max(last)].get("live_ranks", {}))
    return Outcome(
        status=status,
        step=max(last, default=0),
        total_steps=begun[-1]["total_steps"] if begun else 0,
        seconds=round(seconds, 3),
        other_seconds=round(max(0.0, process_seconds - seconds), 3),
        peak_bytes=peak_bytes,
        # The log has NaN as text.
        eval_losses={one["step"]: one["eval_loss"] for one in evaluations if isinstance(one["eval_loss"], float)},
        ranks=tuple(ModuleRank(row.layer, row.target, row.kind, row.target_rank) for row in layout or ()),
        parameters=parameters_at_end(layout) if layout is not None else 0,
        rows=rows,
        note=note,
        versions=versions(),
    )


def _at_the_end(run: Run, live: dict[str, int]) -> Layout:
    """The run's layout with the ranks that AdaLoRA left."""
    layout = Layout.from_json(run.layout_file.read_text(encoding="utf-8"), str(run.layout_file))
    return Layout(tuple(replace(row, target_rank=live.get(row.module, row.target_rank)) for row in layout))


def _seconds_of_ranking(events: Path) -> float:
    ended = _logged(events, "ranks", None)
    if not ended:
        return 0.0
    begun = [one["time"] for one in _logged(events, "ranks_pass", None) if one["number"] == 1]
    return ended[-1]["time"] - max(time for time in begun if time <= ended[-1]["time"])  # not one that was cut off


def _logged(events: Path, event: str, until: int | None) -> list[dict[str, Any]]:
    records = read_events(events, event) if events.is_file() else []
    records = [record for record in records if event != "evaluation" or "eval_loss" in record]
    return [record for record in records if until is None or record["step"] <= until]


def write_outcome(outcome: Outcome, folder: Path) -> None:
    """Write it into the run's folder of the sweep."""
    content = {"format_version": FORMAT_VERSION, **asdict(outcome)}
    write_atomically(folder / OUTCOME, json.dumps(content) + "\n")


def read_outcome(folder: Path) -> Outcome | None:
    """How the run in this folder ended; None while it has not.

    Raises:
        SweepError: the file is damaged, or of another version.
    """
    file = folder / OUTCOME
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format_version") == FORMAT_VERSION:
            return _CONTENT.validate_python(content)
    except (OSError, ValueError, KeyError, AttributeError, ValidationError):
        pass
    raise SweepError(f"{file} is damaged", hint="remove that file: the run is then evaluated again")
