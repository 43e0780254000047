"""What can be refused of stages before training, where the model's shape or the number of steps is known."""

from __future__ import annotations

from collections.abc import Mapping

from qhybrid.adapters.schedule import BudgetSchedule, plan_schedules
from qhybrid.architecture.growth import check_growth
from qhybrid.architecture.layout import Layout
from qhybrid.errors import RecipeError
from qhybrid.planner.optimizers import GROWING, rule_of
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.stage_checks import StageError, begin_steps, check_stages


def check_stage_plan(recipe: Recipe, layout: Layout) -> None:
    """Refuse stages that the optimizer, the processes or the modules at hand do not allow.

    Raises:
        RecipeError, LayoutError: with what to do.
    """
    if not recipe.stages:
        return
    try:
        check_stages(recipe)  # once more: a launcher may have set the number of processes
    except StageError as error:
        raise RecipeError(str(error), hint=error.hint, at=error.path) from None
    optim = recipe.training.optim
    if any(stage.expand for stage in recipe.stages) and optim not in GROWING:
        raise RecipeError(
            f"training.optim {optim} cannot go on when a matrix grows: its states have not the parameter's shape",
            hint=f"use {', '.join(GROWING)}; or let the stages only freeze",
            at=("training", "optim"),
        )
    if optim.startswith("schedule_free") or not rule_of(optim).known:
        raise RecipeError(
            f"training.optim {optim} moves parameters that have no gradient, or consumes gradients as they come: "
            "a frozen band would not stand still",
            hint=f"use for example {GROWING[0]}",
            at=("training", "optim"),
        )
    check_growth(recipe, layout)


def stage_steps(recipe: Recipe, layout: Layout, total_steps: int) -> tuple[int | None, ...]:
    """After which optimizer step each stage begins; None for those that wait for something else.

    Raises:
        RecipeError: a step outside of the run, or an AdaLoRA band that is frozen before its ranks are final.
    """
    if not recipe.stages:
        return ()
    try:
        steps = begin_steps(recipe.stages, total_steps)
    except StageError as error:
        raise RecipeError(str(error), hint=error.hint, at=error.path) from None
    _check_allocations(recipe, steps, plan_schedules(recipe.adapters, layout, total_steps))
    return steps


def _check_allocations(
    recipe: Recipe, steps: tuple[int | None, ...], schedules: Mapping[str, BudgetSchedule]
) -> None:
    """A frozen AdaLoRA band does not allocate. One that is freed later makes up for it."""
    for number, (stage, step) in enumerate(zip(recipe.stages, steps, strict=True)):
        for band in stage.freeze:
            schedule = schedules.get(band)
            is_freed = any(band in later.unfreeze for later in recipe.stages[number + 1 :])
            if schedule and step is not None and step < schedule.last_allocation and not is_freed:
                raise RecipeError(
                    f"stage {stage.name!r} freezes band {band!r} after step {step}, and its last allocation is "
                    f"after step {schedule.last_allocation}: its ranks would stay above the target",
                    hint="freeze it later, or raise its adalora.final",
                    at=("stages", stage.name, "freeze"),
                )
