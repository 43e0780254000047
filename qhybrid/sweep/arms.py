"""The arms of a sweep as recipes, the built-in ones and the user's own, all at one budget. No torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import ModelSpec
from qhybrid.errors import QhybridError, SweepError
from qhybrid.recipe.band import BandSection
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.sweep import DATA_MAPS, RECIPE_ARM, ArmSection, SweepSection, arm_word
from qhybrid.sweep.budget import Equalled, at_budget, mean_rank, parameters_at_end

# GoRA (arXiv 2502.12171) finds most of the rank in W_v and least in W_q.
_MODULE_WEIGHTS = {
    "q_proj": 1.0, "k_proj": 2.0, "v_proj": 4.0, "o_proj": 2.0, "gate_proj": 2.0, "up_proj": 2.0, "down_proj": 2.0,
}  # fmt: skip

# Ranks of the bottom, the middle's initial rank and the top in six configurations that an article compared on a
# model of 12 layers, 5, 4 and 3 to a band. The middle is AdaLoRA with a target rank of 8 in all of them.
_ARTICLE = {
    "low": (4, 8, 8), "medium": (8, 16, 16), "high": (16, 32, 32),
    "increasing": (4, 16, 64), "decreasing": (64, 16, 4), "mixed": (8, 24, 48),
}  # fmt: skip
_ARTICLE_TARGET = 8
_ARTICLE_DEPTH = (0, 5 / 12, 9 / 12, 1)

_DEFAULT_RANK = BandSection.model_fields["rank"].default


@dataclass(frozen=True)
class Arm:
    """One arm at the budget. `layout` is that of the first seed; only random maps have another for each."""

    name: str
    description: str
    is_control: bool
    template: Recipe
    layout: Layout
    is_drawn: bool  # its map depends on the seed
    note: str  # what was done to its ranks

    @property
    def parameters(self) -> int:
        """Of the finished adapter."""
        return parameters_at_end(self.layout)

    @property
    def mean_rank(self) -> float:
        """At the end, weighted by the modules' sizes."""
        return mean_rank(self.layout)

    def recipe(self, learning_rate: float, seed: int, output_dir: str) -> Recipe:
        """What one run of the arm trains."""
        training = self.template.training.model_copy(update={"learning_rate": learning_rate, "seed": seed})
        update: dict[str, Any] = {"training": training, "output_dir": output_dir}
        if self.is_drawn:
            update["schedule"] = self.template.schedule.model_copy(update={"seed": seed})
        return self.template.model_copy(update=update)


def budget_of(recipe: Recipe, spec: ModelSpec) -> int:
    """The parameters that every arm has: of LoRA of rank `sweep.rank` on all target modules, or those given.

    Raises:
        SweepError: the model has no such modules, or they are too small for the rank.
    """
    sweep = recipe.sweep
    assert sweep is not None
    if sweep.parameters is not None:
        return sweep.parameters
    assert sweep.rank is not None
    band = {"band": "all", "rank": sweep.rank, "target_modules": sweep.target_modules}
    try:
        return parameters_at_end(build_layout(_composed(recipe, adapters=[band], stages=[]), spec))
    except QhybridError as error:
        at = ("sweep", "target_modules" if "target_modules" in error.at else "rank")
        raise SweepError(f"the budget of the sweep: {error.message}", hint=error.hint, at=at) from None


def build_arms(recipe: Recipe, spec: ModelSpec) -> tuple[Arm, ...]:
    """Every arm of `recipe.sweep` on this model, the control first.

    Raises:
        SweepError: an arm is not a valid recipe, does not fit the model, or cannot be given as many parameters.
    """
    sweep = recipe.sweep
    assert sweep is not None
    parameters = budget_of(recipe, spec)
    return tuple(_build(arm, sweep, recipe, spec, parameters) for arm in sweep.all_arms)


def _build(arm: ArmSection, sweep: SweepSection, recipe: Recipe, spec: ModelSpec, parameters: int) -> Arm:
    name = arm.name or ""
    at = ("sweep", "arms", next(i for i, given in enumerate(sweep.arms) if arm in given.members))
    try:
        sections, description = _sections(arm, sweep, recipe, spec)
        if arm.training is not None:
            given = {field: getattr(arm.training, field) for field in arm.training.model_fields_set}
            sections["training"] = recipe.training.model_dump(exclude_unset=True) | given
        found: Equalled = at_budget(_composed(recipe, **sections), spec, parameters, name)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        raise SweepError(f"the arm {name}: {f'{place}: ' if place else ''}{message}", at=at) from None
    except SweepError as error:
        error.at = at
        raise
    except QhybridError as error:
        raise SweepError(f"the arm {name}: {error.message}", hint=error.hint, at=at) from None
    drawn = arm.arm is not None and arm_word(arm.arm)[1] == "random"
    return Arm(
        name=name,
        description=description,
        is_control=name == sweep.control,
        template=found.recipe,
        layout=found.layout,
        is_drawn=drawn,
        note=found.note,
    )


def _composed(recipe: Recipe, **sections: Any) -> Recipe:
    """The recipe with other sections; without a sweep, and without lowering ranks to the memory."""
    values = recipe.model_dump(exclude_unset=True, exclude={"sweep", "adapters", "schedule", "ranks"})
    memory = values.get("memory", {})
    if recipe.memory.on_exceed == "cap_rank":  # an arm of lower rank would not be equal any more
        values["memory"] = {**memory, "on_exceed": "error"}
    return Recipe.model_validate(values | sections)


def _sections(arm: ArmSection, sweep: SweepSection, recipe: Recipe, spec: ModelSpec) -> tuple[dict[str, Any], str]:
    """What takes the place of the recipe's adapters, and the arm in a few words."""
    if arm.arm is None or arm.arm == RECIPE_ARM:
        owner = recipe if arm.arm else arm
        values = owner.model_dump(exclude_unset=True, include={"adapters", "schedule", "ranks"})
        return values, _words(owner)
    kind, name = arm_word(arm.arm)
    if kind == "article":
        return _article(name, sweep, spec)
    band = {"band": "all", "kind": kind, "target_modules": sweep.target_modules}
    if name in DATA_MAPS:
        return {"adapters": [band], "ranks": {"method": name}}, f"{kind}, ranks by {name}"
    schedule: dict[str, Any] = {"name": name}
    if name == "by_module":
        schedule["weights"] = _MODULE_WEIGHTS
    if name == "random":
        schedule["seed"] = sweep.seeds[0]
    return {"adapters": [band], "schedule": schedule}, f"{kind}, {name.replace('_', ' ')}"


def _article(name: str, sweep: SweepSection, spec: ModelSpec) -> tuple[dict[str, Any], str]:
    """Three bands at the depths of the article, LoRA, AdaLoRA and LoRA, their final ranks in its proportions."""
    bottom, initial, top = _ARTICLE[name]
    cuts = [round(spec.num_layers * share) for share in _ARTICLE_DEPTH]
    ranks = (bottom, _ARTICLE_TARGET, top)
    sizes = [end - start for start, end in itertools.pairwise(cuts)]
    if 0 in sizes:
        raise SweepError(
            f"the arm article-{name} needs a layer for each of three bands, and there are {spec.num_layers}"
        )
    bands: list[dict[str, Any]] = []
    for band, kind, start, end in zip(
        ("bottom", "middle", "top"), ("lora", "adalora", "lora"), cuts, cuts[1:], strict=False
    ):
        bands.append(
            {
                "band": band,
                "kind": kind,
                "layers": f"{start}-{end - 1}",
                "target_modules": sweep.target_modules,
            }
        )
    # Told for the default rank, as the schedule gives every module its own.
    bands[1]["adalora"] = {"init_rank": _DEFAULT_RANK * initial // _ARTICLE_TARGET}
    weights = tuple(float(rank) for rank, size in zip(ranks, sizes, strict=True) for _ in range(size))
    words = f"lora / adalora / lora at {bottom} : {initial}→{_ARTICLE_TARGET} : {top}"
    return {"adapters": bands, "schedule": {"name": "custom", "weights": weights}}, words


def _words(owner: Recipe | ArmSection) -> str:
    bands = owner.adapters or ()
    kinds = " / ".join("loraplus" if band.loraplus_lr_ratio != 1 else band.kind for band in bands)
    if owner.schedule is not None:
        return f"{kinds}, {owner.schedule.name.replace('_', ' ')}"
    return f"{kinds}, ranks by {owner.ranks.method}" if owner.ranks is not None else f"{kinds}, own ranks"
