"""One supervised fine-tuning run, from a recipe to an adapter folder."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

from qhybrid.adapters.attach import attach
from qhybrid.adapters.folder import save_adapter
from qhybrid.adapters.info import AdapterInfo
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import ModelSpec, read_spec
from qhybrid.base.facts import model_facts
from qhybrid.base.fingerprint import config_hash
from qhybrid.base.load import load_base, resolve_device
from qhybrid.base.locate import find_local, hub_commit, model_folder
from qhybrid.base.tokenizer import load_tokenizer, save_tokenizer
from qhybrid.data.prepare import PreparedData, prepare_data
from qhybrid.disk import whole_folder, write_atomically
from qhybrid.errors import (
    AllocationError,
    DataError,
    ModelError,
    QhybridError,
    RecipeError,
    RunFolderError,
    TrainingError,
)
from qhybrid.planner.memory import zero_setup
from qhybrid.planner.plan import Plan, RankCap
from qhybrid.ranks.decide import InitialValues
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.recipe.schema import Recipe
from qhybrid.training.arguments import training_arguments
from qhybrid.training.callbacks.allocate import AllocateRanks
from qhybrid.training.callbacks.monitor import Monitor
from qhybrid.training.callbacks.record import RecordSteps
from qhybrid.training.callbacks.replace import DiscardReplaced
from qhybrid.training.callbacks.stages import BeginStages
from qhybrid.training.callbacks.stop import StopWhenAsked
from qhybrid.training.callbacks.watch import WatchLoss
from qhybrid.training.checkpoint import require_space
from qhybrid.training.claim import claim
from qhybrid.training.culprits import rows_of
from qhybrid.training.data_ranks import rank_by_data
from qhybrid.training.display import ProgressDisplay
from qhybrid.training.events import EventLog
from qhybrid.training.memory import hardware_of, is_out_of_memory, limit_vram
from qhybrid.training.messages import out_of_memory, told, what_is_left
from qhybrid.training.pissa import parts_of_run
from qhybrid.training.planning import (
    Hardware,
    checkpoint_bytes,
    earlier_caps,
    expect,
    plan_lines,
    plan_run,
    write_plan,
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
    place,
    together,
)
from qhybrid.training.run import Run, begin, check_base, versions
from qhybrid.training.signals import Interrupted, StopSignals, stop_signals
from qhybrid.training.stage_plan import check_stage_plan
from qhybrid.training.summary import announce, figures_of, predicted_memory
from qhybrid.training.trainer import BandedTrainer
from qhybrid.training.trainer_stages import read_layout
from qhybrid.training.zero import deepspeed_config


@dataclass(frozen=True)
class SftResult:
    """Where the adapter lies, and the figures of the final table."""

    run: Run
    figures: dict[str, Any]


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
        with stop_signals(notify) as signals:
            result = _run(loaded, recipe, signals, resume=resume, overwrite=overwrite, console=console, today=date)
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
    recipe, plan = together(lambda: _planned(recipe, hardware, earlier))
    with one_after_another():
        base = model_folder(recipe.model)
    date = (before or {}).get("date") or today or agree(lambda: datetime.date.today().isoformat())
    prepared = together(lambda: _prepare(loaded, recipe, plan, base, hardware, earlier, date))
    recipe, data = prepared.recipe, prepared.data
    if len(set(gather(data.fingerprint))) > 1:
        raise DataError("the processes read different data", hint="give every machine the same files")
    with contextlib.ExitStack() as stack:
        run = agree(lambda: stack.enter_context(claim(recipe, resume=resume, overwrite=overwrite)))
        if run.resume_from is not None:  # stages may have changed it
            prepared = replace(prepared, layout=agree(lambda: read_layout(run.resume_from)))
        layout = prepared.layout
        agree(lambda: _begin(run, prepared, base, date))
        announce(console, recipe, layout, data, run, limit_vram(recipe.memory.vram))
        for line in (*plan_lines(prepared.plan), *(f"note: {note}" for note in run.notes)):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        if not all(gather(run.resume_from is None or run.resume_from.is_dir())):
            raise RunFolderError(f"{run.folder} is not there on every machine", hint="share the output_dir")
        events = together(lambda: EventLog(run.events_file if place().is_main else Path(os.devnull)))
        predicted = predicted_memory(prepared.expected)
        try:
            events.write("plan", predicted=predicted, moments=prepared.expected.prediction.moments)
            commit = hub_commit(base) if find_local(recipe.model) is None else None
            info = _info(recipe, data, commit, date, base, run)
            figures = _train(prepared, info, run, events, console, signals)
            figures |= {f"predicted_{name}": value for name, value in predicted.items()}
            events.write("end", **figures)
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            if place().is_main:
                name = type(error).__name__
                with contextlib.suppress(OSError):  # a full disk must not hide what happened
                    events.write(status, error=name, message=str(error))
                with contextlib.suppress(OSError):
                    run.write_status(status, error=name)
            if status == "interrupted":
                console.print(what_is_left(run), highlight=False, soft_wrap=True)
            if isinstance(error, Exception) and is_out_of_memory(error):
                raise out_of_memory(recipe, prepared.spec, prepared.expected, data.longest, run, error) from None
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise TrainingError(
                    f"the disk is full: {error.filename or run.folder} could not be written",
                    hint=f"make room; {what_is_left(run)}",
                ) from None
            raise
        finally:
            with contextlib.suppress(OSError):
                events.close()
        agree(lambda: run.write_status("finished", figures=figures))
    return SftResult(run, figures)


@dataclass(frozen=True)
class _Prepared:
    """All that a run begins with, before its folder is claimed."""

    recipe: Recipe
    spec: ModelSpec
    layout: Layout
    plan: Plan
    expected: Plan  # for the data at hand
    data: PreparedData
    tokenizer: Any
    deepspeed: dict[str, Any] | None


def _prepare(
    loaded: LoadedRecipe,
    recipe: Recipe,
    plan: Plan | None,
    base: Path,
    hardware: Hardware,
    earlier: tuple[RankCap, ...] | None,
    date: str,
) -> _Prepared:
    spec = read_spec(base)
    layout = build_layout(recipe, spec)
    check_stage_plan(recipe, layout)
    # What needs no model is looked at before the folder is claimed.
    training_arguments(recipe, Path(recipe.output_dir))
    tokenizer = load_tokenizer(recipe.model)
    data = prepare_data(recipe, tokenizer, base_folder=loaded.folder, date=date)
    if plan is None:  # the config has come with the model, or the longest row with the data
        longest = data.longest if recipe.training.max_length is None else None
        recipe, plan = plan_run(recipe, spec, hardware, longest=longest, earlier=earlier)
    layout = build_layout(recipe, spec)
    expected = expect(recipe, spec, hardware, data.longest, plan.caps)
    deepspeed = None
    if recipe.distributed.zero_stage:
        deepspeed = deepspeed_config(recipe, zero_setup(recipe, spec, layout))
    return _Prepared(recipe, spec, layout, plan, expected, data, tokenizer, deepspeed)


def _begin(run: Run, prepared: _Prepared, base: Path, date: str) -> None:
    """Write what is known before training."""
    require_space(run.folder, checkpoint_bytes(prepared.recipe, prepared.plan.largest))
    begin(run, prepared.recipe, prepared.data.fingerprint, check_base(run, base), date)
    write_atomically(run.layout_file, prepared.layout.to_json())
    write_plan(run, prepared.plan, prepared.expected)
    if prepared.deepspeed is not None:
        write_atomically(run.deepspeed_file, json.dumps(prepared.deepspeed, indent=2) + "\n")
    audit = json.dumps(prepared.data.audit.to_dict(), indent=2, ensure_ascii=False)
    write_atomically(run.audit_file, audit + "\n")


def _planned(
    recipe: Recipe, hardware: Hardware, earlier: tuple[RankCap, ...] | None
) -> tuple[Recipe, Plan | None]:
    """The plan from what is known before anything is downloaded; None where that is not enough."""
    if recipe.training.max_length is None:
        return recipe, None
    try:
        facts = model_facts(recipe.model)
    except ModelError:
        return recipe, None
    return plan_run(recipe, facts.spec, hardware, earlier=earlier)


def _train(
    prepared: _Prepared, info: AdapterInfo, run: Run, events: EventLog, console: Console, signals: StopSignals
) -> dict[str, Any]:
    recipe, layout, tokenizer = prepared.recipe, prepared.layout, prepared.tokenizer
    device = resolve_device("cpu" if recipe.training.use_cpu else None)
    without = agree(lambda: parts_of_run(recipe, layout, run, device, console))

    def report(event: str, **facts: Any) -> None:
        events.write(event, **facts)
        console.print(told(event, facts, prepared.expected), highlight=False, soft_wrap=True, markup=False)

    base = together(lambda: load_base(recipe.model, recipe.quantization, device=device, without=without))
    initial: InitialValues = {}
    if recipe.ranks is not None and run.resume_from is None:
        layout, initial = rank_by_data(recipe, layout, base, prepared.data.train, run, report)
        prepared = replace(prepared, layout=layout)

    def build() -> BandedTrainer:
        set_seed(recipe.training.seed)  # the adapters' initial values, as in trl
        model = attach(base, layout, dtype=getattr(torch, recipe.adapter_dtype), initial=initial)
        if prepared.data.chat_template:
            tokenizer.chat_template = prepared.data.chat_template
        return _trainer(prepared, model, run, report)

    trainer = together(build)
    display = ProgressDisplay(
        console,
        line_every=int(recipe.training.logging_steps) or 1,
        initial_ranks=sum(row.rank for row in layout.of_kind("adalora")),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(AllocateRanks(trainer, events))
    trainer.add_callback(BeginStages(trainer, run, report))
    trainer.add_callback(Monitor(trainer, events, run.events_file))
    trainer.add_callback(RecordSteps(trainer, events, display))
    if place().is_main:
        trainer.add_callback(DiscardReplaced(run))
    if recipe.training.early_stopping_patience is not None:
        trainer.add_callback(
            EarlyStoppingCallback(
                recipe.training.early_stopping_patience, recipe.training.early_stopping_threshold
            )
        )
    trainer.add_callback(WatchLoss(trainer, report))
    trainer.add_callback(StopWhenAsked(trainer, signals))
    began = time.perf_counter()

    def finish() -> dict[str, Any]:
        with whole_folder(run.adapter) as folder:
            save_adapter(trainer.model, trainer.layout, info, folder)
            save_tokenizer(tokenizer, folder)
        write_atomically(run.layout_file, trainer.layout.to_json())  # the best checkpoint may be an earlier one's
        _require_allocations(trainer, run)
        return figures_of(trainer, events, run, seconds=time.perf_counter() - began)

    with signals.asking_politely():
        try:
            trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
        finally:
            display.end()
        if trainer.was_stopped:
            raise Interrupted(next(number for number in gather(signals.received) if number is not None))
        return agree(finish)  # a signal from here on comes too late to stop anything


def _trainer(prepared: _Prepared, model, run: Run, report: Callable[..., None]) -> BandedTrainer:
    recipe = prepared.recipe
    try:
        with _tensorboard_in(run.folder / "tensorboard"):
            return BandedTrainer(
                model=model,
                recipe=recipe,
                layout=prepared.layout,
                find_rows=functools.partial(rows_of, data=prepared.data),
                report=report,
                args=training_arguments(recipe, run.checkpoints, prepared.deepspeed),
                train_dataset=prepared.data.train,
                eval_dataset=prepared.data.eval,
                processing_class=prepared.tokenizer,
            )
    except (ValueError, TypeError, ImportError, AssertionError) as error:
        raise RecipeError(f"training: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Its files go to the run folder, not among the checkpoints, unless the environment says where."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = os.environ.setdefault(name, str(folder))
    try:
        yield
    finally:
        if given == str(folder):
            del os.environ[name]


def _require_allocations(trainer: BandedTrainer, run: Run) -> None:
    frozen = trainer.stages.frozen if trainer.stages else ()
    for allocator in trainer.allocators:
        if allocator.num_allocations == 0 and allocator.band not in frozen:
            schedule = allocator.schedule
            first = min(schedule.warmup_steps + schedule.interval, schedule.last_allocation)
            raise AllocationError(
                f"band {allocator.band!r} of kind adalora never allocated: the run ended at step "
                f"{trainer.state.global_step} of {schedule.total_steps}, "
                f"the first allocation was due at step {first}",
                hint=f"{run.adapter} holds the adapter at its initial rank; train longer, or shorten "
                "adalora.warmup",
            )


def _info(recipe: Recipe, data: PreparedData, commit: str | None, date: str, base: Path, run: Run) -> AdapterInfo:
    path = recipe.model.path
    files = json.loads(run.base_file.read_text(encoding="utf-8"))
    return AdapterInfo(
        base_model=path.partition("@")[0] if commit else path,  # the commit is what "@revision" was then
        base_revision=commit or recipe.model.revision,
        quantization=recipe.quantization.method,
        double_quant=recipe.quantization.double_quant,
        dtype=recipe.model.dtype,
        adapter_dtype=recipe.adapter_dtype,
        attn_implementation=recipe.model.attn_implementation,
        chat_template=data.chat_template,
        system_prompt=recipe.data.system_prompt,
        date=date,
        base_config_sha256=config_hash(base),
        base_sha256={name: facts["sha256"] for name, facts in files.items()},
        versions=versions(),
    )
