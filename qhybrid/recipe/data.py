"""The recipe's section data: sources to train and to evaluate on, how they mix, how conversations are written."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from qhybrid.recipe.section import Section, or_also

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# One source needs no list, and a path alone needs no mapping.
_ONE_SOURCE = ({"type": "string"}, {"type": "object"})


class SourceSection(Section):
    """One data source: a JSON, JSONL, CSV or Parquet file, or a data set on the hub."""

    path: Annotated[str, Field(min_length=1)]
    format: Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"] = "auto"
    columns: dict[str, str] = Field(default_factory=dict)  # our name: the file's name
    split: str = "train"  # hub data sets only
    subset: str | None = None  # hub data sets only: the configuration's name
    weight: Annotated[float, Field(gt=0)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None  # the first rows only


class DataSection(Section):
    """What to train and evaluate on."""

    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1, strict=False), or_also(*_ONE_SOURCE)]
    eval_sources: Annotated[tuple[SourceSection, ...], Field(strict=False), or_also(*_ONE_SOURCE)] = ()
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # held out of `sources` by seeded choice
    mixture: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    chat_template: str | None = None  # "chatml", "alpaca", or a .jinja file; the tokenizer's when left out
    system_prompt: str | None = None  # for conversations that have none
    max_dropped_fraction: Fraction = 0.05

    @model_validator(mode="before")
    @classmethod
    def _one_source_needs_no_list(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for key in ("sources", "eval_sources"):
            given = values.get(key)
            if isinstance(given, (str, dict)):
                given = [given]
            if isinstance(given, (list, tuple)):
                values[key] = [{"path": item} if isinstance(item, str) else item for item in given]
        return values

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> Self:
        if self.eval_sources and self.eval_fraction:
            raise ValueError("give eval_sources or eval_fraction, not both")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("give every source a weight, or none")
        if any(source.weight is not None for source in self.eval_sources):
            raise ValueError("weight has no effect on eval_sources: every row is used once")
        return self
