"""One supervised fine-tuning run, from a recipe to an adapter folder."""

from __future__ import annotations

import json
import time
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
from qhybrid.base.load import load_base
from qhybrid.base.locate import model_folder
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.data.prepare import PreparedData, prepare_data
from qhybrid.errors import TrainingError
from qhybrid.recipe.load import LoadedRecipe, resolve
from qhybrid.recipe.schema import Recipe
from qhybrid.training.arguments import training_arguments
from qhybrid.training.callbacks.allocate import AllocateRanks
from qhybrid.training.callbacks.record import RecordSteps
from qhybrid.training.display import ProgressDisplay
from qhybrid.training.events import EventLog, read_events
from qhybrid.training.memory import limit_vram, measured_memory
from qhybrid.training.run import Run, begin, claim, versions, write_atomically
from qhybrid.training.trainer import BandedTrainer
from qhybrid.units import format_bytes, format_count, format_duration


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
    recipe = resolve(loaded.recipe)
    # What can be checked without the weights comes first, and before the folder is claimed.
    folder = model_folder(recipe.model)
    layout = build_layout(recipe.adapters, read_spec(folder))
    training_arguments(recipe, Path(recipe.output_dir))
    notice = limit_vram(recipe.memory.vram)
    if notice:
        console.print(f"note: {notice}", highlight=False)
    run = claim(recipe, resume=resume, overwrite=overwrite)
    if resume and (run.status or {}).get("status") == "finished":
        console.print(f"{run.folder} holds the finished run of this recipe; nothing to do", highlight=False)
        return SftResult(run, (run.status or {}).get("figures", {}))

    tokenizer = load_tokenizer(recipe.model)
    data = prepare_data(recipe, tokenizer, base_folder=loaded.folder)
    begin(run, recipe)
    write_atomically(run.layout_file, layout.to_json())
    write_atomically(run.audit_file, json.dumps(data.audit.to_dict(), indent=2, ensure_ascii=False) + "\n")
    _announce(console, recipe, layout, data, run)

    events = EventLog(run.events_file)
    try:
        figures = _train(recipe, layout, data, tokenizer, run, events, console)
    except BaseException as error:
        events.write("failed", error=type(error).__name__, message=str(error))
        run.write_status("failed", error=type(error).__name__)
        raise
    finally:
        events.close()
    run.write_status("finished", figures=figures)
    return SftResult(run, figures)


def _train(
    recipe: Recipe, layout: Layout, data: PreparedData, tokenizer, run: Run, events: EventLog, console: Console
) -> dict[str, Any]:
    model = load_base(recipe.model, recipe.quantization)
    set_seed(recipe.training.seed)  # the adapters' initial values, as in trl
    model = attach(model, layout, dtype=getattr(torch, recipe.model.resolved_adapter_dtype))
    if data.chat_template:
        tokenizer.chat_template = data.chat_template
    trainer = BandedTrainer(
        model=model,
        recipe=recipe,
        layout=layout,
        args=training_arguments(recipe, run.checkpoints),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
    )
    display = ProgressDisplay(
        console,
        line_every=int(recipe.training.logging_steps) or 1,
        initial_ranks=sum(row.rank for row in layout.of_kind("adalora")),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(AllocateRanks(trainer, events))
    trainer.add_callback(RecordSteps(trainer, events, display))
    if recipe.training.early_stopping_patience is not None:
        trainer.add_callback(
            EarlyStoppingCallback(
                recipe.training.early_stopping_patience, recipe.training.early_stopping_threshold
            )
        )
    began = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    except torch.cuda.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU ran out of memory: {str(error).splitlines()[0]}",
            hint="lower training.per_device_train_batch_size or training.max_length, or set "
            "training.gradient_checkpointing: true; then go on with --resume auto",
        ) from None
    finally:
        display.end()
    save_adapter(trainer.model, layout, _info(recipe, data), run.adapter)
    tokenizer.save_pretrained(str(run.adapter))
    return _figures(trainer, events, run, seconds=time.perf_counter() - began)


def _info(recipe: Recipe, data: PreparedData) -> AdapterInfo:
    return AdapterInfo(
        base_model=recipe.model.path,
        base_revision=recipe.model.revision,
        quantization=recipe.quantization.method,
        double_quant=recipe.quantization.double_quant,
        dtype=recipe.model.dtype,
        adapter_dtype=recipe.model.resolved_adapter_dtype,
        chat_template=data.chat_template,
        versions=versions(),
    )


def _figures(trainer: BandedTrainer, events: EventLog, run: Run, seconds: float) -> dict[str, Any]:
    steps = read_events(run.events_file, "step")
    last = {record["step"]: record for record in steps}  # a resumed run logs some steps twice
    records = [last[step] for step in sorted(last)]
    tail = records[-max(1, len(records) // 10) :]
    figures: dict[str, Any] = {
        "optimizer_steps": trainer.state.global_step,
        "first_loss": records[0]["loss"],
        "last_loss": sum(record["loss"] for record in tail) / len(tail),
        "tokens_per_second": sum(r["tokens"] for r in records) / sum(r["seconds"] for r in records),
        "seconds": round(seconds, 1),
        **{f"peak_{key}": max(r["memory"].get(key, 0) for r in records) for key in measured_memory()},
    }
    evaluations = [record for record in read_events(run.events_file, "evaluation") if "eval_loss" in record]
    if evaluations:
        figures["eval_loss"] = evaluations[-1]["eval_loss"]
    if trainer.allocators:
        figures["live_ranks"] = sum(trainer.live_ranks().values())
        figures["allocations"] = sum(allocator.num_allocations for allocator in trainer.allocators)
    events.write("end", **figures)
    return figures


def _announce(console: Console, recipe: Recipe, layout: Layout, data: PreparedData, run: Run) -> None:
    """What is about to happen, in a few lines."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    quantization = "4-bit NF4" if recipe.quantization.method == "nf4" else "unquantised"
    line(f"model    {recipe.model.path} ({quantization}, {recipe.model.dtype})")
    for band in layout.bands:
        rows = layout.of_band(band)
        first, last = rows[0], rows[-1]
        rank = f"{first.rank}→{first.target_rank}" if first.kind == "adalora" else str(first.rank)
        plus = f", LoRA+ ratio {first.loraplus_lr_ratio:g}" if first.loraplus_lr_ratio != 1 else ""
        line(
            f"band     {band}: {first.kind} rank {rank}{plus}, layers {first.layer}-{last.layer}, "
            f"{len(rows)} modules"
        )
    line(f"trained  {format_count(layout.num_parameters)} parameters")
    line(data.audit.to_text())
    line(f"run      {run.folder}" + (f", resumed from {run.resume_from.name}" if run.resume_from else ""))


def summary_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The final table: names and values as text."""
    rows = [
        ("optimizer steps", format_count(figures["optimizer_steps"])),
        ("training loss, first step", f"{figures['first_loss']:.4f}"),
        ("training loss, last tenth", f"{figures['last_loss']:.4f}"),
    ]
    if "eval_loss" in figures:
        rows.append(("evaluation loss", f"{figures['eval_loss']:.4f}"))
    rows += [
        ("speed", f"{figures['tokens_per_second']:,.0f} tokens/s"),
        ("training time", format_duration(figures["seconds"])),
        ("process memory, peak", format_bytes(figures["peak_process_bytes"])),
    ]
    for name in ("allocated", "reserved"):
        if f"peak_cuda_max_{name}_bytes" in figures:
            rows.append((f"GPU memory {name}, peak", format_bytes(figures[f"peak_cuda_max_{name}_bytes"])))
    if "live_ranks" in figures:
        rows.append(("AdaLoRA ranks alive", f"{figures['live_ranks']} after {figures['allocations']} allocations"))
    return rows
