"""The recipe's section of one band: its layers, and the adapter that they get."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from qhybrid.recipe.excerpt import excerpt
from qhybrid.recipe.ranks import ScheduleSection
from qhybrid.recipe.section import Section, or_also

Kind = Literal["lora", "rslora", "dora", "adalora"]

# Published ratios for LLaMA-class models are 2 to 4 (LoRA+, arXiv 2402.12354).
DEFAULT_LORAPLUS_RATIO = 4.0

# Of target_modules; the names that it is matched against have some 20 characters.
_LONGEST_PATTERN = 300
PISSA = "pissa"  # as an init: A and B start as the principal part of the weight
LONGEST_LAYERS = 1000  # characters: every layer of a large model by its number


def named_bands(values: Any) -> Any:
    """The values of a section with `adapters`, every band with a name: its word for layers, or its place."""
    if not isinstance(values, dict) or not isinstance(values.get("adapters"), (list, tuple)):
        return values
    bands = []
    for index, band in enumerate(values["adapters"]):
        if isinstance(band, dict) and "band" not in band:
            layers = band.get("layers", "all")
            name = layers if isinstance(layers, str) and layers.isalpha() else f"band{index}"
            band = {"band": name, **band}
        bands.append(band)
    return {**values, "adapters": bands}


class AdaLoraSection(Section):
    """AdaLoRA's schedule and constants (arXiv 2303.10512).

    A step count below 1 is a fraction of all optimizer steps; 1 and above is a number of steps.
    """

    init_rank: Annotated[int, Field(ge=1)] | None = None  # 1.5 times the target rank when left out
    warmup: Annotated[float, Field(ge=0)] = 0.1  # t_i: steps at the initial budget
    final: Annotated[float, Field(ge=0)] = 0.3  # t_f: length of the last phase, at the target budget
    interval: Annotated[int, Field(ge=1)] | None = None  # ΔT; a twentieth of the decay when left out
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    regularizer_weight: Annotated[float, Field(ge=0)] = 0.1  # gamma
    regularizer_in_scores: bool = False  # the paper's scores: of the whole objective, not of the task alone

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.warmup < 1 and self.final < 1 and self.warmup + self.final >= 1:
            raise ValueError("warmup and final together leave no part of the run to allocate in")
        if self.regularizer_in_scores and self.regularizer_weight == 0:
            raise ValueError("regularizer_in_scores has no effect with regularizer_weight 0")
        return self


class BandSection(Section):
    """One band: the layers it takes, and the adapter that every target module in them gets."""

    # Left out, it is named after its layers or its place in the list.
    band: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")] = "band"
    layers: Annotated[str, Field(min_length=1, max_length=LONGEST_LAYERS), or_also({"type": "integer"})] = (
        "all"  # "0-9", "0,3,5-7", "30%-70%", "bottom", "middle", "top" or "all"
    )
    kind: Kind = "lora"
    # Over the band's depth or modules, at the parameters that `rank` would cost everywhere.
    schedule: Annotated[ScheduleSection, or_also({"type": "string"})] | None = None
    rank: Annotated[int, Field(ge=1, le=8192)] = 16  # AdaLoRA: the average rank at the end
    alpha: Annotated[float, Field(gt=0)] | None = None  # twice the rank when left out
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[str, ...], Field(strict=False), or_also({"type": "string"})] = ("all-linear",)
    # Of A, while B starts at zero; pissa trains W's principal part in place of a change. AdaLoRA has its own.
    init: Literal["kaiming", "gaussian", "pissa"] | None = None
    lr_ratio: Annotated[float, Field(gt=0)] = 1.0  # the band's learning rate over training.learning_rate
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = 1.0  # B's learning rate over A's
    # How the planner may lower the rank when the memory does not suffice (memory.on_exceed: cap_rank).
    min_rank: Annotated[int, Field(ge=1)] | None = None  # 4, or the rank where that is less
    rank_multiple: Annotated[int, Field(ge=1)] | None = None  # steps of the rank: 4 if the rank is a multiple of 4
    rank_weight: Annotated[float, Field(ge=0, le=10)] = 1.0  # 2 shrinks twice as fast as 1, 0 never
    adalora: AdaLoraSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if str(values.get("kind", "")).lower() in ("lora+", "loraplus"):
            values["kind"] = "lora"
            values.setdefault("loraplus_lr_ratio", DEFAULT_LORAPLUS_RATIO)
        if isinstance(values.get("layers"), int) and not isinstance(values["layers"], bool):
            values["layers"] = str(values["layers"])
        if isinstance(values.get("schedule"), str):
            values["schedule"] = {"name": values["schedule"]}
        targets = values.get("target_modules")
        if isinstance(targets, str):
            values["target_modules"] = (targets,)
        return values

    @field_validator("target_modules")
    @classmethod
    def _targets_are_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or any(not pattern for pattern in value):
            raise ValueError("name at least one module, or 'all-linear'")
        for pattern in value:
            if len(pattern) > _LONGEST_PATTERN:
                raise ValueError(f"a target of {len(pattern):,} characters is longer than {_LONGEST_PATTERN}")
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except (re.error, OverflowError) as error:  # OverflowError: a repetition of 10^11
                    raise ValueError(f"{excerpt(pattern)} is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if 0 < self.rank_weight < 0.1:
            raise ValueError("rank_weight is 0 or at least 0.1")
        if self.schedule is not None and self.schedule.budget is not None:
            raise ValueError(
                "the budget of a band's schedule is its rank; a budget in parameters is for all bands"
            )
        if self.min_rank is not None and self.min_rank > self.rank:
            raise ValueError(f"min_rank {self.min_rank} is above the rank {self.rank}")
        if self.kind == "dora" and self.dropout > 0:
            raise ValueError(
                "a dora band needs dropout 0: with dropout the base product must be computed a second time"
            )
        if self.init == "pissa" and self.dropout > 0:
            raise ValueError("init pissa needs dropout 0: dropout would drop parts of the weight itself")
        if self.kind == "adalora":
            if self.loraplus_lr_ratio != 1:
                raise ValueError("loraplus_lr_ratio has no meaning for adalora: P, Λ and Q share one rate")
            if self.init is not None:
                raise ValueError("init has no effect on adalora, which starts from N(0, 0.02²) and Λ = 0")
            if self.init_rank < self.rank:
                raise ValueError(f"adalora.init_rank {self.init_rank} is below the target rank {self.rank}")
        elif self.adalora is not None:
            raise ValueError(f"the adalora settings have no effect on kind {self.kind!r}")
        return self

    def alpha_of(self, rank: int) -> float:
        """alpha of a module with that rank: twice the rank where the recipe leaves it out."""
        return self.alpha if self.alpha is not None else 2.0 * rank

    @property
    def resolved_alpha(self) -> float:
        """alpha of a module that has the band's rank."""
        return self.alpha_of(self.rank)

    @property
    def smallest_rank(self) -> int:
        """The rank that the planner does not go below."""
        return self.min_rank or min(4, self.rank)

    @property
    def rank_step(self) -> int:
        """The rank is capped in steps of this many."""
        return self.rank_multiple or (4 if self.rank % 4 == 0 else 1)

    @property
    def adalora_settings(self) -> AdaLoraSection:
        """AdaLoRA's settings, with the defaults where the recipe leaves them out."""
        return self.adalora or AdaLoraSection()

    @property
    def init_rank(self) -> int:
        """The rank that the matrices are built with: above the target for AdaLoRA, else the rank."""
        if self.kind != "adalora":
            return self.rank
        return self.adalora_settings.init_rank or max(self.rank + 1, (3 * self.rank) // 2)

    def init_rank_of(self, rank: int) -> int:
        """The rank that the matrices of a module with another rank than the band's are built with."""
        if rank == self.rank:
            return self.init_rank
        if self.init_rank == self.rank:
            return rank
        return max(rank + 1, rank * self.init_rank // self.rank)
