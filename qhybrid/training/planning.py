"""The plan of a run: made first, always. Ranks are lowered to the memory there is, and it is written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import ModelSpec
from qhybrid.base.facts import model_facts
from qhybrid.disk import write_atomically
from qhybrid.errors import MemoryPlanError, ModelError
from qhybrid.planner.advise import ways_to_fit
from qhybrid.planner.holdings import adalora_scores, adapter_bytes, optimizer_states, principal_bytes
from qhybrid.planner.optimizers import rule_of
from qhybrid.planner.plan import Budget, Plan, RankCap, make_plan
from qhybrid.planner.solve import asked_ranks, rank_caps, solve_rank, with_ranks
from qhybrid.planner.tasks import lower_ranks, plan_tasks, task_caps, ways_to_fit_tasks, with_task_caps
from qhybrid.planner.workload import WIDTHS, Device
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.tasks import task_recipes
from qhybrid.training.run import Run
from qhybrid.units import format_bytes, format_count

Longest = int | None | Mapping[str, int | None]  # tokens of the longest row; of each task, where there are several


@dataclass(frozen=True)
class Hardware:
    """Where a run takes place: what it may use, and what this process holds before the model is loaded."""

    device: Device
    budget: Budget
    process_bytes: int


def plan_run(
    recipe: Recipe,
    spec: ModelSpec,
    hardware: Hardware,
    *,
    longest: Longest = None,
    earlier: tuple[RankCap, ...] | None = None,
) -> tuple[Recipe, Plan]:
    """The recipe with ranks that fit, and its plan; what happens otherwise says memory.on_exceed.

    Args:
        longest: tokens of the longest row, where the recipe does not limit it; with tasks of each.
        earlier: the caps of the run that is to be resumed; its ranks are settled, and are not lowered again.

    Raises:
        MemoryPlanError: it does not fit, and may not or cannot be made to fit by lower ranks.
    """

    def plan(tried: Recipe, caps: tuple[RankCap, ...] = ()) -> Plan:
        return _plan(tried, spec, hardware, longest=longest, caps=caps)

    asked = plan(recipe, earlier or ())
    if asked.fits is not False or recipe.memory.on_exceed == "ignore":
        return recipe, asked
    can_cap = recipe.memory.on_exceed == "cap_rank" and earlier is None
    if can_cap:
        if recipe.tasks:
            capped = lower_ranks(recipe, spec, plan)
        else:
            capped = solve_rank(recipe, spec, plan, no_more_than_asked=True)
        if capped is not None:
            return capped, plan(capped, (task_caps if recipe.tasks else rank_caps)(recipe, capped))
    limit = asked.budget.vram or 0
    what = f"{format_bytes(asked.needed)} are needed and {format_bytes(limit)} are there ({asked.budget.source})"
    tried = ", even at the smallest ranks" if can_cap else ""
    if earlier is not None:
        raise MemoryPlanError(
            f"the run was started with more memory: {what}",
            hint="free memory, checkpoint more layers, or go on with memory.on_exceed=ignore",
        )
    changes, enough = (ways_to_fit_tasks if recipe.tasks else ways_to_fit)(recipe, spec, plan)
    words = " ".join(word for change in changes for word in change.overrides)
    hint = f"this fits: {words}" if enough else "no change of the recipe suffices; qhybrid plan shows what helps"
    raise MemoryPlanError(f"the plan does not fit{tried}: {what}", hint=hint)


def plan_as_it_is(recipe: Recipe, spec: ModelSpec, hardware: Hardware, *, longest: Longest = None) -> Plan:
    """The plan of the recipe without a change, whether it fits or not."""
    return _plan(recipe, spec, hardware, longest=longest)


def plan_early(
    recipe: Recipe, hardware: Hardware, earlier: tuple[RankCap, ...] | None
) -> tuple[Recipe, Plan | None]:
    """The plan from what is known before anything is downloaded; None where that is not enough."""
    recipes = task_recipes(recipe).values() or (recipe,)
    if any(one.training.max_length is None for one in recipes):
        return recipe, None
    try:
        facts = model_facts(recipe.model)
    except ModelError:
        return recipe, None
    return plan_run(recipe, facts.spec, hardware, earlier=earlier)


def expect(
    recipe: Recipe, spec: ModelSpec, hardware: Hardware, longest: Longest, caps: tuple[RankCap, ...]
) -> Plan:
    """The plan for the data at hand, whose longest row has `longest` tokens: what will be measured."""
    if isinstance(longest, Mapping):
        longest = {task.name: None if task.training.packing else longest[task.name] for task in recipe.tasks}
    elif recipe.training.packing:
        longest = None
    return _plan(recipe, spec, hardware, longest=longest, caps=caps)


def _plan(recipe: Recipe, spec: ModelSpec, hardware: Hardware, **others: Any) -> Plan:
    return (plan_tasks if recipe.tasks else make_plan)(
        recipe,
        spec,
        hardware.budget,
        device=hardware.device,
        process_bytes=hardware.process_bytes,
        **others,
    )


def smaller_plan(
    recipe: Recipe, spec: ModelSpec, expected: Plan, longest: int, as_override: Callable[[str], str] = str
) -> str:
    """The overrides of a plan whose tensors take a fifth less than one that ran out of memory, in one line.

    Args:
        longest: tokens of the longest row, as for `expect`.
        as_override: the command line's word for what a word changes in `recipe`.
    """
    limit = expected.budget

    def plan(tried: Recipe) -> Plan:
        given = None if tried.training.packing else longest
        return make_plan(tried, spec, limit, device=expected.device, longest=given)

    here = plan(recipe)  # not `expected`, which knows what the process took before
    limit = replace(limit, vram=here.needed - here.allocated // 5, source="a fifth less")
    changes, _ = ways_to_fit(recipe, spec, plan)
    words = " ".join(as_override(word) for change in changes for word in change.overrides)
    return words or "a smaller model: nothing in the recipe takes much less"


def checkpoint_bytes(recipe: Recipe, layout: Layout) -> int:
    """What a checkpoint takes on the disk, about: adapters, PiSSA's first ones, optimizer states and scores.

    Beside them are the layout and the names of all tensors, about 1 KiB for each module, and random states.
    """
    width = WIDTHS[recipe.adapter_dtype]
    states = optimizer_states(layout, width, rule_of(recipe.training.optim), 1, "cpu")
    beside = 1024 * len(layout) + 32_768
    beside += principal_bytes(layout, width)
    return sum(adapter_bytes(layout, width, 1).values()) + sum(states) + adalora_scores(layout, 1) + beside


def write_plan(run: Run, plan: Plan, expected: Plan) -> None:
    """Write plan.json: the plan for the longest rows that the recipe allows, and for those that there are."""
    content = {**plan.to_dict(), "for_this_data": expected.to_dict()}
    write_atomically(run.plan_file, json.dumps(content, indent=2) + "\n")


def earlier_caps(recipe: Recipe) -> tuple[RankCap, ...] | None:
    """The caps of the run in the recipe's output folder; None where no run was planned there."""
    try:
        content = json.loads(Run(Path(recipe.output_dir)).plan_file.read_text(encoding="utf-8"))
        return tuple(RankCap(cap["band"], cap["asked"], cap["got"]) for cap in content["rank_caps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def with_earlier_caps(recipe: Recipe) -> Recipe:
    """The recipe as the run that is to be resumed had it: with the ranks that its plan was capped to.

    The memory that other processes take may have changed since; the adapters must not.
    """
    caps = earlier_caps(recipe) or ()
    if recipe.tasks:
        return with_task_caps(recipe, caps)
    if {cap.band: cap.asked for cap in caps} != asked_ranks(recipe):
        return recipe  # nothing was capped, or another recipe: the claim on the folder will say so
    return with_ranks(recipe, {cap.band: cap.got for cap in caps})


def plan_lines(plan: Plan) -> list[str]:
    """The plan in a few words, for the start of a run."""
    lines = []
    for cap in plan.caps:
        if cap.got < cap.asked:
            lines.append(f"note: {cap.told}: more does not fit")
    limit = f" of {format_bytes(plan.budget.vram)}" if plan.budget.vram is not None else ""
    what = "" if plan.device == "cpu" else f", {format_bytes(plan.allocated)} of them in tensors"
    at_most = plan.largest.num_parameters
    if at_most > plan.layout.num_parameters:
        lines.append(
            f"stages   may make the trained parameters {format_count(at_most)}; the memory is planned for it"
        )
    lines.append(f"memory   {format_bytes(plan.needed)}{limit} needed{what}; most in: {plan.moment}")
    if plan.fits is False:
        lines.append("note: the plan does not fit; memory.on_exceed: ignore lets it run")
    return lines
