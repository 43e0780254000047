"""The plan of several tasks in one process: one base, the adapters and states of all, the activations of one.

Steps of the tasks come one after the other, so that only the largest task's activations count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.concatenate import concatenate
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import ModelSpec
from qhybrid.planner import constants
from qhybrid.planner.advise import Change, overrides_between, ways_to_fit
from qhybrid.planner.holdings import adalora_scores, adapter_bytes, dora_norms, optimizer_states
from qhybrid.planner.memory import Prediction, predict, predict_largest
from qhybrid.planner.optimizers import rule_of
from qhybrid.planner.plan import Budget, Plan, RankCap, assemble
from qhybrid.planner.solve import (
    Planner,
    fits,
    largest,
    largest_ranks,
    rank_caps,
    rank_steps,
    with_ranks,
    with_training,
)
from qhybrid.planner.workload import WIDTHS, Device
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.tasks import (
    ONE_FOR_ALL,
    ONE_FOR_SHARED,
    OWN_SECTIONS,
    SHARED,
    adapter_recipes,
    of_task,
    task_recipes,
    with_adapter_recipes,
)

_SHARES = 64  # ranks are lowered in so many steps
# training's, where memory.checkpoint_layers is for all
_CHECKPOINTING = (
    "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs",
)  # fmt: skip
_FOR_ALL_TASKS = (*ONE_FOR_ALL, *ONE_FOR_SHARED, *_CHECKPOINTING)
_OF_THE_BASE = ("base weights", "unquantised weights")
_STATIC = (*_OF_THE_BASE, "adapters", "optimizer states", "AdaLoRA scores", "DoRA norms")


def plan_tasks(
    recipe: Recipe,
    spec: ModelSpec,
    budget: Budget,
    *,
    device: Device = "cuda",
    longest: Mapping[str, int | None] | None = None,
    caps: tuple[RankCap, ...] = (),
    process_bytes: int = constants.PROCESS_BYTES,
) -> Plan:
    """Plan a recipe with tasks on this model.

    Args:
        longest: tokens of the longest row of each task, where the data is known.
        caps, process_bytes: as for `make_plan`.

    Raises:
        LayoutError: the bands of a task do not fit the model.
    """
    parts = adapter_recipes(recipe)
    asked = {}
    for name, part in parts.items():
        with of_task(name):
            asked[name] = build_layout(part, spec)
    layouts, predictions = dict(asked), {}
    for name, part in task_recipes(recipe).items():
        with of_task(name):
            own: dict[str, Any] = {"device": device, "longest": (longest or {}).get(name)}
            if recipe.shared is None:
                layouts[name], predictions[name] = predict_largest(part, spec, asked[name], **own)
            else:  # and no stages
                both = concatenate(asked[SHARED], asked[name])
                predictions[name] = predict(part, spec, both, **own)
    lead = max(predictions, key=lambda name: _passing(predictions[name]))
    prediction = _together(parts, layouts, predictions, lead, device)
    plan = assemble(
        recipe,
        spec,
        budget,
        _whole(asked),
        _whole(layouts),
        prediction,
        device=device,
        caps=caps,
        process_bytes=process_bytes,
        threads=len(predictions) + 1,
    )
    return replace(plan, largest_task=lead)


def _whole(layouts: Mapping[str, Layout]) -> Layout:
    return Layout(
        tuple(replace(row, band=_named(name, row.band)) for name, layout in layouts.items() for row in layout)
    )


def _named(name: str, band: str) -> str:
    """A band among those of all tasks; what all share is one."""
    return SHARED if name == SHARED else f"{name}.{band}"


def _passing(prediction: Prediction) -> int:
    """What comes and goes in a step, at its most."""
    return prediction.peak - prediction.moments["model and states"]


def _together(
    parts: Mapping[str, Recipe],
    layouts: Mapping[str, Layout],
    predictions: Mapping[str, Prediction],
    lead: str,
    device: Device,
) -> Prediction:
    """The prediction of all tasks, from those of each task with the shared adapter."""
    rounding = 512 if device == "cuda" else 1
    largest = predictions[lead]
    static = {name: largest.components.get(name, 0) for name in _OF_THE_BASE}
    static |= dict.fromkeys(_STATIC[len(_OF_THE_BASE) :], 0)
    bands: dict[str, int] = {}
    unified = 0
    for name, part in parts.items():
        layout, width = layouts[name], WIDTHS[part.adapter_dtype]
        own = adapter_bytes(layout, width, rounding)
        on_device, paged = optimizer_states(layout, width, rule_of(part.training.optim), rounding, device)
        bands |= {_named(name, band): size for band, size in own.items()}
        unified += paged
        static["adapters"] += sum(own.values())
        static["optimizer states"] += on_device
        static["AdaLoRA scores"] += adalora_scores(layout, rounding)
        static["DoRA norms"] += dora_norms(layout, rounding)
    resting = sum(static.values())
    moments = {"model and states": resting}
    for prediction in predictions.values():
        for moment, total in prediction.moments.items():
            passing = total - prediction.moments["model and states"]
            moments[moment] = max(moments.get(moment, 0), resting + passing)
    passing = {name: size for name, size in largest.components.items() if name not in _STATIC}
    assumptions = [f"activations of one task at a time; {lead} takes most"]
    for name, prediction in predictions.items():
        assumptions += [f"{name}: {text}" for text in prediction.assumptions]
    return Prediction(
        peak=resting + _passing(largest),
        moment=largest.moment,
        components={name: size for name, size in (static | passing).items() if size},
        moments=moments,
        bands=bands,
        unified=unified,
        host=0,
        assumptions=tuple(assumptions),
    )


# ---- what to change ----


def lower_ranks(recipe: Recipe, spec: ModelSpec, plan: Planner) -> Recipe | None:
    """The ranks of all tasks, and of what they share, lowered by about the same share as far as it fits.

    In 64ths of the bytes of each; within a task as `solve_rank` lowers them.

    Returns:
        None if not even the smallest ranks fit.
    """
    parts = adapter_recipes(recipe)

    def lowered(share: int) -> Recipe:
        return with_adapter_recipes(
            recipe, {name: _with_share(part, spec, share / _SHARES) for name, part in parts.items()}
        )

    best = largest(0, _SHARES, lambda share: fits(plan, lowered(share)))
    return None if best is None else lowered(best)


def _with_share(recipe: Recipe, spec: ModelSpec, share: float) -> Recipe:
    """The largest ranks at which the adapters take that share of what they were asked to take."""
    allowed = share * build_layout(recipe, spec).num_parameters
    found = largest_ranks(
        recipe,
        spec,
        lambda tried: build_layout(tried, spec).num_parameters <= allowed,
        no_more_than_asked=True,
    )
    return found or with_ranks(recipe, rank_steps(recipe, spec, no_more_than_asked=True)[0])


def task_caps(asked: Recipe, got: Recipe) -> tuple[RankCap, ...]:
    """What every band of every task asked for and got."""
    after = adapter_recipes(got)
    return tuple(
        replace(cap, band=_named(name, cap.band))
        for name, part in adapter_recipes(asked).items()
        for cap in rank_caps(part, after[name])
    )


def with_task_caps(recipe: Recipe, caps: tuple[RankCap, ...]) -> Recipe:
    """The recipe with the ranks that `caps` say; as it is where they are of another recipe."""
    given = {cap.band: cap for cap in caps}
    changed = {}
    for name, part in adapter_recipes(recipe).items():
        own = {cap.band: (cap.asked, given.get(_named(name, cap.band))) for cap in rank_caps(part, part)}
        if any(cap is None or cap.asked != asked for asked, cap in own.values()):
            return recipe
        changed[name] = with_ranks(part, {band: cap.got for band, (_, cap) in own.items() if cap is not None})
    return with_adapter_recipes(recipe, changed)


def ways_to_fit_tasks(recipe: Recipe, spec: ModelSpec, plan: Planner) -> tuple[list[Change], bool]:
    """As `ways_to_fit`: changes of the task whose activations are largest, then of the one that is so then."""
    taken: list[Change] = []
    seen: set[str] = set()
    while (here := plan(recipe)).fits is False:
        name = here.largest_task
        if name is None or name in seen:
            return taken, False
        seen.add(name)
        now = recipe

        def replan(tried: Recipe, name: str = name, now: Recipe = now) -> Plan:
            return plan(with_task(now, name, tried))

        changes, enough = ways_to_fit(task_recipes(now)[name], spec, replan)
        for change in changes:
            recipe = with_task(now, name, change.recipe)
            words = tuple(task_override(now, name, word) for word in change.overrides)
            taken.append(replace(change, overrides=words, recipe=recipe))
        if enough:
            return taken, True
    return taken, True


def with_task(recipe: Recipe, name: str, changed: Recipe) -> Recipe:
    """The recipe with another recipe of one task; what must be one for all, or is best so, changes for all."""
    parts = adapter_recipes(recipe) | {name: changed}
    before = task_recipes(recipe)[name].training
    common = {
        field: value
        for field in _FOR_ALL_TASKS
        if (value := getattr(changed.training, field)) != getattr(before, field)
    }
    parts = {other: with_training(part, **common) if common else part for other, part in parts.items()}
    whole = {section: getattr(changed, section) for section in ("model", "quantization", "memory")}
    return with_adapter_recipes(recipe, parts).model_copy(update=whole)


def task_override(recipe: Recipe, name: str, word: str) -> str:
    """The command line's words for `with_task`, where `word` changes the recipe of the task alone."""
    section, _, rest = word.partition(".")
    if section not in OWN_SECTIONS:
        return word
    names = [task.name for task in recipe.tasks]
    is_for_all = section == "training" and rest.partition("=")[0] in _FOR_ALL_TASKS
    # The command line splits at dots, and takes digits for a place in the list.
    shown = [str(place) if "." in each or each.isdigit() else each for place, each in enumerate(names)]
    return " ".join(
        f"tasks.{each}.{word}" for each, own in zip(shown, names, strict=True) if is_for_all or own == name
    )


def task_overrides_between(before: Recipe, after: Recipe) -> tuple[str, ...]:
    """The command line's words that turn the adapters of one recipe with tasks into those of the other."""
    changed = adapter_recipes(after)
    words = []
    for name, part in adapter_recipes(before).items():
        for word in overrides_between(part, changed[name]):
            own = task_override(before, name, word)
            words.append(f"shared.{word.split('.', 2)[2]}" if name == SHARED else own)
    return tuple(words)
