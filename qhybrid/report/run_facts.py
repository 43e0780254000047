"""What a run folder tells, read as far as it can be: a run may be going on, cut off or damaged."""

from __future__ import annotations

import errno
import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from qhybrid.adapters.info import INFO
from qhybrid.architecture.layout import Layout, first_fault
from qhybrid.errors import QhybridError, RunFolderError
from qhybrid.recipe.load import parse_recipe
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.tasks import FOLDER
from qhybrid.report.records import (
    Allocation,
    AuditFacts,
    Importance,
    PlanFacts,
    Schedule,
    Spectra,
    StageChange,
    Step,
)
from qhybrid.training.events import iterate_events
from qhybrid.training.run import Run, is_alive

_T = TypeVar("_T")


@dataclass
class EventFacts:
    """The event log. Of steps that a resumed run took again, the last account is the one that counts."""

    steps: dict[int, Step] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)  # step: figures whose names end in loss
    allocations: dict[tuple[int, str], Allocation] = field(default_factory=dict)
    schedules: dict[str, Schedule] = field(default_factory=dict)
    spectra: dict[int, Spectra] = field(default_factory=dict)
    importance: dict[int, Importance] = field(default_factory=dict)
    stages: dict[tuple[int, str], StageChange] = field(default_factory=dict)
    others: list[dict[str, Any]] = field(default_factory=list)  # what happened beside, in the log's order
    total_steps: int | None = None
    num_unreadable: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """Enter one line of the log."""
        kind = record.get("event")
        if kind == "begin":
            self._begin(int(record["step"]), int(record["total_steps"]))
            self.others.append(record)
        elif kind == "step":
            step = Step.model_validate(record)
            self.steps[step.step] = step
        elif kind == "evaluation":
            losses = {key: float(value) for key, value in record.items() if key.endswith("loss")}
            self.evaluations[int(record["step"])] = losses
        elif kind == "allocation":
            allocation = Allocation.model_validate(record)
            self.allocations[allocation.step, allocation.band] = allocation
        elif kind == "adalora_schedule":
            schedule = Schedule.model_validate(record)
            self.schedules[schedule.band] = schedule
        elif kind == "spectra":
            spectra = Spectra.model_validate(record)
            self.spectra[spectra.step] = spectra
        elif kind == "importance":
            importance = Importance.model_validate(record)
            self.importance[importance.step] = importance
        elif kind == "stage":
            change = StageChange.model_validate(record)
            self.stages[change.step, change.stage] = change
        else:
            self.others.append(record)

    def _begin(self, step: int, total_steps: int) -> None:
        """A run went on from `step`: what an earlier attempt did after it is undone."""
        self.total_steps = total_steps
        for records in (self.steps, self.evaluations, self.spectra, self.importance):
            for number in [number for number in records if number > step]:
                del records[number]
        for key in [key for key in self.allocations if key[0] > step]:
            del self.allocations[key]
        for key in [key for key in self.stages if key[0] >= step]:  # they begin again with the next step
            del self.stages[key]

    @property
    def in_order(self) -> list[Step]:
        """The steps."""
        return [self.steps[number] for number in sorted(self.steps)]

    @property
    def last_step(self) -> int:
        """The number of the last step; 0 before the first."""
        return max(self.steps, default=0)

    @property
    def last_tenth_loss(self) -> float:
        """The mean loss of the last tenth of the steps, as in the table at the end of a run."""
        steps = self.in_order
        tail = steps[-max(1, len(steps) // 10) :]
        return sum(step.loss for step in tail) / len(tail)

    def losses(self, name: str = "eval_loss") -> list[tuple[float, float]]:
        """(step, loss) of the evaluations that have a loss of this name."""
        return [(float(step), losses[name]) for step, losses in sorted(self.evaluations.items()) if name in losses]

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """The other events of some kinds."""
        return [record for record in self.others if record.get("event") in kinds]


@dataclass(frozen=True)
class RunFacts:
    """One run folder. What is None was not there, or could not be read: then `problems` says why.

    Attributes:
        status: finished, failed, interrupted, running, or "killed": running by run.json, but by no process.
        figures: of the end of a finished run.
        tasks: the names of the runs below it, for a run of several tasks.
    """

    run: Run
    status: str
    figures: Mapping[str, Any]
    versions: Mapping[str, str]
    recipe: Recipe | None
    recipe_text: str
    layout: Layout | None
    plan: PlanFacts | None
    audit: AuditFacts | None
    events: EventFacts
    tasks: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.run.folder.resolve().name

    @property
    def expected(self) -> PlanFacts | None:
        """The plan for the data that there was."""
        return self.plan and (self.plan.for_this_data or self.plan)

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes at the peak, by the names of `training.memory`; of an unfinished run as far as it got."""
        found: dict[str, int] = {}
        for step in self.events.steps.values():
            for name, size in step.memory.items():
                found[name] = max(found.get(name, 0), size)
        for name in found:
            found[name] = int(number(self.figures.get(f"peak_{name}"), found[name]))
        return found


def number(value: Any, default: float = math.nan) -> float:
    """A figure of run.json or of an event; `default` where it is missing, of another type or not finite."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return found if math.isfinite(found) else default


def read_run(folder: Path) -> RunFacts:
    """Read a run folder.

    Raises:
        RunFolderError: it is not one of qhybrid's.
    """
    run = require_run(folder)
    status = run.status or {}
    tasks = tuple(sorted(file.parent.name for file in folder.glob(f"{FOLDER}/*/run.json")))
    problems: list[str] = []

    def read(file: Path, parse: Callable[[str], _T]) -> _T | None:
        try:
            return parse(read_plain_text(file))
        except FileNotFoundError:
            if not tasks:  # each has its own
                problems.append(f"{file.name} is not there.")
        except OSError as error:
            problems.append(f"{file.name} cannot be read: {error.strerror}.")
        except ValidationError as error:
            problems.append(f"{file.name} is not as qhybrid writes it: {first_fault(error)}.")
        except (QhybridError, ValueError, RecursionError) as error:
            text = (error.message if isinstance(error, QhybridError) else str(error)).splitlines()[0]
            problems.append(f"{file.name} cannot be read: {text}.")
        return None

    recipe_text = read(run.recipe_file, str)
    figures, versions = status.get("figures"), status.get("versions", {})
    return RunFacts(
        run=run,
        status=_state(status),
        figures=figures if isinstance(figures, dict) else {},
        versions={str(name): str(version) for name, version in versions.items()},
        recipe=read(run.recipe_file, _recipe) if recipe_text is not None else None,
        recipe_text=recipe_text or "",
        layout=read(run.layout_file, lambda text: Layout.from_json(text)),
        plan=read(run.plan_file, lambda text: PlanFacts.model_validate_json(text)),
        audit=read(run.audit_file, lambda text: AuditFacts.model_validate_json(text)),
        events=_read_events(run.events_file, problems),
        tasks=tasks,
        problems=tuple(problems),
    )


def read_plain_text(file: Path) -> str:
    """The text of a file of a run folder, which others may have filled: links and pipes are not followed.

    Raises:
        OSError: it is not there, no plain file, or cannot be read. ValueError: it is not text.
    """
    require_plain(file)
    return file.read_text(encoding="utf-8")


def require_plain(file: Path) -> None:
    """Refuse a link, which could lead to any file of the reader's, and what is no file.

    Raises:
        OSError: with what it is.
    """
    if not stat.S_ISREG(file.lstat().st_mode):
        raise OSError(errno.EINVAL, "it is no plain file", str(file))


def require_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        RunFolderError: there is none of qhybrid's.
    """
    run = Run(folder)
    if run.status is None:
        raise _no_run(folder)
    return run


def _no_run(folder: Path) -> RunFolderError:
    if not folder.is_dir():
        return RunFolderError(f"there is no folder {folder}", hint="name a run folder: recipes call it output_dir")
    hint = "a run folder holds run.json; recipes call it output_dir"
    if (folder / INFO).is_file() and Run(folder.resolve().parent).status is not None:
        hint = f"it is an adapter; did you mean its run, {folder.parent}?"
    else:
        below = [run.parent for run in sorted(folder.glob("*/run.json"))]
        if below:
            hint = f"did you mean {below[0]}?"
    return RunFolderError(f"{folder} is not a run folder of qhybrid", hint=hint)


def _recipe(text: str) -> Recipe:
    return parse_recipe(text, "recipe.yaml")[0]


def _state(status: Mapping[str, Any]) -> str:
    state = str(status.get("status"))
    return "killed" if state == "running" and not is_alive(status.get("process", {})) else state


def _read_events(file: Path, problems: list[str]) -> EventFacts:
    facts = EventFacts()
    try:
        require_plain(file)
        for record in iterate_events(file):
            try:
                facts.add(record)
            except (ValueError, KeyError, TypeError, OverflowError):
                facts.num_unreadable += 1
    except FileNotFoundError:
        problems.append("There is no events.jsonl yet: nothing was trained.")
    except OSError as error:
        problems.append(f"events.jsonl cannot be read: {error.strerror}.")
    if facts.num_unreadable:
        problems.append(f"{facts.num_unreadable} lines of events.jsonl are not as qhybrid writes them.")
    return facts
