"""Layout: one row for each adapted module. Every other part of qhybrid reads ranks from here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from qhybrid.errors import LayoutError
from qhybrid.recipe.band import Kind
from qhybrid.units import format_count

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayoutRow:
    """The adapter of one module. W is (out_features, in_features), A (rank, in), B (out, rank)."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    module: str  # "model.layers.3.self_attn.q_proj"
    layer: Annotated[int, Field(ge=0)]
    target: str  # "q_proj"
    in_features: Annotated[int, Field(ge=1)]
    out_features: Annotated[int, Field(ge=1)]
    band: str
    kind: Kind
    rank: Annotated[int, Field(ge=1)]  # of the matrices; for AdaLoRA the initial rank
    target_rank: Annotated[int, Field(ge=1)]  # AdaLoRA: the band's average at the end; else equal to rank
    alpha: float
    scaling: float  # s in W + s·B·A
    dropout: Annotated[float, Field(ge=0, lt=1)]
    init: str
    loraplus_lr_ratio: float
    lr_ratio: float = 1.0

    @property
    def num_parameters(self) -> int:
        """Trained parameters: A and B, DoRA's magnitudes, AdaLoRA's Λ."""
        extra = {"dora": self.out_features, "adalora": self.rank}.get(self.kind, 0)
        return self.rank * (self.in_features + self.out_features) + extra


_ROWS = TypeAdapter(tuple[LayoutRow, ...])


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, in one line."""
    fault = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"


@dataclass(frozen=True)
class Layout:
    """All adapted modules of one model, in the order of the layers."""

    rows: tuple[LayoutRow, ...]

    def __iter__(self) -> Iterator[LayoutRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bands(self) -> tuple[str, ...]:
        """The names of the bands, in the order in which they appear."""
        return tuple(dict.fromkeys(row.band for row in self.rows))

    @property
    def num_parameters(self) -> int:
        """Trained parameters of all adapters."""
        return sum(row.num_parameters for row in self.rows)

    @property
    def num_budgeted(self) -> int:
        """Σ r·(in + out) with AdaLoRA's ranks at the end: what the budget of a schedule counts."""
        return sum(row.target_rank * (row.in_features + row.out_features) for row in self.rows)

    def of_band(self, band: str) -> tuple[LayoutRow, ...]:
        """The rows of one band."""
        return tuple(row for row in self.rows if row.band == band)

    def of_kind(self, *kinds: str) -> tuple[LayoutRow, ...]:
        """The rows of some kinds."""
        return tuple(row for row in self.rows if row.kind in kinds)

    def to_json(self) -> str:
        """The layout as JSON, one row a line."""
        rows = ",\n".join("    " + json.dumps(dataclasses.asdict(row)) for row in self.rows)
        return f'{{\n  "format_version": {FORMAT_VERSION},\n  "rows": [\n{rows}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "layout.json") -> Layout:
        """Read what `to_json` wrote.

        Raises:
            LayoutError: not JSON in UTF-8, another format version, or rows with other fields.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            if content["format_version"] != FORMAT_VERSION:
                raise LayoutError(
                    f"format version {content['format_version']} is not {FORMAT_VERSION}", where=where
                )
            return cls(_ROWS.validate_json(json.dumps(content["rows"])))  # strict, and from JSON's types
        except ValidationError as error:
            raise LayoutError(f"not a layout: {first_fault(error)}", where=where) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LayoutError(f"not a layout: {error}", where=where) from None

    def to_text(self) -> str:
        """The layout as a table; where ranks differ inside a band, as a grid of them."""
        for band in self.bands:
            if len({row.target_rank for row in self.of_band(band)}) > 1:
                return "\n".join([*self._grid(), *self._sums()])
        return "\n".join([*self._runs(), *self._sums()])

    def _grid(self) -> list[str]:
        """The rank of every module: a line for each layer, a column for each module type."""
        targets = list(dict.fromkeys(row.target for row in self.rows))
        ranks = {(row.layer, row.target): _rank_text(row) for row in self.rows}
        bands: dict[int, str] = {}
        for row in self.rows:
            bands[row.layer] = row.band if bands.get(row.layer, row.band) == row.band else "several"
        lines = [["layer", "band", *(target.removesuffix("_proj") for target in targets)]]
        for layer, band in bands.items():
            lines.append([str(layer), band, *(ranks.get((layer, target), "-") for target in targets)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]

    def _runs(self) -> list[str]:
        """A line for each run of layers that have the same adapter."""
        header = ("layers", "module", "band", "kind", "init", "rank", "alpha", "s", "dropout", "parameters")
        lines: list[tuple[str, ...]] = [header]
        for target in dict.fromkeys(row.target for row in self.rows):
            rows = [row for row in self.rows if row.target == target]
            start = 0
            for end in range(1, len(rows) + 1):
                if end < len(rows) and _same_but_layer(rows[end], rows[end - 1]):
                    continue
                lines.append(_table_line(rows[start:end]))
                start = end
        body = sorted(lines[1:], key=lambda line: int(line[0].split("-")[0]))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return [
            "  ".join(
                cell.rjust(w) if i > 4 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [header, *body]
        ]

    def _sums(self) -> list[str]:
        lines = []
        for band in self.bands:
            rows = self.of_band(band)
            lines.append(
                f"band {band}: {rows[0].kind}, {len(rows)} modules, "
                f"{format_count(sum(row.num_parameters for row in rows))} parameters"
            )
        lines.append(f"total: {len(self.rows)} modules, {format_count(self.num_parameters)} parameters")
        if self.num_budgeted != self.num_parameters:
            lines.append(f"as budgets count (A and B, final ranks): {format_count(self.num_budgeted)} parameters")
        return lines


def _rank_text(row: LayoutRow) -> str:
    return f"{row.rank}→{row.target_rank}" if row.kind == "adalora" else str(row.rank)


def _same_but_layer(one: LayoutRow, other: LayoutRow) -> bool:
    if abs(one.layer - other.layer) != 1:
        return False
    return dataclasses.replace(one, module="", layer=0) == dataclasses.replace(other, module="", layer=0)


def _table_line(rows: list[LayoutRow]) -> tuple[str, ...]:
    row = rows[0]
    layers = str(row.layer) if len(rows) == 1 else f"{row.layer}-{rows[-1].layer}"
    rank = _rank_text(row)
    kind = row.kind + (f" (LoRA+ {row.loraplus_lr_ratio:g})" if row.loraplus_lr_ratio != 1 else "")
    kind += f" (rate ×{row.lr_ratio:g})" if row.lr_ratio != 1 else ""
    parameters = format_count(sum(r.num_parameters for r in rows))
    return (
        layers, row.target, row.band, kind, row.init, rank, f"{row.alpha:g}", f"{row.scaling:.4g}",
        f"{row.dropout:g}", parameters,
    )  # fmt: skip
