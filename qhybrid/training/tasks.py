"""Several tasks on one base model in one process: by turns a step of each, and a run folder for each."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from qhybrid.base.locate import model_folder
from qhybrid.base.share import share_weights
from qhybrid.errors import QhybridError
from qhybrid.planner.plan import Plan
from qhybrid.planner.tasks import task_override
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.tasks import task_recipes
from qhybrid.training.callbacks.turns import TakeTurns
from qhybrid.training.checkpoint import require_space
from qhybrid.training.claim import claim
from qhybrid.training.coroutine import Coroutine
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
from qhybrid.training.process_state import ProcessState
from qhybrid.training.run import Run, begin
from qhybrid.training.session import (
    BaseFacts,
    Inputs,
    Prepared,
    Session,
    SftResult,
    adapter_info,
    base_facts,
    load_model,
    read_inputs,
    write_beginning,
)
from qhybrid.training.signals import Interrupted, StopSignals
from qhybrid.training.summary import announce, announce_model


def train_tasks(
    loaded: LoadedRecipe,
    recipe: Recipe,
    signals: StopSignals,
    *,
    resume: bool,
    overwrite: bool,
    console: Console,
) -> SftResult:
    """Train an adapter for each task of the recipe: each the very one that a run of its own would give.

    Args:
        loaded: the recipe as it was read.
        recipe: the same, settled.
        resume, overwrite, console: as for `run_sft`.

    Raises:
        QhybridError: as `run_sft`. The other tasks have saved what they have before it is raised.
    """
    preflight(recipe, base_folder=loaded.folder, resume=resume, overwrite=overwrite)
    before = Run(Path(recipe.output_dir)).status if resume else None
    finished = _finished(recipe) if resume else {}
    if before and before["status"] == "finished":
        console.print(f"{recipe.output_dir} holds the finished run of this recipe; nothing to do", highlight=False)
        return SftResult(Run(Path(recipe.output_dir)), before["figures"], finished)
    hardware = hardware_of(recipe)
    earlier = earlier_caps(recipe) if resume else None
    recipe, plan = plan_early(recipe, hardware, earlier)
    base = model_folder(recipe.model)
    date = (before or {}).get("date") or datetime.date.today().isoformat()
    inputs = {name: read_inputs(own, base, loaded.folder, date) for name, own in task_recipes(recipe).items()}
    spec = next(iter(inputs.values())).spec
    longest = {name: each.data.longest for name, each in inputs.items()}
    if plan is None:
        limits = {name: own.training.max_length for name, own in task_recipes(recipe).items()}
        unlimited = {name: longest[name] if limit is None else None for name, limit in limits.items()}
        recipe, plan = plan_run(recipe, spec, hardware, longest=unlimited, earlier=earlier)
    expected = expect(recipe, spec, hardware, longest, plan.caps)
    prepared = {name: _prepare(own, inputs[name], hardware) for name, own in task_recipes(recipe).items()}
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(claim(recipe, resume=resume, overwrite=overwrite))
        require_space(run.folder, sum(checkpoint_bytes(each.recipe, each.layout) for each in prepared.values()))
        facts = base_facts(recipe, base, run)
        begin(run, recipe, "+".join(each.data.fingerprint for each in inputs.values()), facts.files, date)
        write_plan(run, plan, expected)
        events = EventLog(run.events_file)
        stack.callback(events.close)
        announce_model(console, recipe)
        left = {name: each for name, each in prepared.items() if name not in finished}
        tasks = _open(stack, recipe, left, run, facts, date, expected, signals, console, resume)
        notice = limit_vram(recipe.memory.vram)
        for line in (*plan_lines(plan), *([f"note: {notice}"] if notice else [])):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        try:
            _build(tasks, recipe)
            with signals.asking_politely():
                results = finished | _train(tasks, signals, events)
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


def _open(
    stack: contextlib.ExitStack,
    recipe: Recipe,
    prepared: Mapping[str, Prepared],
    whole: Run,
    facts: BaseFacts,
    date: str,
    expected: Plan,
    signals: StopSignals,
    console: Console,
    resume: bool,
) -> list[_Task]:
    """Claim the folder of each task, write what is known, and tell it."""
    weights = {task.name: task.weight for task in recipe.tasks}
    tasks = []
    for name, own in prepared.items():
        run = stack.enter_context(claim(own.recipe, resume=resume, overwrite=False))
        run = dataclasses.replace(run, whole=whole.folder)
        write_beginning(run, own, facts, date)
        named = NamedConsole(console, name)
        announce(named, own.recipe, own.layout, own.inputs.data, run)
        task = _Task(name, weights[name])
        task.session = Session(
            own,
            run,
            adapter_info(own, facts, date),
            named,
            signals,
            expected=expected,
            as_override=lambda word, name=name: task_override(recipe, name, word),
            clock=task.loop.seconds,
        )
        stack.callback(task.session.close)
        for note in run.notes:
            task.session.say(f"note: {note}")
        tasks.append(task)
    return tasks


class _Task:
    """A session that goes on in turns."""

    session: Session

    def __init__(self, name: str, weight: float) -> None:
        self.name, self.weight = name, weight
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.loop = Coroutine(lambda: self._train(device))
        self._state = ProcessState()
        self._has_stepped = False

    @property
    def step(self) -> int:
        """Optimizer steps taken, in earlier processes too."""
        return self.session.trainer.state.global_step

    @property
    def is_done(self) -> bool:
        """Whether it was trained to its end."""
        return self.loop.has_ended and not self.loop.was_closed and not self.session.trainer.was_stopped

    def build(self, model: PreTrainedModel) -> None:
        """Make the trainer, on the weights of `model`."""
        with self._state.in_place():
            self.session.build(share_weights(model), TakeTurns(self.loop))

    def advance(self) -> None:
        """Begin; or take a step, after what follows from the one before."""
        before = self.step
        with self._state.in_place():
            self.loop.advance()
        self._has_stepped |= self.step > before

    def stop(self) -> None:
        """Once asked to stop: save. Before the first step of this process there is nothing to save."""
        if not self._has_stepped:
            self.close()
        while not self.loop.has_ended:
            self.advance()

    def close(self) -> None:
        """End it as it is."""
        with self._state.in_place():
            self.loop.close()

    def finish(self) -> SftResult:
        """Save the adapter."""
        with self._state.in_place():
            figures = self.session.finish()
        self.session.run.write_status("finished", figures=figures)
        return SftResult(self.session.run, figures)

    def _train(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own
        self.session.train()


def _build(tasks: Sequence[_Task], recipe: Recipe) -> None:
    """Make the trainers on one model, of which nothing but the weights stays."""
    model = load_model(recipe)
    for task in tasks:
        task.build(model)


def due(steps: int, weight: float) -> float:
    """When a task's next step is due: its middle, at `weight` steps in a unit of time. The earliest goes first.

    That is Webster's method of apportionment. It follows from the steps taken alone, so that the order after a
    resume is what it would have been.
    """
    return (steps + 0.5) / weight


def _train(tasks: Sequence[_Task], signals: StopSignals, events: EventLog) -> dict[str, SftResult]:
    """By turns a step of each task, until all are done, one fails, or a signal comes."""
    going, results = list(tasks), {}

    def settle(task: _Task) -> None:
        if task.loop.has_ended:
            going.remove(task)
        if task.is_done:
            results[task.name] = task.finish()

    at = None
    try:
        for at in tasks:  # to where the first step begins; all are there before any takes it
            at.advance()
            settle(at)
        while going and signals.received is None:
            at = min(going, key=lambda task: due(task.step, task.weight))
            at.advance()
            events.write("turn", task=at.name, step=at.step)
            settle(at)
        for at in list(going):  # a signal came
            at.stop()
            settle(at)
    except BaseException as error:
        assert at is not None
        told = _stop_all(error, at, going, signals)
        if told is error:
            raise
        raise told from None
    finally:
        for task in going:
            task.close()
    if signals.received is not None and len(results) < len(tasks):
        for task in tasks:
            if task.name not in results:
                task.session.stopped(Interrupted(signals.received))
        raise Interrupted(signals.received)
    return results


def _stop_all(error: BaseException, failed: _Task, going: list[_Task], signals: StopSignals) -> BaseException:
    """Write down what ended a task, and save the others. Returns the error to raise."""
    told = failed.session.stopped(error)
    if isinstance(told, QhybridError) and told.where is None:
        told.where = f"task {failed.name}"
    signals.ask()
    assert signals.received is not None
    for task in [task for task in going if task is not failed]:
        with contextlib.suppress(Exception):  # of several errors the first is told
            if not isinstance(error, KeyboardInterrupt):  # the second one: it must end at once
                task.stop()
            if task.is_done:
                task.finish()
                continue
        task.session.stopped(Interrupted(signals.received))
    return told
