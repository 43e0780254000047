"""Recommendation: proposed bands and settings with a reason and a source for each, and their recipe as text."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qhybrid.recipe.band import BandSection
from qhybrid.recipe.yaml_source import dump_yaml

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
    notes: tuple[str, ...]  # about the whole: the control to run, assumptions, limits

    @property
    def control(self) -> BandSection:
        """One plain band over all layers with as many trained parameters: what the bands have to beat."""
        return control_of(self.bands)

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
        notes = (*self.notes[:-1], "Ranks that are too much for the memory that was given are lowered.")
        return dataclasses.replace(self, bands=bands, choices=tuple(choices), notes=notes)

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


def control_of(bands: tuple[BandSection, ...]) -> BandSection:
    """One plain band over all layers, with the middle band's rank."""
    middle = bands[len(bands) // 2]
    return bands[0].model_copy(update={"band": "uniform", "layers": "all", "rank": middle.rank})


def scalar(value: Any) -> str:
    """A value as the recipe's YAML has it."""
    if isinstance(value, tuple):
        return ", ".join(value) if len(value) == 1 else f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 112, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)
