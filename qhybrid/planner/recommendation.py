"""Recommendation: proposed bands and settings with a reason and a source for each, and their recipe as text."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from qhybrid.recipe.band import BandSection
from qhybrid.recipe.yaml_source import dump_yaml
from qhybrid.units import format_count

ADALORA_RATE = 3.0  # of LoRA's: the best on SmolLM2, docs/evidence.md
_PLAN = "qhybrid's memory plan, docs/memory.md"


@dataclass(frozen=True)
class Choice:
    """One value of the recommendation."""

    name: str  # "adapters.top.rank", "training.learning_rate"
    value: Any
    reason: str  # one plain sentence: why this value
    source: str


@dataclass(frozen=True)
class Recommendation:
    """Bands and training settings for a task, and why. Nothing of it is capped to memory."""

    bands: tuple[BandSection, ...]
    training: dict[str, Any]  # by SFTConfig's names
    choices: tuple[Choice, ...]  # one for each value, in the order of the recipe
    tokens: int  # that the loss is taken on
    about_tokens: str  # where that number is from
    per_rank: int  # parameters of one rank in all layers
    about_memory: str

    @property
    def notes(self) -> tuple[str, ...]:
        """About the whole: the control to run, assumptions, limits."""
        notes = [self._control_note(), f"{format_count(self.tokens)} tokens are trained on: {self.about_tokens}."]
        capacity = round(self.per_rank * fmean(band.rank for band in self.bands))
        if capacity < self.tokens:
            notes.append(
                f"The adapter has about {format_count(capacity)} parameters, fewer than that. Past its capacity "
                "LoRA learns more slowly than full fine-tuning."
            )
        adalora = next((band for band in self.bands if band.kind == "adalora"), None)
        if adalora is not None:
            rate = f"training.learning_rate={self.training['learning_rate'] * ADALORA_RATE:g}"
            notes.append(
                "Worth a third run: AdaLoRA in all layers at a rate of its own, the best on SmolLM2 "
                f"(docs/evidence.md): {_override(adalora, 'kind', 'rank', 'alpha')} {rate}"
            )
        return (*notes, self.about_memory)

    def _control_note(self) -> str:
        if len({(band.kind, band.rank, band.alpha) for band in self.bands}) == 1:
            return "A rule of thumb, not measured on your data. All layers have the same adapter here."
        override = _override(self.control, "kind", "rank", "alpha", "dropout")
        return (
            "A rule of thumb, not measured on your data. Run a uniform control beside it, with as many parameters "
            f"as the bands end with: {override}. If the bands do not beat it, keep the control."
        )

    @property
    def control(self) -> BandSection:
        """One plain band over all layers, with the middle band's rank: what the bands have to beat."""
        middle = self.bands[len(self.bands) // 2]
        return self.bands[0].model_copy(update={"band": "uniform", "layers": "all", "rank": middle.rank})

    def capped(self, bands: tuple[BandSection, ...]) -> Recommendation:
        """The same with the ranks that fit: `bands` are this one's after the planner lowered them."""
        values: dict[str, tuple[Any, Any]] = {}
        for asked, got in zip(self.bands, bands, strict=True):
            path = f"adapters.{asked.band}"
            values[f"{path}.rank"] = asked.rank, got.rank
            values[f"{path}.alpha"] = asked.alpha, got.alpha
            values[f"{path}.adalora.init_rank"] = asked.init_rank, got.init_rank
        choices = []
        for choice in self.choices:
            asked, got = values.get(choice.name, (None, None))
            if asked != got:
                why = "so that the scaling stays" if choice.name.endswith("alpha") else "more does not fit"
                reason = f"lowered from {scalar(asked)}: {why}"
                choice = dataclasses.replace(choice, value=got, reason=reason, source=_PLAN)
            choices.append(choice)
        lowered = "Ranks that are too much for the memory that was given are lowered."
        return dataclasses.replace(self, bands=bands, choices=tuple(choices), about_memory=lowered)

    def to_recipe(self, model_path: str) -> str:
        """The recipe as YAML, each reason a comment at its line, the sources numbered at the end.

        `data.sources` is a placeholder: "rows.jsonl".
        """
        sources = list(dict.fromkeys(choice.source for choice in self.choices))
        reasons = {choice.name: f"{choice.reason} [{sources.index(choice.source) + 1}]" for choice in self.choices}
        said: dict[str, str] = {}  # a line that an earlier band has explained, and that band

        def lines(values: dict[str, Any], path: str, indent: str, band: str = "") -> Iterator[str]:
            for key, value in values.items():
                if isinstance(value, dict):
                    yield f"{indent}{key}:"
                    yield from lines(value, f"{path}.{key}", indent + "  ", band)
                    continue
                line = f"{indent}{key}: {scalar(value)}"
                reason = reasons.get(f"{path}.{key}")
                if reason:
                    first = said.setdefault(f"{line} {reason}", band)
                    line += f"  # {reason if first == band else f'as in {first}'}"
                yield line

        text = [line for note in self.notes for line in _comment(note)]
        text += ["", dump_yaml({"model": {"path": model_path}}).rstrip(), "", "adapters:"]
        for band in self.bands:
            name, *rest = lines(band.model_dump(exclude_unset=True), f"adapters.{band.band}", "    ", band.band)
            text += [f"  - {name.lstrip()}", *rest]
        text += ["", "data:", "  sources: rows.jsonl  # your rows: JSON, JSONL, CSV or Parquet", "", "training:"]
        text += lines(self.training, "training", "  ")
        text += ["", "output_dir: runs/recommended", "", "# Sources"]
        text += [line for number, source in enumerate(sources, 1) for line in _comment(f"[{number}] {source}")]
        return "\n".join(text) + "\n"


def _override(band: BandSection, *keys: str) -> str:
    """The command line's words for one such band over all layers."""
    return f"adapters=[{{{', '.join(f'{key}: {scalar(getattr(band, key))}' for key in keys)}}}]"


def scalar(value: Any) -> str:
    """A value as the recipe's YAML has it."""
    if isinstance(value, tuple):
        return ", ".join(value) if len(value) == 1 else f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 112, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)
