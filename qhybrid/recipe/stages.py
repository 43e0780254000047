"""The recipe's list stages: when each begins, and what it does then. Ranks grow; bands are frozen and freed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from qhybrid.recipe.section import Section, or_also
from qhybrid.units import format_count, parse_count

if TYPE_CHECKING:
    from qhybrid.recipe.schema import Recipe

MOST_STAGES = 100
_ONE_NAME = {"type": "string"}
_Names = Annotated[tuple[str, ...], Field(strict=False), or_also(_ONE_NAME)]


class ExpandSection(Section):
    """Which modules get a higher rank, and how much. What the model computes stays as it was."""

    bands: _Names = ()  # all that can grow, when left out: every kind but adalora
    top: Annotated[int | float, Field(gt=0)] | None = None  # most important: a share below 1, else a number; all
    by: Annotated[int, Field(ge=1)] | None = None  # ranks more
    times: Annotated[int, Field(ge=2)] | None = None  # or so many times the rank
    to: Annotated[int, Field(ge=2, le=8192)] | None = None  # never above it; alone, up to it
    budget: Annotated[int, Field(ge=1), or_also(_ONE_NAME)] | None = None  # parameters added at most: 2M

    @field_validator("bands", mode="before")
    @classmethod
    def _one_band_needs_no_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("budget", mode="before")
    @classmethod
    def _is_a_count(cls, value: Any) -> Any:
        return parse_count(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _says_how_much(self) -> Self:
        if self.by and self.times:
            raise ValueError("by and times both say how much; give one of them")
        if not (self.by or self.times or self.to):
            raise ValueError("give by (ranks more), times (the rank multiplied) or to (the rank to reach)")
        if isinstance(self.top, float) and self.top >= 1:
            raise ValueError(f"top is a share below 1 or a whole number of modules, not {self.top}")
        return self

    def rank_after(self, rank: int) -> int:
        """The rank of a module that has `rank` and is expanded; never a lower one."""
        wished = rank * self.times if self.times else rank + self.by if self.by else (self.to or rank)
        return max(rank, wished if self.to is None else min(wished, self.to))

    def how_many(self, candidates: int) -> int:
        """How many of so many modules `top` means; at least one where there is one."""
        if self.top is None:
            return candidates
        return min(candidates, self.top if isinstance(self.top, int) else max(1, round(self.top * candidates)))


class PlateauSection(Section):
    """When a loss has stopped falling."""

    metric: Literal["eval_loss", "train_loss"] = "eval_loss"
    patience: Annotated[int, Field(ge=1)] = 2  # evaluations, or windows of train_loss, without an improvement
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.01  # an improvement is below the best by that share of it
    window: Annotated[int, Field(ge=1)] | None = None  # steps that a value of train_loss is the mean of: 20

    @model_validator(mode="after")
    def _window_has_an_effect(self) -> Self:
        if self.window is not None and self.metric != "train_loss":
            raise ValueError("window has no effect on eval_loss; it belongs to metric: train_loss")
        return self

    @property
    def window_steps(self) -> int:
        """The steps of a window, with the default where the recipe leaves it out."""
        return self.window or 20


class SpectrumSection(Section):
    """When a module uses nearly all of its rank, by the singular values of s·B·A."""

    measure: Literal["effective", "energy"] = "effective"  # energy: the fewest σ with 99% of the squares' sum
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.9  # of the rank: from here on the module is expanded
    release: Annotated[float, Field(gt=0, lt=1)] = 0.8  # and only again after it was at or below this
    every: Annotated[int, Field(ge=1)] = 20  # steps between two looks
    interval: Annotated[int, Field(ge=1)] = 100  # steps between two changes of one module, at least

    @model_validator(mode="after")
    def _is_a_hysteresis(self) -> Self:
        if self.release >= self.threshold:
            raise ValueError(f"release {self.release:g} must be below threshold {self.threshold:g}")
        return self


class StageSection(Section):
    """One stage: the moment at which it begins, and what it changes."""

    # Left out, it is named after its place in the list.
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")] = "stage"
    at: Annotated[int | float, Field(gt=0)] | None = None  # after so many steps; below 1 a fraction of all
    when: Literal["plateau", "spectrum"] | None = None  # spectrum: a rule that stands, with `at` from that step on
    plateau: PlateauSection | None = None
    spectrum: SpectrumSection | None = None
    expand: ExpandSection | None = None
    freeze: _Names = ()
    unfreeze: _Names = ()

    @field_validator("freeze", "unfreeze", mode="before")
    @classmethod
    def _one_band_needs_no_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if (self.at is None) == (self.when is None) and self.when != "spectrum":
            raise ValueError(
                "a stage begins at a step (at: 100, at: 0.5), or when a loss no longer falls (when: plateau), or "
                "is a rule (when: spectrum); give at or when"
            )
        if isinstance(self.at, float) and self.at >= 1:
            raise ValueError(f"at is a fraction below 1 or a whole number of steps, not {self.at}")
        for name in ("plateau", "spectrum"):
            if getattr(self, name) is not None and self.when != name:
                raise ValueError(f"{name} has no effect without when: {name}")
        if not (self.expand or self.freeze or self.unfreeze):
            raise ValueError("a stage does something: give it expand, freeze or unfreeze")
        both = sorted(set(self.freeze) & set(self.unfreeze))
        if both:
            raise ValueError(f"band {both[0]!r} is to be frozen and unfrozen at once")
        if self.when == "spectrum":
            self._can_stand()
        return self

    def _can_stand(self) -> None:
        if self.expand is None or self.freeze or self.unfreeze:
            raise ValueError(
                "when: spectrum is a rule for modules: it takes expand, and neither freeze nor unfreeze"
            )
        if self.expand.top is not None:
            raise ValueError("expand.top has no effect with when: spectrum, which chooses the modules itself")
        if self.expand.to is None or not (self.expand.by or self.expand.times):
            raise ValueError(
                "when: spectrum needs expand.to, the highest rank, and by or times, the size of a step"
            )

    @property
    def plateau_settings(self) -> PlateauSection:
        """With the defaults where the recipe leaves them out."""
        return self.plateau or PlateauSection()

    @property
    def spectrum_settings(self) -> SpectrumSection:
        """With the defaults where the recipe leaves them out."""
        return self.spectrum or SpectrumSection()

    def told(self) -> str:
        """The stage in one line."""
        parts = []
        if self.expand is not None:
            expand = self.expand
            share = (
                f"{expand.top:.4%}".rstrip("0%").rstrip(".") + "%" if isinstance(expand.top, float) else expand.top
            )
            which = "all" if expand.top is None else f"the {share} most important"
            if self.when == "spectrum":
                which = "those"
            much = (
                f"{expand.times} times the rank"
                if expand.times
                else f"{expand.by} more in rank"
                if expand.by
                else ""
            )
            much += f"{', ' if much else ''}up to {expand.to}" if expand.to else ""
            much += f", {format_count(expand.budget)} parameters at most" if expand.budget else ""
            parts.append(f"expand {which} of {', '.join(expand.bands) or 'all bands'}: {much}")
        for word, names in (("freeze", self.freeze), ("unfreeze", self.unfreeze)):
            if names:
                parts.append(f"{word} {', '.join(names)}")
        return f"{self.name}: {self.moment}, {'; '.join(parts)}"

    @property
    def moment(self) -> str:
        """When it begins, in words."""
        if self.when == "plateau":
            return f"when {self.plateau_settings.metric} stops falling"
        if self.when == "spectrum":
            return f"where a rank is nearly used up{f', {self._at}' if self.at else ''}"
        return self._at

    @property
    def _at(self) -> str:
        return f"after {self.at:.4g} of all steps" if isinstance(self.at, float) else f"after step {self.at}"


def expandable(expand: ExpandSection, kinds: dict[str, str]) -> frozenset[str]:
    """The bands that `expand` means, given the kind of every band."""
    return frozenset(expand.bands or (band for band, kind in kinds.items() if kind != "adalora"))


def resolved_stages(recipe: Recipe) -> tuple[StageSection, ...]:
    """The stages with every default written out that follows from the recipe."""
    kinds = {band.band: band.kind for band in recipe.adapters}
    stages = []
    for stage in recipe.stages:
        filled: dict[str, Any] = {}
        if stage.when == "plateau":
            plateau = stage.plateau_settings
            window = plateau.window_steps if plateau.metric == "train_loss" else None
            filled["plateau"] = plateau.model_copy(update={"window": window})
        elif stage.when == "spectrum":
            filled["spectrum"] = stage.spectrum_settings
        if stage.expand is not None:
            chosen = expandable(stage.expand, kinds)
            bands = tuple(band for band in kinds if band in chosen)
            filled["expand"] = stage.expand.model_copy(update={"bands": bands})
        stages.append(stage.model_copy(update=filled))
    return tuple(stages)
