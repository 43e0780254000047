"""The recipe's section of a sweep: arms at equal parameters, learning rates, seeds, and what is measured.

`qhybrid sft` trains the recipe without it; `qhybrid ranks sweep` puts every arm in the place of its adapters.
"""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, field_validator, model_validator

from qhybrid.recipe.band import BandSection, named_bands
from qhybrid.recipe.excerpt import excerpt
from qhybrid.recipe.ranks import DataRanks, Schedule, expand_rank_names
from qhybrid.recipe.section import Section, or_also
from qhybrid.recipe.training_fields import TrainingSection
from qhybrid.units import parse_count

Metric = Literal["loss", "exact_match", "accuracy", "f1", "macro_f1"]
OF_LABELS = frozenset({"accuracy", "f1", "macro_f1"})

# Built-in arms are called KIND-MAP, or MAP alone for LoRA: "uniform", "dora-increasing".
ARM_KINDS = ("lora", "loraplus", "rslora", "dora", "adalora")
ARM_MAPS = ("uniform", "increasing", "decreasing", "middle", "pyramid", "by_module", "random")
DATA_MAPS = ("gora", "eva")  # of all kinds but adalora, which finds its own
ARTICLE = ("low", "medium", "high", "increasing", "decreasing", "mixed")
RECIPE_ARM = "recipe"  # the recipe's own adapters

_GROUPS: dict[str, tuple[str, ...]] = {
    "maps": ARM_MAPS,
    "kinds": ("uniform", *(f"{kind}-uniform" for kind in ARM_KINDS[1:])),
    "grid": (*ARM_MAPS, *(f"{kind}-{name}" for kind in ARM_KINDS[1:] for name in ARM_MAPS)),
    "data": DATA_MAPS,
    "article": tuple(f"article-{name}" for name in ARTICLE),
}
BUILT_IN_ARMS = (
    *_GROUPS["grid"],
    *DATA_MAPS,
    *(f"{kind}-{name}" for kind in ARM_KINDS[1:-1] for name in DATA_MAPS),
    *_GROUPS["article"],
    RECIPE_ARM,
)

_ARM_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
# What an arm's training cannot set, and what does.
_OWNED = {"learning_rate": "learning_rates, its own or the sweep's", "seed": "sweep.seeds, alike for all arms"}
_MOST_RATES = 20
_RATE_DIGITS = 3
# A list, or {low, high, trials} for rates at equal ratios.
_Rates = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...],
    Field(min_length=1, max_length=_MOST_RATES, strict=False),
    BeforeValidator(lambda value: _rates_between(value) if isinstance(value, dict) else value),
    AfterValidator(lambda value: _without_doubles("learning_rates", value)),
    or_also({"type": "object"}),
]


def is_uniform(word: str) -> bool:
    """Whether a built-in arm has one rank everywhere."""
    return word in _GROUPS["kinds"]


class ArmSection(Section):
    """One arm, or a group of built-in ones: what takes the place of the recipe's own adapters and training."""

    arm: str | None = None  # a built-in one, or a group of them
    name: Annotated[str, Field(max_length=64, pattern=_ARM_NAME)] | None = None  # the built-in one's when left out
    adapters: (
        Annotated[tuple[BandSection, ...], Field(min_length=1, strict=False), or_also({"type": "object"})] | None
    ) = None
    schedule: Schedule | None = None
    ranks: DataRanks | None = None
    training: TrainingSection | None = None  # what differs from the recipe's
    learning_rates: _Rates | None = None  # in the place of the sweep's

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, values: Any) -> Any:
        if isinstance(values, str):  # a name alone needs no mapping
            values = {"arm": values}
        return expand_rank_names(named_bands(values))

    @field_validator("arm")
    @classmethod
    def _is_built_in(cls, value: str | None) -> str | None:
        known = (*BUILT_IN_ARMS, *_GROUPS)
        if value is None or value in known:
            return value
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.5) if len(value) <= 100 else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{excerpt(value)} is not a built-in arm{hint} (KIND-MAP of {', '.join(ARM_KINDS)} and "
            f"{', '.join((*ARM_MAPS, *DATA_MAPS))}; {RECIPE_ARM}; or the groups {', '.join(_GROUPS)})"
        )

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        own = self.adapters is not None or self.schedule is not None or self.ranks is not None
        if self.arm is not None and own:
            raise ValueError(f"the arm {self.arm} is built in, and has adapters of its own; give one of them")
        if self.arm is None and self.adapters is None:
            raise ValueError("the arm is empty: give it adapters, or name a built-in one with arm")
        if self.arm is None and self.name is None:
            raise ValueError("an arm with adapters of its own needs a name")
        if self.arm in _GROUPS and self.name is not None:
            raise ValueError(f"name has no effect on {self.arm}, which is a group of arms")
        for field, place in _OWNED.items():
            if self.training is not None and field in self.training.model_fields_set:
                raise ValueError(f"training.{field} of an arm is set by {place}")
        return self

    @field_serializer("training")
    def _what_differs(self, value: TrainingSection | None) -> dict[str, Any] | None:
        return None if value is None else value.model_dump(mode="json", exclude_unset=True)

    @property
    def members(self) -> tuple[ArmSection, ...]:
        """The arms of a group; the arm itself otherwise, with its name."""
        if self.arm in _GROUPS:
            return tuple(self.model_copy(update={"arm": word, "name": word}) for word in _GROUPS[self.arm])
        return (self if self.name else self.model_copy(update={"name": self.arm}),)


_Arm = Annotated[ArmSection, or_also({"type": "string"})]


class MeasuresSection(Section):
    """What is measured on the held-out rows, and how many of them."""

    metrics: Annotated[tuple[Metric, ...], Field(min_length=1, strict=False)] = ("loss",)  # the first one decides
    labels: Annotated[tuple[str, ...], Field(min_length=2, strict=False)] | None = None  # the first: F1's positive
    answer_after: Annotated[str, Field(min_length=1)] | None = None  # "####": exact match of what follows it
    rows: Annotated[int, Field(ge=1)] | None = None  # the first ones of the held-out rows
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None  # of a generated answer; 128
    batch_size: Annotated[int, Field(ge=1)] = 16

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("a metric is named twice")
        needed = sorted(OF_LABELS & set(self.metrics))
        if needed and self.labels is None:
            raise ValueError(f"{needed[0]} needs labels, such as [yes, no]")
        if self.labels is not None and not needed:
            raise ValueError(f"labels have no effect without one of {', '.join(sorted(OF_LABELS))}")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("a label is named twice")
        for name in ("answer_after", "max_new_tokens"):
            if getattr(self, name) is not None and "exact_match" not in self.metrics:
                raise ValueError(f"{name} has no effect without the metric exact_match")
        return self


class PruneSection(Section):
    """When a run of the search is given up: by optuna's percentile pruner, on the losses of its evaluations."""

    percentile: Annotated[float, Field(gt=0, lt=100)] = 50.0  # it goes on while among the best this many percent
    after: Annotated[float, Field(ge=0, lt=1)] = 0.25  # a share of the run


class SweepSection(Section):
    """What `qhybrid ranks sweep` runs: every arm at every learning rate, then from every seed at its best one."""

    rank: Annotated[int, Field(ge=1)] | None = None  # the budget: parameters of uniform LoRA of this rank
    parameters: Annotated[int, Field(ge=1)] | None = None  # or in numbers: "1.2M"
    target_modules: Annotated[tuple[str, ...], Field(strict=False), or_also({"type": "string"})] = ("all-linear",)
    arms: Annotated[tuple[_Arm, ...], Field(min_length=1, strict=False)]
    control: str = "uniform"  # the arm that all others are compared to
    learning_rates: _Rates  # of every arm that has none of its own
    search_seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False)] | None = (
        None  # that the rates are compared with; the first of seeds
    )
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False)] = (0, 1, 2)
    measure: MeasuresSection = MeasuresSection()
    prune: PruneSection | None = None

    @field_validator("parameters", mode="before", json_schema_input_type=int | str)
    @classmethod
    def _is_a_count(cls, value: Any) -> Any:
        return parse_count(value) if isinstance(value, str) else value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_target_needs_no_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if (self.rank is None) == (self.parameters is None):
            raise ValueError("the budget is given by rank or by parameters: give one of them")
        for name in ("search_seeds", "seeds"):
            _without_doubles(name, getattr(self, name) or ())
        names = [arm.name for arm in self.all_arms]
        doubled = sorted({str(name) for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"two arms are called {doubled[0]!r}; give one of them another name")
        if len(names) < 2:
            raise ValueError("a sweep compares arms: name at least two")
        control = next((arm for arm in self.all_arms if arm.name == self.control), None)
        if control is None:
            raise ValueError(f"the control {self.control!r} is not among the arms; add it to arms")
        if not is_uniform(control.arm or ""):
            raise ValueError(f"the control {self.control!r} is not one of {', '.join(_GROUPS['kinds'])}")
        return self

    @property
    def all_arms(self) -> tuple[ArmSection, ...]:
        """The arms with groups resolved, each with its name; the control first, the others as they are given."""
        arms = [member for arm in self.arms for member in arm.members]
        return tuple(sorted(arms, key=lambda arm: arm.name != self.control))

    def rates_of(self, name: str) -> tuple[float, ...]:
        """The learning rates that the arm of that name is tried with."""
        arm = next(arm for arm in self.all_arms if arm.name == name)
        return arm.learning_rates or self.learning_rates

    @property
    def seeds_of_search(self) -> tuple[int, ...]:
        """The seeds that learning rates are compared with."""
        return self.search_seeds or self.seeds[:1]


def _without_doubles(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{name} has a value twice")
    return values


def _rates_between(given: dict[str, Any]) -> list[float]:
    unknown = sorted(given.keys() - {"low", "high", "trials"}, key=str)
    if unknown or len(given) < 3:
        raise ValueError("a range of learning rates is written {low: 1e-4, high: 3e-3, trials: 4}")
    low, high, trials = (given[name] for name in ("low", "high", "trials"))
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in (low, high, trials)):
        raise ValueError("low, high and trials are numbers")
    if not 0 < low < high or not isinstance(trials, int) or not 2 <= trials <= _MOST_RATES:
        raise ValueError(f"low is above 0 and below high, and trials from 2 to {_MOST_RATES}")
    ratio = math.log(high / low) / (trials - 1)
    return [float(f"{low * math.exp(ratio * i):.{_RATE_DIGITS}g}") for i in range(trials)]


def arm_word(word: str) -> tuple[str, str]:
    """Kind and map of a built-in arm: "dora-increasing" is ("dora", "increasing"), "random" ("lora", "random")."""
    kind, separator, name = word.partition("-")
    return (kind, name) if separator else ("lora", word)


def folder_name(rate: float, seed: int) -> str:
    """The folder of one run of an arm: "lr-0.0003-seed-1"."""
    return f"lr-{rate}-seed-{seed}"  # with all digits: rates that differ have folders that differ
