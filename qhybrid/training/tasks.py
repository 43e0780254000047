"""Several tasks on one base model in one process: by turns a step of each, and a run folder for each."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.concatenate import concatenate
from qhybrid.architecture.growth import largest_layout
from qhybrid.architecture.layout import Layout
from qhybrid.base.load import load_base, resolve_device
from qhybrid.base.locate import model_folder
from qhybrid.disk import write_atomically
from qhybrid.planner.plan import Plan
from qhybrid.planner.tasks import task_override
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.tasks import FOLDER, SHARED, adapter_recipes, of_task, task_recipes
from qhybrid.training.checkpoint import require_space
from qhybrid.training.claim import claim
from qhybrid.training.display import NamedConsole
from qhybrid.training.events import EventLog
from qhybrid.training.memory import hardware_of, limit_vram
from qhybrid.training.planning import (
    Hardware,
    checkpoint_bytes,
    earlier_caps,
    expect,
    plan_as_it_is,
    plan_early,
    plan_lines,
    plan_run,
    write_plan,
)
from qhybrid.training.preflight import preflight
from qhybrid.training.run import Run, begin
from qhybrid.training.session import (
    Inputs,
    Prepared,
    Session,
    SftResult,
    adapter_info,
    base_facts,
    prepared_for,
    read_inputs,
    write_beginning,
)
from qhybrid.training.shared import SharedAdapter, SharedSession, Together
from qhybrid.training.signals import StopSignals
from qhybrid.training.summary import announce, announce_model
from qhybrid.training.turns import Task, stop_others, take_turns
from qhybrid.units import format_count


def train_tasks(
    loaded: LoadedRecipe,
    recipe: Recipe,
    signals: StopSignals,
    *,
    resume: bool,
    overwrite: bool,
    console: Console,
    today: str | None,
) -> SftResult:
    """Train an adapter for each task of the recipe.

    Unless they share one, each is the very adapter that a run of its own would give.

    Args:
        loaded: the recipe as it was read.
        recipe: the same, settled.
        resume, overwrite, console: as for `run_sft`.
        today: its `date`.

    Raises:
        QhybridError: as `run_sft`. The other tasks have saved what they have before it is raised.
    """
    preflight(recipe, base_folder=loaded.folder, resume=resume, overwrite=overwrite)
    before = Run(Path(recipe.output_dir)).status if resume else None
    if before and before["status"] == "finished":
        console.print(f"{recipe.output_dir} holds the finished run of this recipe; nothing to do", highlight=False)
        return SftResult(Run(Path(recipe.output_dir)), before["figures"], _finished(recipe))
    planned = _plan(loaded, recipe, (before or {}).get("date") or today, resume)
    recipe = planned.recipe
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(claim(recipe, resume=resume, overwrite=overwrite))
        finished = _finished(recipe) if resume else {}
        if recipe.shared is not None:  # then none is finished before all are
            for result in finished.values():
                result.run.write_status("interrupted")
            finished = {}
        runs = {
            name: _claimed(stack, own, run, resume=resume, is_common=recipe.shared is not None)
            for name, own in task_recipes(recipe).items()
            if name not in finished
        }
        events = EventLog(run.events_file)
        stack.callback(events.close)
        tasks = _open(stack, planned, run, runs, signals, console)
        for line in (*plan_lines(planned.plan), *_notes(recipe, run)):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        try:
            results = dict(finished)
            if tasks:  # else it was stopped after the last one had finished
                _build(tasks, recipe, signals)
                with signals.asking_politely():
                    results |= take_turns(tasks, signals, events, is_common=recipe.shared is not None)
        except BaseException as error:
            name = type(error).__name__
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                events.write(status, error=name, message=str(error))
                run.write_status(status, error=name)
            raise
        results = {task.name: results[task.name] for task in recipe.tasks}
        figures = {"tasks": {name: result.figures for name, result in results.items()}}
        events.write("end", **figures)
        run.write_status("finished", figures=figures)
    return SftResult(run, figures, results)


@dataclass(frozen=True)
class _Planned:
    """All that is known before a folder is claimed."""

    recipe: Recipe
    plan: Plan
    expected: Plan  # for the data at hand
    layouts: Mapping[str, Layout]  # of each task and, as SHARED, of what they share
    prepared: Mapping[str, Prepared]
    base: Path
    date: str

    @property
    def fingerprint(self) -> str:
        """Of the data of all tasks."""
        return "+".join(own.inputs.data.fingerprint for own in self.prepared.values())


def _plan(loaded: LoadedRecipe, recipe: Recipe, date: str | None, resume: bool) -> _Planned:
    hardware = hardware_of(recipe)
    earlier = earlier_caps(recipe) if resume else None
    recipe, plan = plan_early(recipe, hardware, earlier)
    base = model_folder(recipe.model)
    date = date or datetime.date.today().isoformat()
    inputs = {}
    for name, own in task_recipes(recipe).items():
        with of_task(name):
            inputs[name] = read_inputs(own, base, loaded.folder, date)
    spec = next(iter(inputs.values())).spec
    longest = {name: each.data.longest for name, each in inputs.items()}
    if plan is None:
        limits = {name: own.training.max_length for name, own in task_recipes(recipe).items()}
        unlimited = {name: longest[name] if limit is None else None for name, limit in limits.items()}
        recipe, plan = plan_run(recipe, spec, hardware, longest=unlimited, earlier=earlier)
    return _Planned(
        recipe,
        plan,
        expect(recipe, spec, hardware, longest, plan.caps),
        {name: build_layout(part, spec) for name, part in adapter_recipes(recipe).items()},
        {name: _prepare(own, inputs[name], hardware) for name, own in task_recipes(recipe).items()},
        base,
        date,
    )


def _prepare(recipe: Recipe, inputs: Inputs, hardware: Hardware) -> Prepared:
    """With the plans of this task alone, for its own folder; whether all fit is planned for all."""
    longest = inputs.data.longest if recipe.training.max_length is None else None
    plan = plan_as_it_is(recipe, inputs.spec, hardware, longest=longest)
    return Prepared.of(recipe, inputs, plan, expect(recipe, inputs.spec, hardware, inputs.data.longest, ()))


def _finished(recipe: Recipe) -> dict[str, SftResult]:
    """The tasks whose adapters are there already."""
    found = {}
    for name, own in task_recipes(recipe).items():
        run = Run(Path(own.output_dir))
        status = run.status
        if status is not None and status["status"] == "finished":
            found[name] = SftResult(run, status["figures"])
    return found


def _claimed(stack: contextlib.ExitStack, recipe: Recipe, whole: Run, *, resume: bool, is_common: bool) -> Run:
    """The run folder of a task, below that of all, which was claimed before."""
    run = stack.enter_context(claim(recipe, resume=resume, overwrite=False))
    own = dataclasses.replace(run, whole=whole.folder, has_own_checkpoints=not is_common)
    if is_common and whole.resume_from is not None:
        own = dataclasses.replace(own, resume_from=whole.resume_from / FOLDER / run.folder.name)
    return own


def _open(
    stack: contextlib.ExitStack,
    planned: _Planned,
    whole: Run,
    runs: Mapping[str, Run],
    signals: StopSignals,
    console: Console,
) -> list[Task]:
    """Write what is known before training into the folder of all and of each task, and tell it."""
    recipe, layouts = planned.recipe, planned.layouts
    parts = adapter_recipes(recipe).items()
    largest = {name: largest_layout(part, layouts[name]) for name, part in parts}
    require_space(whole.folder, sum(checkpoint_bytes(part, largest[name]) for name, part in parts))
    resumed = next((run for run in runs.values() if run.resume_from is not None), whole)
    facts = base_facts(recipe, planned.base, resumed)
    begin(whole, recipe, planned.fingerprint, facts.files, planned.date)
    write_plan(whole, planned.plan, planned.expected)
    announce_model(console, recipe)
    common = {}
    if recipe.shared is not None:
        shared = SharedAdapter(layouts[SHARED], recipe.training.seed)
        common = {"shared": shared, "together": Together(whole.checkpoints, recipe)}
    weights = {task.name: task.weight for task in recipe.tasks}
    tasks = []
    for name, run in runs.items():
        own = prepared_for(planned.prepared[name], run)
        write_beginning(run, own, facts, planned.date)
        if recipe.shared is not None:
            write_atomically(run.layout_file, concatenate(layouts[SHARED], own.layout).to_json())
        task = Task(name, weights[name])
        named = NamedConsole(console, name)
        announce(named, own.recipe, own.layout, own.inputs.data, run)
        task.session = (SharedSession if common else Session)(
            own,
            run,
            adapter_info(own, facts, planned.date),
            named,
            signals,
            expected=planned.expected,
            as_override=lambda word, name=name: task_override(recipe, name, word),
            clock=task.loop.seconds,
            **common,
        )
        stack.callback(task.session.close)
        for note in run.notes:
            task.session.say(f"note: {note}")
        tasks.append(task)
    if common:
        common["together"].members = tasks
        console.print(_budget(layouts), highlight=False, soft_wrap=True)
    return tasks


def _budget(layouts: Mapping[str, Layout]) -> str:
    """What a shared adapter saves, in a line."""
    parts = {name: layout.num_parameters for name, layout in layouts.items()}
    alone = sum(
        concatenate(layouts[SHARED], own).num_parameters for name, own in layouts.items() if name != SHARED
    )
    shown = ", ".join(f"{name} {format_count(size)}" for name, size in parts.items())
    whole = format_count(sum(parts.values()))
    return f"shared   {whole} parameters: {shown}; {format_count(alone)} for the same ranks without sharing"


def _notes(recipe: Recipe, run: Run) -> list[str]:
    notice = limit_vram(recipe.memory.vram)
    return [f"note: {note}" for note in (*([notice] if notice else []), *run.notes)]


def _build(tasks: list[Task], recipe: Recipe, signals: StopSignals) -> None:
    """Make the trainers on one model, of which nothing but the weights stays."""
    device = resolve_device("cpu" if recipe.training.use_cpu else None)
    at = tasks[0]
    try:
        model = load_base(recipe.model, recipe.quantization, device=device)
        for at in tasks:
            with of_task(at.name):
                at.build(model)
    except BaseException as error:
        told = at.session.stopped(error)
        stop_others([task for task in tasks if task is not at], signals, may_save=False)
        if told is error:
            raise
        raise told from None
