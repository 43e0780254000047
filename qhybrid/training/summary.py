"""What is told of a run: a few lines before it, its figures after it, and the table that shows them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from qhybrid.architecture.layout import Layout
from qhybrid.data.prepare import PreparedData
from qhybrid.planner.plan import Plan
from qhybrid.recipe.schema import Recipe
from qhybrid.training.checkpoint import step_of
from qhybrid.training.display import NamedConsole
from qhybrid.training.events import EventLog, read_events
from qhybrid.training.memory import measured_memory, process_peak_bytes
from qhybrid.training.run import Run
from qhybrid.training.trainer import BandedTrainer
from qhybrid.units import format_bytes, format_count, format_duration


def figures_of(
    trainer: BandedTrainer, events: EventLog, run: Run, *, seconds: float, first_step: int
) -> dict[str, Any]:
    """What the final table shows.

    Args:
        seconds: since the last start, which was after `first_step`.
    """
    steps = read_events(run.events_file, "step")
    last = {record["step"]: record for record in steps}  # a resumed run logs some steps twice
    records = [last[step] for step in sorted(last)]
    tail = records[-max(1, len(records) // 10) :]
    figures: dict[str, Any] = {
        "optimizer_steps": trainer.state.global_step,
        "first_loss": records[0]["loss"],
        "last_tenth_loss": sum(record["loss"] for record in tail) / len(tail),
        "tokens_per_second": sum(r["tokens"] for r in records) / sum(r["seconds"] for r in records),
        "seconds": round(seconds, 1),
        **{f"peak_{key}": max(r["memory"].get(key, 0) for r in records) for key in measured_memory()},
        "peak_process_bytes": process_peak_bytes(),
    }
    evaluations = [record for record in read_events(run.events_file, "evaluation") if "eval_loss" in record]
    if evaluations:
        figures["eval_loss"] = evaluations[-1]["eval_loss"]
        best = trainer.state.best_model_checkpoint
        if trainer.args.load_best_model_at_end and best is not None:
            figures["eval_loss"] = trainer.state.best_metric  # that adapter was loaded back
            figures["adapter_of_step"] = step_of(Path(best))
    if first_step:
        figures["resumed_after_step"] = first_step
    if trainer.state.global_step < trainer.state.max_steps:
        figures["stopped_early_of"] = trainer.state.max_steps
    if trainer.stages:
        figures["stages"] = [stage.name for stage in trainer.recipe.stages]
        figures["stages_begun"] = trainer.stages.begun
        figures["num_trained_parameters"] = trainer.layout.num_parameters
    if trainer.allocators:
        figures["live_ranks"] = trainer.num_live_triplets()
        figures["target_ranks"] = sum(allocator.schedule.target_budget for allocator in trainer.allocators)
        figures["allocations"] = sum(allocator.num_allocations for allocator in trainer.allocators)
    return figures


def predicted_memory(plan: Plan) -> dict[str, int]:
    """What the plan says, under the names of what is measured."""
    if plan.device == "cpu":
        return {"process_bytes": plan.host}
    return {
        "cuda_max_allocated_bytes": plan.allocated,
        "cuda_max_reserved_bytes": plan.reserved,
        "cuda_used_bytes": plan.needed,
    }


def announce_model(console: Console, recipe: Recipe) -> None:
    """The model, in a line."""
    quantization = "4-bit NF4" if recipe.quantization.method == "nf4" else "unquantised"
    text = f"model    {recipe.model.path} ({quantization}, {recipe.model.dtype})"
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def announce(
    console: Console | NamedConsole, recipe: Recipe, layout: Layout, data: PreparedData, run: Run
) -> None:
    """What is about to happen to the model, in a few lines."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    for band in layout.bands:
        rows = layout.of_band(band)
        first, last = rows[0], rows[-1]
        rank = _span(row.rank for row in rows)
        if first.kind == "adalora":
            rank += f"→{_span(row.target_rank for row in rows)}"
        plus = f", LoRA+ ratio {first.loraplus_lr_ratio:g}" if first.loraplus_lr_ratio != 1 else ""
        plus += f", learning rate ×{first.lr_ratio:g}" if first.lr_ratio != 1 else ""
        line(
            f"band     {band}: {first.kind} rank {rank}{plus}, layers {first.layer}-{last.layer}, "
            f"{len(rows)} modules"
        )
    line(f"trained  {format_count(layout.num_parameters)} parameters")
    for stage in recipe.stages:
        line(f"stage    {stage.told()}")
    line(data.audit.to_text())
    if data.eval is not None and recipe.training.eval_strategy == "no":
        line("note: evaluation rows are given, but training.eval_strategy is no: they are not looked at")
    if recipe.training.early_stopping_patience is not None and not recipe.training.load_best_model_at_end:
        line("note: early stopping keeps the last adapter; training.load_best_model_at_end: true keeps the best")
    line(f"run      {run.folder}" + (f", resumed from {run.resume_from.name}" if run.resume_from else ""))


def _span(ranks: Iterable[int]) -> str:
    low, *_, high = sorted([*ranks] * 2)
    return str(low) if low == high else f"{low}-{high}"


def _early(figures: dict[str, Any]) -> str:
    of = figures.get("stopped_early_of")
    return "" if of is None else f" of {format_count(of)}, stopped early"


def _beside_prediction(figures: dict[str, Any], name: str) -> str:
    measured, predicted = figures[f"peak_{name}"], figures.get(f"predicted_{name}")
    if predicted is None:
        return format_bytes(measured)
    return f"{format_bytes(measured)} (predicted {format_bytes(predicted)}, {predicted / measured - 1:+.1%})"


def summary_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The final table: names and values as text."""
    rows = [
        ("optimizer steps", format_count(figures["optimizer_steps"]) + _early(figures)),
        ("training loss, first step", f"{figures['first_loss']:.4f}"),
        ("training loss, last tenth", f"{figures['last_tenth_loss']:.4f}"),
    ]
    if "eval_loss" in figures:
        best = f", the best: of step {figures['adapter_of_step']}" if "adapter_of_step" in figures else ""
        rows.append(("evaluation loss", f"{figures['eval_loss']:.4f}{best}"))
    since = f" since step {figures['resumed_after_step']}" if "resumed_after_step" in figures else ""
    rows += [
        ("speed", f"{figures['tokens_per_second']:,.0f} tokens/s"),
        ("training time", format_duration(figures["seconds"]) + since),
        ("process memory, peak", _beside_prediction(figures, "process_bytes")),
    ]
    for title, name in (
        ("GPU memory allocated, peak", "cuda_max_allocated_bytes"),
        ("GPU memory reserved, peak", "cuda_max_reserved_bytes"),
        ("GPU memory of all processes, peak", "cuda_used_bytes"),
    ):
        if f"peak_{name}" in figures:
            rows.append((title, _beside_prediction(figures, name)))
    if "stages" in figures:
        missing = [name for name in figures["stages"] if name not in figures["stages_begun"]]
        trained = format_count(figures["num_trained_parameters"])
        begun = f"{len(figures['stages_begun'])} of {len(figures['stages'])} begun"
        begun += f" (not {', '.join(missing)})" if missing else ""
        rows.append(("stages", f"{begun}; {trained} parameters at the end"))
    if "live_ranks" in figures:
        alive = f"{figures['live_ranks']} after {figures['allocations']} allocations"
        if figures["live_ranks"] > figures["target_ranks"]:
            alive += f"; the final choice of {figures['target_ranks']} was not reached"
        rows.append(("AdaLoRA ranks alive", alive))
    return rows
