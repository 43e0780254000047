"""The memory that a recipe takes, by component and moment, in closed form: no weights, no network, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qhybrid.architecture.growth import largest_layouts
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import ModelSpec
from qhybrid.errors import RecipeError
from qhybrid.planner.holdings import (
    adalora_scores,
    adapter_bytes,
    base_weights,
    dora_norms,
    optimizer_states,
    parameters_of,
)
from qhybrid.planner.moments import Gradients, evaluation_peak, moments_of
from qhybrid.planner.optimizers import rule_of
from qhybrid.planner.workload import (
    WIDTHS,
    Device,
    Pass,
    assumptions_of,
    checkpointed_layers,
    how_it_runs,
    loss_of,
)
from qhybrid.planner.zero import SHARDED_OPTIMIZERS, ZeroCost, ZeroSetup, frozen_tensors, zero_cost
from qhybrid.recipe.schema import Recipe


@dataclass(frozen=True)
class Prediction:
    """Bytes of one process's training, as torch's allocator counts them."""

    peak: int
    moment: str  # when the peak occurs
    components: dict[str, int]  # what is alive at the peak; they sum up to it
    moments: dict[str, int]  # the most that is alive in each part of a run
    bands: dict[str, int]  # of "adapters", by band
    unified: int  # paged optimizer states, which the driver moves between the GPU and the host
    host: int  # what is offloaded to the host, page-locked or not
    assumptions: tuple[str, ...]


def predict(
    recipe: Recipe,
    spec: ModelSpec,
    layout: Layout,
    *,
    device: Device = "cuda",
    longest: int | None = None,
    padded: bool | None = None,
) -> Prediction:
    """The memory of training `recipe`, whose layout on this model is `layout`, in one of its processes.

    Args:
        device: whose kernels and rounding.
        longest: tokens of the longest row, where the data is known; training.max_length otherwise.
        padded: whether batches have padding; taken to be so for more than one row that is not packed.

    Raises:
        RecipeError: more processes than there is to share among them.
    """
    rounding = 512 if device == "cuda" else 1
    how = how_it_runs(recipe, spec, device, longest=longest, padded=padded)
    bands = adapter_bytes(layout, how.adapter_width, rounding)
    shared = None if recipe.distributed.is_single else _shared(recipe, spec, layout, how, rounding)
    optimizer = rule_of(recipe.training.optim)
    if shared is None:
        base, plain = base_weights(spec, nf4=how.nf4, nested=how.nested, width=how.width, rounding=rounding)
        on_device, unified = optimizer_states(layout, how.adapter_width, optimizer, rounding, device)
        adapters = sum(bands.values())
        static = {
            "base weights": base,
            "unquantised weights": plain,
            "adapters": adapters,
            "optimizer states": on_device,
        }
        accumulates = recipe.training.gradient_accumulation_steps > 1
        gradients = Gradients(adapters if accumulates else 0, adapters, {}, by_layer=not accumulates)
        copies = adapters * (optimizer.copies_in_step if device == "cuda" else 0)
        step = {"gradients": adapters, "optimizer's copies": copies}
        host = 0
    else:
        static = {
            "base weights": shared.base_weights,
            "unquantised weights": shared.unquantised,
            "adapters": shared.adapters,
            "optimizer states": shared.optimizer_states,
            "fp32 copies of trained weights": shared.master_weights,
            "gradient buckets": shared.resting_buckets,
        }
        passing = {
            "passing gradient buckets": shared.buckets - shared.resting_buckets,
            "gathered parameters": shared.gather,
        }
        gradients = Gradients(shared.kept_gradients, shared.gradients, passing, by_layer=False)
        step = {"gradients and their copies": shared.step}
        unified, host = shared.unified, shared.host_pinned + shared.host
        whole = sum(bands.values())
        bands = {band: round(size * shared.adapters / whole) for band, size in bands.items()}
        last = list(bands)[-1]
        bands[last] += shared.adapters - sum(bands.values())
    static["AdaLoRA scores"] = adalora_scores(layout, rounding)
    static["DoRA norms"] = dora_norms(layout, rounding)
    moments = moments_of(recipe, spec, layout, how, gradients)
    if recipe.training.eval_strategy != "no":
        evaluating = how_it_runs(recipe, spec, device, evaluating=True, longest=longest, padded=padded)
        gathered = shared.gather if shared else 0
        peak = evaluation_peak(spec, layout, evaluating, loss_of(recipe))
        moments["evaluation"] = {"activations": peak, "gathered parameters": gathered}
    moments["optimizer step"] = step
    resting = sum(static.values())
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(totals, key=lambda name: totals[name])
    components = {**static, **moments[moment]}
    notes = () if shared is None else shared.notes
    return Prediction(
        peak=resting + totals[moment],
        moment=moment,
        components={name: value for name, value in components.items() if value},
        moments={"model and states": resting, **{name: resting + total for name, total in totals.items()}},
        bands=bands,
        unified=unified,
        host=host,
        assumptions=(*assumptions_of(recipe, spec, optimizer.known), *notes),
    )


def predict_largest(recipe: Recipe, spec: ModelSpec, layout: Layout, **how: Any) -> tuple[Layout, Prediction]:
    """What the recipe's stages can make of `layout` that takes most, and its memory. `how` is for `predict`."""
    found = [(one, predict(recipe, spec, one, **how)) for one in largest_layouts(recipe, layout)]
    return max(found, key=lambda pair: pair[1].peak)


def zero_setup(recipe: Recipe, spec: ModelSpec, layout: Layout) -> ZeroSetup:
    """How the recipe's processes share the work: what is planned with, and what DeepSpeed is told.

    Raises:
        RecipeError: an optimizer that cannot be sharded.
    """
    asked = recipe.distributed
    if asked.zero_stage == 0:
        return ZeroSetup(stage=0, processes=asked.processes)
    if recipe.training.optim not in SHARDED_OPTIMIZERS:
        raise RecipeError(
            f"training.optim {recipe.training.optim} does not work with ZeRO: it is given one flat tensor of many "
            "parameters",
            hint=f"use {', '.join(SHARDED_OPTIMIZERS)}; or set distributed.zero_stage to 0",
        )
    setup = ZeroSetup.derived(
        asked.zero_stage,
        asked.processes,
        asked.offload,
        trained=[size for row in layout for size, _ in parameters_of(row, WIDTHS["float32"])],
        hidden_size=spec.hidden_size,
    )
    return replace(setup, **asked.sizes)


def _shared(recipe: Recipe, spec: ModelSpec, layout: Layout, how: Pass, rounding: int) -> ZeroCost:
    """What one of several processes holds, or one with ZeRO."""
    asked = recipe.distributed
    stage, processes, training = asked.zero_stage, asked.processes, recipe.training
    if stage and processes > spec.num_layers:
        raise RecipeError(
            f"distributed.processes {processes} is more than the model's {spec.num_layers} layers: "
            f"ZeRO {stage} has too little for each to share",
            hint="use fewer processes, or distributed.zero_stage: 0",
        )
    setup = zero_setup(recipe, spec, layout)
    base, plain = base_weights(spec, nf4=how.nf4, nested=how.nested, width=how.width, rounding=rounding)
    return zero_cost(
        setup,
        tensors=[tensor for row in layout for tensor in parameters_of(row, how.adapter_width)],
        frozen=frozen_tensors(spec, nf4=how.nf4, width=how.width),
        base_weights=base,
        unquantised=plain,
        optim=training.optim,
        half=False,  # adapters train in fp32, and DeepSpeed casts nothing
        kept_layers=spec.num_layers - len(checkpointed_layers(recipe, spec.num_layers)),
        accumulates=training.gradient_accumulation_steps > 1,
        rounding=rounding,
        on_cuda=how.device == "cuda",
    )
