"""One supervised fine-tuning run, from a recipe to an adapter folder."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

from qhybrid.adapters.attach import attach
from qhybrid.adapters.folder import AdapterInfo, save_adapter
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import read_spec
from qhybrid.base.facts import model_facts
from qhybrid.base.load import load_base
from qhybrid.base.locate import find_local, hub_commit, model_folder
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.data.prepare import PreparedData, prepare_data
from qhybrid.errors import AllocationError, ModelError, RecipeError, TrainingError
from qhybrid.planner.plan import Plan, RankCap
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.recipe.schema import Recipe
from qhybrid.training.arguments import training_arguments
from qhybrid.training.callbacks.allocate import AllocateRanks
from qhybrid.training.callbacks.record import RecordSteps
from qhybrid.training.callbacks.replace import DiscardReplaced
from qhybrid.training.checkpoint import newest_sealed
from qhybrid.training.claim import claim, has_replaced
from qhybrid.training.display import ProgressDisplay
from qhybrid.training.events import EventLog
from qhybrid.training.memory import hardware_of, limit_vram
from qhybrid.training.planning import Hardware, earlier_caps, expect, plan_lines, plan_run, write_plan
from qhybrid.training.preflight import preflight, settle
from qhybrid.training.run import Run, begin, versions, write_atomically
from qhybrid.training.summary import announce, figures_of, predicted_memory
from qhybrid.training.trainer import BandedTrainer


@dataclass(frozen=True)
class SftResult:
    """Where the adapter lies, and the figures of the final table."""

    run: Run
    figures: dict[str, Any]


def run_sft(
    loaded: LoadedRecipe, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> SftResult:
    """Train what the recipe says, and write the run folder.

    Args:
        loaded: the recipe, and the folder that its data paths may be relative to.
        resume: go on from the newest whole checkpoint, if the output folder has one.
        overwrite: replace an earlier run in the output folder.
        console: where progress is shown; standard output by default.

    Raises:
        QhybridError: see `qhybrid.errors`; exit code 2 before training, 1 from training itself.
    """
    console = console or Console()
    recipe = settle(loaded, resume=resume)
    preflight(recipe, base_folder=loaded.folder, resume=resume, overwrite=overwrite)
    before = Run(Path(recipe.output_dir)).status if resume else None
    if before and before["status"] == "finished":
        console.print(f"{recipe.output_dir} holds the finished run of this recipe; nothing to do", highlight=False)
        return SftResult(Run(Path(recipe.output_dir)), before["figures"])
    hardware = hardware_of(recipe)
    earlier = earlier_caps(recipe) if resume else None
    recipe, plan = _planned(recipe, hardware, earlier)
    # What needs no model is looked at before the folder is claimed.
    training_arguments(recipe, Path(recipe.output_dir))
    base = model_folder(recipe.model)
    spec = read_spec(base)
    build_layout(recipe.adapters, spec)
    tokenizer = load_tokenizer(recipe.model)
    date = (before or {}).get("date") or datetime.date.today().isoformat()
    data = prepare_data(recipe, tokenizer, base_folder=loaded.folder, date=date)
    if plan is None:  # the config has come with the model, or the longest row with the data
        longest = data.longest if recipe.training.max_length is None else None
        recipe, plan = plan_run(recipe, spec, hardware, longest=longest, earlier=earlier)
    layout = build_layout(recipe.adapters, spec)
    expected = expect(recipe, spec, hardware, data.longest, plan.caps)
    with claim(recipe, resume=resume, overwrite=overwrite) as run:
        begin(run, recipe, data.fingerprint, date)
        write_atomically(run.layout_file, layout.to_json())
        write_plan(run, plan, expected)
        write_atomically(run.audit_file, json.dumps(data.audit.to_dict(), indent=2, ensure_ascii=False) + "\n")
        announce(console, recipe, layout, data, run, limit_vram(recipe.memory.vram))
        for line in plan_lines(plan):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        events = EventLog(run.events_file)
        events.write("plan", predicted=predicted_memory(expected), moments=expected.prediction.moments)
        try:
            commit = hub_commit(base) if find_local(recipe.model) is None else None
            info = _info(recipe, data, commit, date)
            figures = _train(recipe, layout, data, tokenizer, info, run, events, console)
            figures |= {f"predicted_{name}": value for name, value in predicted_memory(expected).items()}
            events.write("end", **figures)
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                events.write(status, error=type(error).__name__, message=str(error))
                run.write_status(status, error=type(error).__name__)
            if status == "interrupted":
                console.print(_what_is_left(run), highlight=False, soft_wrap=True)
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise _out_of_memory(recipe, run, error) from None
            raise
        finally:
            events.close()
        run.write_status("finished", figures=figures)
    return SftResult(run, figures)


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
    recipe: Recipe,
    layout: Layout,
    data: PreparedData,
    tokenizer,
    info: AdapterInfo,
    run: Run,
    events: EventLog,
    console: Console,
) -> dict[str, Any]:
    model = load_base(recipe.model, recipe.quantization, device="cpu" if recipe.training.use_cpu else None)
    set_seed(recipe.training.seed)  # the adapters' initial values, as in trl
    model = attach(model, layout, dtype=getattr(torch, recipe.model.resolved_adapter_dtype))
    if data.chat_template:
        tokenizer.chat_template = data.chat_template
    trainer = _trainer(recipe, layout, data, tokenizer, model, run)
    display = ProgressDisplay(
        console,
        line_every=int(recipe.training.logging_steps) or 1,
        initial_ranks=sum(row.rank for row in layout.of_kind("adalora")),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(AllocateRanks(trainer, events))
    trainer.add_callback(RecordSteps(trainer, events, display))
    trainer.add_callback(DiscardReplaced(run))
    if recipe.training.early_stopping_patience is not None:
        trainer.add_callback(
            EarlyStoppingCallback(
                recipe.training.early_stopping_patience, recipe.training.early_stopping_threshold
            )
        )
    began = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    finally:
        display.end()
    save_adapter(trainer.model, layout, info, run.adapter)
    tokenizer.save_pretrained(str(run.adapter))
    _require_allocations(trainer, run)
    return figures_of(trainer, events, run, seconds=time.perf_counter() - began)


def _trainer(recipe: Recipe, layout: Layout, data: PreparedData, tokenizer, model, run: Run) -> BandedTrainer:
    try:
        with _tensorboard_in(run.folder / "tensorboard"):
            return BandedTrainer(
                model=model,
                recipe=recipe,
                layout=layout,
                args=training_arguments(recipe, run.checkpoints),
                train_dataset=data.train,
                eval_dataset=data.eval,
                processing_class=tokenizer,
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
    for allocator in trainer.allocators:
        if allocator.num_allocations == 0:
            schedule = allocator.schedule
            first = min(schedule.warmup_steps + schedule.interval, schedule.last_allocation)
            raise AllocationError(
                f"band {allocator.band!r} of kind adalora never allocated: the run ended at step "
                f"{trainer.state.global_step} of {schedule.total_steps}, "
                f"the first allocation was due at step {first}",
                hint=f"{run.adapter} holds the adapter at its initial rank; train longer, or shorten "
                "adalora.warmup",
            )


_BACK = "no step was taken: the run that was to be replaced is back as it was"


def _what_is_left(run: Run) -> str:
    if has_replaced(run):
        return _BACK
    checkpoint = newest_sealed(run.checkpoints)
    if checkpoint is None:
        return "stopped before the first checkpoint: --resume auto starts from the beginning"
    return f"stopped; {checkpoint.name} is whole: go on with --resume auto"


def _out_of_memory(recipe: Recipe, run: Run, error: Exception) -> TrainingError:
    smaller = (
        "a smaller training.per_device_train_batch_size (with more gradient_accumulation_steps) or "
        "training.max_length"
    )
    message = f"the GPU ran out of memory: {str(error).splitlines()[0]}"
    if has_replaced(run):
        return TrainingError(message, hint=f"{_BACK}; start again with --overwrite and {smaller}")
    if recipe.training.gradient_checkpointing:
        first = "lower training.per_device_eval_batch_size, if it was in an evaluation, and go on"
    else:
        first = "set training.gradient_checkpointing=true and go on"
    return TrainingError(message, hint=f"{first} with --resume auto; or start anew with --overwrite and {smaller}")


def _info(recipe: Recipe, data: PreparedData, commit: str | None, date: str) -> AdapterInfo:
    path = recipe.model.path
    return AdapterInfo(
        base_model=path.partition("@")[0] if commit else path,  # the commit is what "@revision" was then
        base_revision=commit or recipe.model.revision,
        quantization=recipe.quantization.method,
        double_quant=recipe.quantization.double_quant,
        dtype=recipe.model.dtype,
        adapter_dtype=recipe.model.resolved_adapter_dtype,
        attn_implementation=recipe.model.attn_implementation,
        chat_template=data.chat_template,
        system_prompt=recipe.data.system_prompt,
        date=date,
        versions=versions(),
    )
