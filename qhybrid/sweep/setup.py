"""What is settled before the first run of a sweep: arms, their plans, how many go on at a time. No torch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from qhybrid.data.readers import with_whole_paths
from qhybrid.errors import QhybridError, SweepError
from qhybrid.planner import constants
from qhybrid.planner.plan import make_plan
from qhybrid.planner.solve import with_training
from qhybrid.recipe.load import LoadedRecipe, resolve
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.sweep import SweepSection, folder_name
from qhybrid.sweep.arms import Arm, budget_of, build_arms
from qhybrid.sweep.folder import Started
from qhybrid.sweep.order import LOG, Order, Probe
from qhybrid.sweep.pool import num_at_once, num_cores, num_threads
from qhybrid.sweep.pruning import require_optuna
from qhybrid.training.preflight import check_inputs
from qhybrid.units import format_bytes

PRELOAD = "qhybrid.sweep.preload"
_WORKER = "qhybrid.sweep.worker"  # imported in the processes alone


@dataclass(frozen=True)
class RunKey:
    """One run: an arm, a learning rate, a seed."""

    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder below runs/."""
        return f"{self.arm}/{folder_name(self.learning_rate, self.seed)}"


@dataclass(frozen=True)
class Setup:
    """A sweep that can begin."""

    loaded: LoadedRecipe  # from `settled`
    arms: tuple[Arm, ...]
    parameters: int  # the budget
    needed_bytes: dict[str, int]  # by arm, of the memory that runs share
    free_bytes: int
    device: str
    at_once: int
    num_rows: int
    started: Started

    @property
    def recipe(self) -> Recipe:
        """The recipe that the arms are made of."""
        return self.loaded.recipe

    @property
    def sweep(self) -> SweepSection:
        """What is swept."""
        assert self.recipe.sweep is not None
        return self.recipe.sweep

    @property
    def search(self) -> tuple[RunKey, ...]:
        """The runs that find each arm's learning rate, the control's first."""
        return tuple(
            RunKey(arm.name, rate, seed)
            for arm in self.arms
            for rate in self.sweep.rates_of(arm.name)
            for seed in self.sweep.seeds_of_search
        )

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def settled(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe as its sweep takes it: data files named from the root, and the first seed.

    Raises:
        QhybridError: it has no sweep, or one that cannot be run.
    """
    # Not resolved: an alpha that is left out follows the ranks that each arm gives its modules.
    recipe = loaded.recipe.model_copy(update={"data": with_whole_paths(loaded.recipe.data, loaded.folder)})
    sweep = recipe.sweep
    if sweep is None:
        raise SweepError(f"{loaded.path} has no section sweep", hint="docs/sweeps.md shows one")
    if recipe.distributed.processes > 1 or recipe.distributed.zero_stage:
        raise SweepError(
            "a sweep trains every run in one process", hint="leave the section distributed out of the recipe"
        )
    growing = next((stage.name for stage in recipe.stages if stage.expand is not None), None)
    if growing is not None:
        raise SweepError(
            f"the stage {growing!r} expands modules, and the arms of a sweep have equal parameters",
            hint="leave it out: qhybrid ranks sweep RECIPE 'stages=[]'",
        )
    if sweep.prune:
        require_optuna()
    check_inputs(recipe, loaded.folder)
    # Sources are mixed, and rows held out, by the seed.
    return replace(loaded, recipe=with_training(recipe, seed=sweep.seeds[0]))


def set_up(
    loaded: LoadedRecipe,
    how: BaseContext,
    *,
    jobs: int | None,
    date: str,
    started: Started | None,
    prepare: Callable[[], None],
) -> Setup:
    """Look at model, data and memory, and settle the rest.

    Args:
        loaded: from `settled`.
        how: processes are made.
        jobs: how many runs at a time, at most; by cores and memory when left out.
        date: today, or that of the sweep's start.
        started: what the sweep was started with before, to which it must keep.
        prepare: is called first in every process.

    Raises:
        QhybridError: the model or the data cannot be used, an arm cannot be made, or does not fit into the memory.
    """
    recipe, sweep = loaded.recipe, loaded.recipe.sweep
    assert sweep is not None
    found = _probed(how, loaded, date, prepare)
    if started is not None and found.data_fingerprint != started.data_fingerprint:
        raise SweepError(
            "the data has changed since the sweep was started",
            hint="bring the old data files back, or choose another --output",
        )
    arms = build_arms(recipe, found.spec)
    needed = {}
    for arm in arms:
        one = resolve(arm.recipe(sweep.rates_of(arm.name)[0], sweep.seeds[0], "run"))
        try:
            check_inputs(one, loaded.folder)
        except QhybridError as error:
            raise SweepError(f"the arm {arm.name}: {error.message}", hint=error.hint) from None
        plan = make_plan(
            one,
            found.spec,
            found.hardware.budget,
            device=found.hardware.device,
            longest=None if one.training.packing else found.longest,
            process_bytes=found.hardware.process_bytes,
        )
        if plan.fits is False and one.memory.on_exceed != "ignore":
            raise SweepError(
                f"the arm {arm.name} needs {format_bytes(plan.needed)} and "
                f"{format_bytes(plan.budget.vram or 0)} are there ({plan.budget.source})",
                hint="qhybrid plan shows what helps; a smaller budget would lower the ranks of all arms",
            )
        own = plan.host if plan.device == "cpu" else plan.reserved + constants.CUDA_CONTEXT_BYTES
        needed[arm.name] = own
    cores = num_cores()
    runs = [needed[arm.name] for arm in arms for _ in sweep.rates_of(arm.name) for _ in sweep.seeds_of_search]
    at_once = num_at_once(runs, found.free_bytes, cores, jobs)
    return Setup(
        loaded=loaded,
        arms=arms,
        parameters=budget_of(recipe, found.spec),
        needed_bytes=needed,
        free_bytes=found.free_bytes,
        device=found.hardware.device,
        at_once=at_once,
        num_rows=found.num_rows,
        started=started or Started(date, found.data_fingerprint, num_threads(cores, at_once)),
    )


def _probed(how: BaseContext, loaded: LoadedRecipe, date: str, prepare: Callable[[], None]) -> Probe:
    """In a process of its own: torch and the model's tokenizer stay out of this one."""
    sweep = loaded.recipe.sweep
    assert sweep is not None
    ours, theirs = how.Pipe(duplex=False)
    process = how.Process(target=_probe, args=(theirs, prepare, loaded, sweep.measure, date))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        raise SweepError("the process that looks at model and data ended without an answer") from None
    except BaseException:  # a signal
        process.terminate()
        raise
    finally:
        process.join()
        ours.close()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _probe(*arguments: Any) -> None:
    _write_output_to(Path(os.devnull))  # what goes wrong is sent back
    importlib.import_module(_WORKER).probe(*arguments)


def work(order: Order, prepare: Callable[[], None]) -> None:
    """What the process of a run does; all that it and its libraries print goes to the run's log."""
    order.folder.mkdir(parents=True, exist_ok=True)
    _write_output_to(order.folder / LOG)
    importlib.import_module(_WORKER).work(order, prepare)


def _write_output_to(file: Path) -> None:
    """What this process and its libraries print goes to the end of the file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
