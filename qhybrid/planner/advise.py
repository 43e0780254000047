"""What to change when a recipe does not fit, and what to spend on when there is room."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from qhybrid.architecture.growth import least_cost
from qhybrid.architecture.spec import ModelSpec
from qhybrid.planner.plan import Plan
from qhybrid.planner.solve import (
    Planner,
    asked_ranks,
    checkpointing,
    fits,
    largest,
    solve,
    solve_rank,
    with_ranks,
    with_training,
)
from qhybrid.planner.workload import checkpointed_layers, row_length
from qhybrid.recipe.schema import Recipe

# A frozen base takes 2N FLOPs a token forward and 2N backward, and 2N more where a layer is computed again.
_RECOMPUTATION = 0.5
_WORTH_TELLING = 0.01  # a change that saves less of what is needed is not proposed
_SHORTEST = 256  # tokens
_LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Change:
    """One change of a recipe: the overrides that make it, what it saves in bytes, and what it costs."""

    overrides: tuple[str, ...]
    saves: int  # negative: it spends
    price: str
    recipe: Recipe


def ways_to_fit(recipe: Recipe, spec: ModelSpec, plan: Planner) -> tuple[list[Change], bool]:
    """Changes that together make `recipe` fit, the cheapest first, and whether they do.

    The order is that of effect and price: the loss, recomputation, dtypes, the optimizer, the micro-batch (with as
    many accumulation steps more), then what changes the result: adapted modules, rank, and the length of rows.
    """
    taken: list[tuple[str, Change]] = []
    now, here = recipe, plan(recipe)
    for name, lever in _LEVERS.items():
        if here.fits is not False:
            break
        proposed = lever(now, spec, plan)
        if proposed is None:
            continue
        changed, price = proposed
        after = plan(changed)
        if here.needed - after.needed < _WORTH_TELLING * here.needed and after.fits is False:
            continue
        taken.append((name, _change(now, changed, here, after, price)))
        now, here = changed, after
    if here.fits is False:
        return [change for _, change in taken], False
    return _without_what_is_not_needed(recipe, spec, plan, [name for name, _ in taken]), True


def _without_what_is_not_needed(recipe: Recipe, spec: ModelSpec, plan: Planner, names: list[str]) -> list[Change]:
    """The same changes without those that are not needed: each is left out in turn, the dearest first."""
    for name in list(reversed(names)):
        fewer = [other for other in names if other != name]
        if fits(plan, _apply(recipe, spec, plan, fewer)[0]):
            names = fewer
    return _apply(recipe, spec, plan, names)[1]


def _apply(recipe: Recipe, spec: ModelSpec, plan: Planner, names: list[str]) -> tuple[Recipe, list[Change]]:
    now, changes = recipe, []
    for name in names:
        proposed = _LEVERS[name](now, spec, plan)
        if proposed is not None:
            changed, price = proposed
            changes.append(_change(now, changed, plan(now), plan(changed), price))
            now = changed
    return now, changes


def ways_to_spend(recipe: Recipe, spec: ModelSpec, plan: Planner) -> list[Change]:
    """What the memory that is left could buy, each by itself."""
    here = plan(recipe)
    found = []
    before = len(checkpointed_layers(recipe, spec.num_layers))
    if before:
        changed = solve("checkpointing", recipe, spec, plan)
        after = len(checkpointed_layers(changed, spec.num_layers)) if changed else before
        if changed and after < before:
            faster = (1 + _RECOMPUTATION * before / spec.num_layers) / (
                1 + _RECOMPUTATION * after / spec.num_layers
            )
            found.append(
                _change(recipe, changed, here, plan(changed), f"{before - after} layers are computed once: "
                        f"up to {faster:.2f} times the speed")
            )  # fmt: skip
    longer = solve("max_length", recipe, spec, plan)
    length = recipe.training.max_length
    if longer and length and (longer.training.max_length or 0) > length:
        times = (longer.training.max_length or 0) / length
        found.append(_change(recipe, longer, here, plan(longer), f"rows of up to {times:.1f} times the length"))
    bigger = _bigger_batch(recipe, spec, plan)
    if bigger is not None:
        found.append(_change(recipe, bigger[0], here, plan(bigger[0]), bigger[1]))
    more = solve_rank(recipe, spec, plan)
    if more and asked_ranks(more) != asked_ranks(recipe):
        found.append(_change(recipe, more, here, plan(more), "rank is a weak lever: try it last"))
    return found


def _bigger_batch(recipe: Recipe, spec: ModelSpec, plan: Planner) -> tuple[Recipe, str] | None:
    """A larger micro-batch in fewer accumulation steps; a larger step where there is nothing to accumulate."""
    solved = solve("micro_batch", recipe, spec, plan)
    batch, accumulated = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    best = solved.training.per_device_train_batch_size if solved else batch
    if best <= batch:
        return None
    rows = batch * accumulated
    if accumulated == 1:
        return with_training(recipe, per_device_train_batch_size=best), f"a step is {best} rows instead of {rows}"
    whole = [size for size in range(batch + 1, min(best, rows) + 1) if rows % size == 0]
    if not whole:
        return None
    changes = {"per_device_train_batch_size": whole[-1], "gradient_accumulation_steps": rows // whole[-1]}
    return with_training(recipe, **changes), "the same step in fewer, larger parts"


# ---- the levers: (recipe, model, planner) -> the changed recipe and the price; None where there is nothing ----

_Lever = Callable[[Recipe, ModelSpec, Planner], tuple[Recipe, str] | None]


def _tiled_loss(recipe: Recipe, spec: ModelSpec, plan: Planner):
    if recipe.training.label_smoothing_factor == 0:
        return None
    return with_training(recipe, label_smoothing_factor=0.0), "faster; without label smoothing"


def _fused_attention(recipe: Recipe, spec: ModelSpec, plan: Planner):
    if recipe.model.attn_implementation != "eager" or spec.family.softcaps_attention:
        return None
    model = recipe.model.model_copy(update={"attn_implementation": "sdpa"})
    return recipe.model_copy(update={"model": model}), "faster"


def _smaller_evaluation(recipe: Recipe, spec: ModelSpec, plan: Planner):
    if plan(recipe).prediction.moment != "evaluation" or recipe.training.per_device_eval_batch_size == 1:
        return None
    best = largest(
        1,
        recipe.training.per_device_eval_batch_size,
        lambda n: plan(with_training(recipe, per_device_eval_batch_size=n)).prediction.moment != "evaluation",
    )
    return with_training(recipe, per_device_eval_batch_size=best or 1), "evaluation takes a little longer"


def _recompute(recipe: Recipe, spec: ModelSpec, plan: Planner):
    before = len(checkpointed_layers(recipe, spec.num_layers))
    if before == spec.num_layers:
        return None
    changed = solve("checkpointing", recipe, spec, plan) or checkpointing(recipe, spec, spec.num_layers)
    after = len(checkpointed_layers(changed, spec.num_layers))
    if after <= before:
        return None
    slower = (1 + _RECOMPUTATION * after / spec.num_layers) / (1 + _RECOMPUTATION * before / spec.num_layers)
    return changed, f"up to {slower:.2f} times the time: {after - before} layers are computed a second time"


def _narrow_weights(recipe: Recipe, spec: ModelSpec, plan: Planner):
    if recipe.model.dtype != "float32":
        return None
    model = recipe.model.model_copy(update={"dtype": "bfloat16", "adapter_dtype": None})
    training = recipe.training.model_copy(update={"bf16": None, "fp16": False})
    return recipe.model_copy(update={"model": model, "training": training}), "faster on GPUs with bf16"


def _quantize(recipe: Recipe, spec: ModelSpec, plan: Planner):
    if recipe.quantization.method == "nf4":
        return None
    quantization = recipe.quantization.model_copy(update={"method": "nf4", "double_quant": True})
    return recipe.model_copy(update={"quantization": quantization}), "a little slower; QLoRA's usual setting"


def _quantize_twice(recipe: Recipe, spec: ModelSpec, plan: Planner):
    if recipe.quantization.double_quant or recipe.quantization.method != "nf4":
        return None
    quantization = recipe.quantization.model_copy(update={"double_quant": True})
    return recipe.model_copy(update={"quantization": quantization}), "nothing that was measured"


def _narrow_adapters(recipe: Recipe, spec: ModelSpec, plan: Planner):
    if recipe.adapter_dtype != "float32" or recipe.model.dtype != "bfloat16" or recipe.distributed.zero_stage:
        return None
    model = recipe.model.model_copy(update={"adapter_dtype": "bfloat16"})
    return recipe.model_copy(update={"model": model}), "small updates are rounded away sooner"


def _smaller_states(recipe: Recipe, spec: ModelSpec, plan: Planner):
    if not recipe.training.optim.startswith("adamw_torch") or any(stage.expand for stage in recipe.stages):
        return None
    eight_bit = with_training(recipe, optim="adamw_bnb_8bit")
    if fits(plan, eight_bit):
        return eight_bit, "states in 8 bits"
    return with_training(recipe, optim="paged_adamw_8bit"), "states in 8 bits, which may wait in host memory"


def _smaller_batch(recipe: Recipe, spec: ModelSpec, plan: Planner):
    batch, accumulated = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    smaller = [size for size in range(min(batch - 1, _LARGEST_BATCH), 0, -1) if batch % size == 0]

    def with_batch(size: int) -> Recipe:
        steps = accumulated * batch // size
        return with_training(recipe, per_device_train_batch_size=size, gradient_accumulation_steps=steps)

    if not smaller:
        return None
    best = next((size for size in smaller if fits(plan, with_batch(size))), 1)
    return with_batch(best), "the same step in more, smaller parts: the GPU is used less well"


def _less_growth(recipe: Recipe, spec: ModelSpec, plan: Planner):
    growing = [stage.expand for stage in recipe.stages if stage.expand]
    here = plan(recipe)
    costs = [least_cost(expand, here.layout) for expand in growing]
    if not growing or None in costs:
        return None

    def with_budget(most: int) -> Recipe:
        stages = []
        for stage in recipe.stages:
            if stage.expand and (stage.expand.budget is None or stage.expand.budget > most):
                stage = stage.model_copy(update={"expand": stage.expand.model_copy(update={"budget": most})})
            stages.append(stage)
        return recipe.model_copy(update={"stages": tuple(stages)})

    least = max(cost for cost in costs if cost)
    grows = here.largest.num_parameters - here.layout.num_parameters
    best = largest(least, max(least, grows), lambda most: fits(plan, with_budget(most)))
    return with_budget(best or least), "other results: the stages expand fewer modules"


def _attention_only(recipe: Recipe, spec: ModelSpec, plan: Planner):
    bands = tuple(
        band.model_copy(update={"target_modules": ("attention",)})
        if band.target_modules in (("all-linear",), ("all",))
        else band
        for band in recipe.adapters
    )
    if bands == recipe.adapters:
        return None
    return recipe.model_copy(update={"adapters": bands}), "other results: adapters on attention alone learn less"


def _less_rank(recipe: Recipe, spec: ModelSpec, plan: Planner):
    changed = solve_rank(recipe, spec, plan, no_more_than_asked=True)
    if changed is None:
        if recipe.rank_budget is not None:
            return None
        lowest = {band.band: band.smallest_rank for band in recipe.adapters if band.rank_weight > 0}
        changed = with_ranks(recipe, lowest)
    return (changed, "other results, usually slightly") if changed != recipe else None


def _shorter_rows(recipe: Recipe, spec: ModelSpec, plan: Planner):
    training = recipe.training
    if training.padding_free and not training.packing:
        return None  # trl wants it without a max_length
    length = training.max_length or row_length(recipe, spec)
    if length <= _SHORTEST:
        return None
    shorter = [size for size in (length // 2, length // 4, length // 8) if size >= _SHORTEST]
    best = next((size for size in shorter if fits(plan, with_training(recipe, max_length=size))), None)
    if best is None:
        best = shorter[-1] if shorter else _SHORTEST
    return with_training(recipe, max_length=best), "longer rows are left out or cut"


_LEVERS: dict[str, _Lever] = {
    "loss": _tiled_loss,
    "attention": _fused_attention,
    "evaluation": _smaller_evaluation,
    "quantization": _quantize,
    "dtype": _narrow_weights,
    "checkpointing": _recompute,
    "double quantization": _quantize_twice,
    "adapter dtype": _narrow_adapters,
    "optimizer": _smaller_states,
    "batch": _smaller_batch,
    "stages": _less_growth,
    "targets": _attention_only,
    "rank": _less_rank,
    "length": _shorter_rows,
}


def _change(before: Recipe, after: Recipe, plan_before: Plan, plan_after: Plan, price: str) -> Change:
    return Change(overrides_between(before, after), plan_before.needed - plan_after.needed, price, after)


def overrides_between(before: Recipe, after: Recipe) -> tuple[str, ...]:
    """The command line's words that turn one recipe into the other."""
    found = []
    for section in ("model", "quantization", "training", "memory"):
        one, other = getattr(before, section), getattr(after, section)
        for name in type(one).model_fields:
            if getattr(one, name) != getattr(other, name):
                found.append(f"{section}.{name}={_written(getattr(other, name))}")
    if before.rank_budget != after.rank_budget:
        found.append(f"{'schedule' if before.schedule else 'ranks'}.budget={after.rank_budget}")
    for index, (one, other) in enumerate(zip(before.adapters, after.adapters, strict=True)):
        # The command line splits at dots, and takes digits for a place in the list.
        name = one.band if "." not in one.band and not one.band.isdigit() else str(index)
        if one.rank != other.rank:
            found.append(f"adapters.{name}.rank={other.rank}")
            if one.alpha is not None:
                found.append(f"adapters.{name}.alpha={other.alpha:g}")
            if one.adalora is not None and one.adalora.init_rank is not None:
                found.append(f"adapters.{name}.adalora.init_rank={other.init_rank}")
        if one.target_modules != other.target_modules:
            found.append(f"adapters.{name}.target_modules={','.join(other.target_modules)}")
    for index, (one, other) in enumerate(zip(before.stages, after.stages, strict=True)):
        if one != other and other.expand is not None:
            found.append(f"stages.{index}.expand.budget={other.expand.budget}")
    return tuple(found)


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return "null" if value is None else str(value)
