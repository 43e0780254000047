"""The recipe's sections that spread one budget of parameters over modules: by a schedule, or by what data says."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from qhybrid.recipe.section import Section, or_also
from qhybrid.units import parse_bytes, parse_count

ScheduleName = Literal["uniform", "increasing", "decreasing", "middle", "pyramid", "by_module", "random", "custom"]
DataMethod = Literal["gora", "eva"]

# Without it 1,000 layers would be drawn through one point each; no model has as many.
_MOST_POINTS = 1000

Weight = Annotated[float, Field(gt=0, le=1e6)]


class BudgetSection(Section):
    """What every way to spread ranks has: the budget Σ r·(in + out), and the limits of a module's rank."""

    # A number or "20M"; what the bands' own ranks cost when left out.
    budget: Annotated[int, Field(ge=1)] | None = None
    min_rank: Annotated[int, Field(ge=1)] | None = None  # 1; gora half the average rank
    # The smaller side of the module; gora 4 and eva 2 times the average rank.
    max_rank: Annotated[int, Field(ge=1)] | None = None

    @field_validator("budget", mode="before", json_schema_input_type=int | str)
    @classmethod
    def _is_a_count(cls, value: Any) -> Any:
        return parse_count(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if self.max_rank is not None and self.max_rank < (self.min_rank or 1):
            raise ValueError(f"max_rank {self.max_rank} is below min_rank {self.min_rank}")
        return self


class ScheduleSection(BudgetSection):
    """Ranks by relative depth or by module type; every schedule spends one budget, so that they compare.

    uniform, increasing, decreasing: constant, or linear in depth. middle: the middle third has `ratio` times the
    rank of the others. pyramid: linear up to the middle and down again. by_module: by `weights` of the targets.
    random: drawn for every module (the control). custom: `weights` along the depth.
    """

    name: ScheduleName
    ratio: Annotated[float, Field(ge=1, le=1000)] | None = None  # largest wished rank over the smallest; 4
    seed: Annotated[int, Field(ge=0)] | None = None  # of random; 0
    # custom: points at equal distances from the first layer to the last, joined by lines; by_module: of targets,
    # 1 for those left out
    weights: (
        Annotated[tuple[Weight, ...], Field(min_length=2, max_length=_MOST_POINTS, strict=False)]
        | dict[str, Weight]
        | None
    ) = None

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.ratio is not None and self.name in ("uniform", "by_module", "custom"):
            raise ValueError(f"ratio has no effect on schedule {self.name}")
        if self.seed is not None and self.name != "random":
            raise ValueError(f"seed has no effect on schedule {self.name}")
        if self.name == "by_module" and not (isinstance(self.weights, dict) and self.weights):
            raise ValueError("schedule by_module needs weights: {v_proj: 4, q_proj: 1, …}")
        if self.name == "custom" and not isinstance(self.weights, tuple):
            raise ValueError("schedule custom needs weights: a list of numbers, from the first layer to the last")
        if self.name not in ("by_module", "custom") and self.weights is not None:
            raise ValueError(f"weights have no effect on schedule {self.name}")
        return self

    @property
    def resolved_ratio(self) -> float:
        """The largest wished rank over the smallest."""
        return 4.0 if self.ratio is None else self.ratio


class DataRanksSection(BudgetSection):
    """Ranks, and initial values, from rows of the training data before training starts.

    gora (arXiv 2502.12171): from gradients of the frozen weights. eva (2410.07170): from the modules' inputs.
    """

    method: DataMethod
    rows: Annotated[int, Field(ge=2)] = 64  # of the training data
    initialise: bool = True  # false: the ranks only
    gamma: Annotated[float, Field(gt=0, le=10)] | None = None  # gora: ‖s·B0·A0‖ over ‖gradient‖, about; 0.05
    memory: str = "4GiB"  # for the gradients or covariances of as many modules at once as fit

    @field_validator("memory")
    @classmethod
    def _is_an_amount(cls, value: str) -> str:
        parse_bytes(value)
        return value

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.method != "gora" and self.gamma is not None:
            raise ValueError(f"gamma has no effect on method {self.method}")
        if self.gamma is not None and not self.initialise:
            raise ValueError("gamma has no effect with initialise: false")
        return self


def expand_rank_names(values: Any) -> Any:
    """The values of a section with `schedule` and `ranks`, which may be names alone."""
    if isinstance(values, dict):
        values = dict(values)
        for section, key in (("schedule", "name"), ("ranks", "method")):
            if isinstance(values.get(section), str):
                values[section] = {key: values[section]}
    return values


# A name alone needs no mapping.
Schedule = Annotated[ScheduleSection, or_also({"type": "string"})]
DataRanks = Annotated[DataRanksSection, or_also({"type": "string"})]
