"""One supervised fine-tuning run, from a recipe to an adapter folder."""

from __future__ import annotations

import contextlib
import datetime
import functools
from pathlib import Path

import torch
from rich.console import Console

from qhybrid.base.load import load_base, resolve_device
from qhybrid.base.locate import model_folder
from qhybrid.errors import (
    DataError,
    QhybridError,
    RunFolderError,
)
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.recipe.schema import Recipe
from qhybrid.training.claim import claim
from qhybrid.training.memory import hardware_of, limit_vram
from qhybrid.training.pissa import parts_of_run
from qhybrid.training.planning import (
    earlier_caps,
    expect,
    plan_early,
    plan_lines,
    plan_run,
)
from qhybrid.training.preflight import preflight, settle
from qhybrid.training.processes import (
    StoppedElsewhere,
    agree,
    gather,
    is_several,
    join,
    leave,
    lost_contact,
    one_after_another,
    together,
)
from qhybrid.training.run import Run
from qhybrid.training.session import (
    BaseFacts,
    Prepared,
    Session,
    SftResult,
    adapter_info,
    base_facts,
    prepared_for,
    read_inputs,
    write_beginning,
)
from qhybrid.training.signals import Interrupted, StopSignals, stop_signals
from qhybrid.training.summary import announce, announce_model
from qhybrid.training.tasks import train_tasks


def run_sft(
    loaded: LoadedRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    date: str | None = None,
) -> SftResult:
    """Train what the recipe says, and write the run folder.

    Args:
        loaded: the recipe, and the folder that its data paths may be relative to.
        resume: go on from the newest whole checkpoint, if the output folder has one.
        overwrite: replace an earlier run in the output folder.
        console: where progress is shown; standard output by default.
        date: what chat templates that write the date are told (ISO 8601); today when left out.

    Raises:
        QhybridError: see `qhybrid.errors`; exit code 2 before training, 1 from training itself.
    """
    recipe = settle(loaded, resume=resume)
    here = join(recipe)
    console = (console or Console()) if here.is_main else Console(quiet=True)
    notify = functools.partial(console.print, highlight=False, soft_wrap=True)
    try:
        with loaded.placing(), stop_signals(notify) as signals:
            run = train_tasks if recipe.tasks else _run
            result = run(loaded, recipe, signals, resume=resume, overwrite=overwrite, console=console, today=date)
    except QhybridError as error:
        # What is wrong with the input is found by every process, and told by the first.
        if error.told_elsewhere is None and error.exit_code == 2:
            error.told_elsewhere = not here.is_main
        raise
    except RuntimeError as error:
        if is_several() and not isinstance(error, torch.cuda.OutOfMemoryError) and lost_contact(error):
            raise StoppedElsewhere("another process is gone, and this one cannot go on alone") from error
        raise
    leave()
    return result


def _run(
    loaded: LoadedRecipe,
    recipe: Recipe,
    signals: StopSignals,
    *,
    resume: bool,
    overwrite: bool,
    console: Console,
    today: str | None,
) -> SftResult:
    agree(lambda: preflight(recipe, base_folder=loaded.folder, resume=resume, overwrite=overwrite))
    before = agree(lambda: Run(Path(recipe.output_dir)).status if resume else None)
    if before and before["status"] == "finished":
        console.print(f"{recipe.output_dir} holds the finished run of this recipe; nothing to do", highlight=False)
        return SftResult(Run(Path(recipe.output_dir)), before["figures"])
    # Every process plans with the memory of the one that has least.
    hardware = min(gather(hardware_of(recipe)), key=lambda one: one.budget.vram or 0)
    earlier = agree(lambda: earlier_caps(recipe) if resume else None)
    recipe, plan = together(lambda: plan_early(recipe, hardware, earlier))
    with one_after_another():
        base = model_folder(recipe.model)
    date = (before or {}).get("date") or today or agree(lambda: datetime.date.today().isoformat())
    inputs = together(lambda: read_inputs(recipe, base, loaded.folder, date))
    data = inputs.data
    if len(set(gather(data.fingerprint))) > 1:
        raise DataError("the processes read different data", hint="give every machine the same files")

    def prepare() -> Prepared:
        planned = (recipe, plan) if plan is not None else None
        if planned is None:  # the config has come with the model, or the longest row with the data
            longest = data.longest if recipe.training.max_length is None else None
            planned = plan_run(recipe, inputs.spec, hardware, longest=longest, earlier=earlier)
        expected = expect(planned[0], inputs.spec, hardware, data.longest, planned[1].caps)
        return Prepared.of(planned[0], inputs, planned[1], expected)

    prepared = together(prepare)
    recipe = prepared.recipe
    with contextlib.ExitStack() as stack:
        run = agree(lambda: stack.enter_context(claim(recipe, resume=resume, overwrite=overwrite)))
        prepared = agree(lambda: prepared_for(prepared, run))

        def begin() -> BaseFacts:
            facts = base_facts(recipe, base, run)
            write_beginning(run, prepared, facts, date)
            return facts

        facts = agree(begin)
        announce_model(console, recipe)
        announce(console, recipe, prepared.layout, data, run)
        notice = limit_vram(recipe.memory.vram)
        notes = [f"note: {note}" for note in (*([notice] if notice else []), *run.notes)]
        for line in (*plan_lines(prepared.plan), *notes):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        if not all(gather(run.resume_from is None or run.resume_from.is_dir())):
            raise RunFolderError(f"{run.folder} is not there on every machine", hint="share the output_dir")
        info = adapter_info(prepared, facts, date)
        session = together(lambda: Session(prepared, run, info, console, signals))
        try:
            device = resolve_device("cpu" if recipe.training.use_cpu else None)
            without = agree(lambda: parts_of_run(recipe, prepared.layout, run, device, console))
            model = together(lambda: load_base(recipe.model, recipe.quantization, device=device, without=without))
            session.rank_by_data(model)
            together(lambda: session.build(model))
            with signals.asking_politely():
                session.train()
                if session.trainer.was_stopped:
                    raise Interrupted(next(number for number in gather(signals.received) if number is not None))
                figures = agree(session.finish)  # a signal from here on comes too late to stop anything
        except BaseException as error:
            told = session.stopped(error)
            if told is error:
                raise
            raise told from None
        finally:
            session.close()
        agree(lambda: run.write_status("finished", figures=figures))
    return SftResult(run, figures)
