"""`qhybrid plan`: what a recipe needs, whether it fits, and what to change. Without torch, but for --simulate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qhybrid.base.facts import ModelFacts
    from qhybrid.planner.plan import Budget, Plan
    from qhybrid.recipe.load import LoadedRecipe
    from qhybrid.recipe.schema import Recipe

_QUANTITIES = ("rank", "micro_batch", "max_length", "checkpointing")

# What --model alone means: QLoRA's usual setting on rows of 2,048 tokens.
_DEFAULT_RECIPE = """\
model: {path: placeholder}
adapters: [{band: all, rank: 16}]
data: {sources: rows.jsonl}
training: {per_device_train_batch_size: 1, max_length: 2048, gradient_checkpointing: true}
output_dir: run
"""


@click.command("plan")
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--model", help="A model in place of the recipe's: a name of the catalog, a hub id or a folder.")
@click.option("--config", type=click.Path(), help="A config.json or model folder with the model's shape.")
@click.option("--vram", help='The memory there is: "24GiB".')
@click.option("--gpu", help='The card: "RTX 4090". Its memory is the limit where --vram is not given.')
@click.option("--context", help='What CUDA itself takes of the card: "512MiB" when left out.')
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="cuda, or cpu where the recipe asks for it.")
@click.option("--solve", "quantity", type=click.Choice(_QUANTITIES), help="The largest value that fits.")
@click.option("--simulate", is_flag=True, help="Check the figures with a simulated step (takes seconds).")
@click.option("--recommend", is_flag=True, help="Propose bands for --task and --rows, with reasons.")
@click.option("--task", help="With --recommend: generation, classification, …")
@click.option("--rows", type=int, help="With --recommend: the number of training rows.")
@click.option("--tokens-per-row", type=int, help="With --recommend: an average; assumed when left out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    config: str | None,
    vram: str | None,
    gpu: str | None,
    context: str | None,
    device: Any,
    quantity: Any,
    simulate: bool,
    recommend: bool,
    task: str | None,
    rows: int | None,
    tokens_per_row: int | None,
    as_json: bool,
) -> None:
    """What RECIPE needs, by component, and whether it fits. Nothing is downloaded.

    RECIPE and OVERRIDES are as for `qhybrid sft`; with --model no recipe is needed. Exit code 0: it fits, or no
    limit is known; 1: it does not fit.
    """
    from qhybrid.base.facts import model_facts
    from qhybrid.cli import plan_text

    if recommend:
        if quantity or simulate:
            raise click.UsageError("--recommend goes without --solve and --simulate")
        if task is None or rows is None:
            raise click.UsageError("--recommend needs --task and --rows")
    elif task is not None or rows is not None or tokens_per_row is not None:
        raise click.UsageError("--task, --rows and --tokens-per-row belong to --recommend")
    source = _load(recipe, overrides, model)
    loaded = source.recipe
    facts = model_facts(loaded.model, config)
    chosen = device or ("cpu" if loaded.training.use_cpu else "cuda")
    budget = _budget(loaded, vram, gpu, context, chosen)
    if recommend:
        if loaded.tasks:
            raise click.UsageError("--recommend is for one adapter: leave the section tasks out")
        _recommend(loaded, facts, budget, chosen, task or "", rows or 0, tokens_per_row, as_json)
        return
    if loaded.tasks and (quantity or simulate):
        raise click.UsageError("--solve and --simulate are for one adapter: leave the section tasks out")
    if simulate and not loaded.distributed.is_single:
        raise click.UsageError("--simulate runs one process without ZeRO: leave the section distributed out")
    with source.placing():
        planned, result, found = (
            _solve(quantity, loaded, facts, budget, chosen)
            if quantity
            else (*_plan(loaded, facts, budget, chosen), True)
        )
    simulated = _simulate(planned, facts, chosen) if simulate else None
    if as_json:
        content = result.to_dict() | ({"simulated": simulated} if simulated else {})
        if quantity:
            content["solved"] = plan_text.solved(quantity, planned) if found else None
        click.echo(json.dumps(content, indent=2))
    else:
        for notice in source.notices:
            click.echo(f"note: {notice}")
        plan_text.show(planned, result, facts, simulated=simulated, quantity=quantity, asked=loaded)
    if result.fits is False:
        raise SystemExit(1)


def _load(recipe: str | None, overrides: tuple[str, ...], model: str | None) -> LoadedRecipe:
    """The recipe with nothing left open."""
    from qhybrid.recipe.load import LoadedRecipe, load_recipe, parse_recipe, resolve

    if (
        recipe is not None and "=" in recipe and model is not None
    ):  # qhybrid plan --model X training.max_length=512
        recipe, overrides = None, (recipe, *overrides)
    chosen = (*overrides, f"model.path={json.dumps(model)}") if model is not None else overrides
    if recipe is None:
        if model is None:
            raise click.UsageError("Name a recipe, or a model with --model.")
        parsed, notices = parse_recipe(_DEFAULT_RECIPE, "default", chosen)
        return LoadedRecipe(resolve(parsed), Path("default"), tuple(notices))
    loaded = load_recipe(recipe, chosen)
    return replace(loaded, recipe=resolve(loaded.recipe))


def _budget(recipe: Recipe, vram: str | None, gpu: str | None, context: str | None, device: str) -> Budget:
    from qhybrid.errors import HardwareError
    from qhybrid.planner import constants
    from qhybrid.planner.hardware import find_gpu
    from qhybrid.planner.plan import Budget
    from qhybrid.units import parse_bytes

    def amount(option: str, text: str) -> int:
        try:
            return parse_bytes(text)
        except ValueError as error:
            raise HardwareError(f"{option}: {error}") from None

    if device == "cpu" and gpu is not None:
        raise HardwareError("--gpu has no effect on a plan for the CPU", hint="give the host's memory with --vram")
    card = find_gpu(gpu) if gpu is not None else None
    own = constants.CUDA_CONTEXT_BYTES if context is None else amount("--context", context)
    limits: list[tuple[int, str]] = []
    if vram is not None:
        limits.append((amount("--vram", vram), "--vram"))
        if card is not None and limits[0][0] > card.memory_bytes:
            raise HardwareError(f"--vram {vram} is more than the {card.name} has", hint="leave --vram out")
    elif recipe.memory.vram is not None and device == "cuda":
        limits.append((parse_bytes(recipe.memory.vram), "memory.vram"))
    if card is not None:
        limits.append((card.memory_bytes, card.name))
    limit, source = min(limits, default=(None, ""))
    return Budget(limit, card, own, source)


def _plan(recipe: Recipe, facts: ModelFacts, budget: Budget, device: Any) -> tuple[Recipe, Plan]:
    from qhybrid.planner.plan import make_plan
    from qhybrid.planner.tasks import plan_tasks

    return recipe, (plan_tasks if recipe.tasks else make_plan)(recipe, facts.spec, budget, device=device)


def _solve(
    quantity: Any, recipe: Recipe, facts: ModelFacts, budget: Budget, device: Any
) -> tuple[Recipe, Plan, bool]:
    """The recipe with the largest value, its plan, and whether there is one that fits."""
    from qhybrid.errors import HardwareError
    from qhybrid.planner.plan import make_plan
    from qhybrid.planner.solve import rank_caps, solve

    if budget.vram is None:
        raise HardwareError("--solve needs a limit", hint="give --vram, --gpu, or memory.vram in the recipe")
    found = solve(quantity, recipe, facts.spec, lambda tried: make_plan(tried, facts.spec, budget, device=device))
    if found is None:  # not even the smallest value fits: the plan says so
        return recipe, make_plan(recipe, facts.spec, budget, device=device), False
    caps = rank_caps(recipe, found) if quantity == "rank" else ()
    return found, make_plan(found, facts.spec, budget, device=device, caps=caps), True


def _simulate(recipe: Recipe, facts: ModelFacts, device: Any) -> dict[str, Any]:
    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
    from qhybrid.planner.workload import how_it_runs
    from qhybrid.simulation.step import simulate

    padded = how_it_runs(recipe, facts.spec, device).masked
    result = simulate(recipe, facts.config, device=device, padded=padded)
    return {
        "allocated_bytes": result.peak_bytes,
        "reserved_bytes": result.reserved_bytes,
        "moment": result.moment,
        "components": result.components,
    }


def _recommend(
    recipe: Recipe,
    facts: ModelFacts,
    budget: Budget,
    device: Any,
    task: str,
    rows: int,
    tokens_per_row: int | None,
    as_json: bool,
) -> None:
    from qhybrid.cli import plan_text
    from qhybrid.planner.plan import make_plan
    from qhybrid.planner.recommend import recommend
    from qhybrid.planner.solve import rank_caps, solve_rank, with_ranks

    advice = recommend(facts.spec, task=task, rows=rows, tokens_per_row=tokens_per_row)
    training = recipe.training.model_copy(update=advice.training)
    without = {"schedule": None, "ranks": None, "stages": (), "sweep": None}  # the recommendation has none of them
    wished = recipe.model_copy(update={"adapters": advice.bands, "training": training, **without})
    got = solve_rank(
        wished,
        facts.spec,
        lambda tried: make_plan(tried, facts.spec, budget, device=device),
        no_more_than_asked=True,
    )
    capped = got or with_ranks(wished, {band.band: band.smallest_rank for band in wished.adapters})
    caps = rank_caps(wished, capped)
    plan = make_plan(capped, facts.spec, budget, device=device, caps=caps)
    if budget.vram is not None:
        advice = advice.capped(capped.adapters)
    named = "/" not in recipe.model.path and facts.hub_id  # a name of the catalog, which sft does not know
    text = advice.to_recipe(named or recipe.model.path)
    if as_json:
        choices = [
            {"name": choice.name, "value": choice.value, "reason": choice.reason, "source": choice.source}
            for choice in advice.choices
        ]
        content = {"choices": choices, "notes": list(advice.notes), "recipe": text, "plan": plan.to_dict()}
        click.echo(json.dumps(content, indent=2))
    else:
        plan_text.show_recommendation(text, capped, plan, facts)
    if plan.fits is False:
        raise SystemExit(1)
