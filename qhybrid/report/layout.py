"""Which layers have which adapters: the bands over the depth of the model."""

from __future__ import annotations

from collections.abc import Sequence

from qhybrid.architecture.layout import Layout, LayoutRow
from qhybrid.report.bars import layer_bars
from qhybrid.report.colours import NUM_SERIES
from qhybrid.report.heat_map import Grid
from qhybrid.report.page import Block, Figure, Legend, Section, Table
from qhybrid.report.run_facts import RunFacts
from qhybrid.units import format_count

KINDS = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "adalora": "AdaLoRA"}


def layout_section(facts: RunFacts) -> Section | None:
    """Which layers have which adapters."""
    layout = facts.layout
    if layout is None or not len(layout):
        return None
    stacks: dict[int, list[tuple[str, float, int]]] = {}
    for number, band in enumerate(layout.bands):
        for layer in sorted({row.layer for row in layout.of_band(band)}):
            size = sum(row.num_parameters for row in layout.of_band(band) if row.layer == layer)
            stacks.setdefault(layer, []).append((band, float(size), number % NUM_SERIES))
    picture = layer_bars(
        Grid.of(layout).columns,
        stacks,
        alt=f"Trained parameters of each layer, in the bands {', '.join(layout.bands)}",
        y_label="parameters",
        text=lambda size: f"{format_count(int(size))} parameters",
    )
    legend = [
        Legend(f"{band}: {kinds(layout, band)}", i % NUM_SERIES, "fill") for i, band in enumerate(layout.bands)
    ]
    blocks: list[Block] = [
        Figure(
            "Trained parameters over the depth of the model",
            picture,
            "Every bar is a layer, from the input on the left to the output on the right. A gap is a layer that "
            "is left as it was.",
            legend,
            wide=True,
        ),
        _band_table(layout),
    ]
    text = "The adapters stand in bands of layers. Each band has its own kind, rank and learning rates."
    return Section("layout", "Layout", text, blocks)


def kinds(layout: Layout, band: str) -> str:
    """The kinds of adapters in a band, in words."""
    kinds = dict.fromkeys(KINDS.get(row.kind, row.kind) for row in layout.of_band(band))
    return " and ".join(kinds)


def _band_table(layout: Layout) -> Table:
    rows = []
    for band in layout.bands:
        own = layout.of_band(band)
        layers = sorted({row.layer for row in own})
        rows.append(
            (
                band,
                kinds(layout, band)
                + (f", LoRA+ ×{own[0].loraplus_lr_ratio:g}" if own[0].loraplus_lr_ratio != 1 else "")
                + (f", rate ×{own[0].lr_ratio:g}" if own[0].lr_ratio != 1 else ""),
                _targets(own, layout),
                ", ".join(dict.fromkeys(row.init for row in own)),
                f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0]),
                format_count(len(own)),
                _rank(own),
                _span([row.scaling for row in own]),
                format_count(sum(row.num_parameters for row in own)),
            )
        )
    header = ("band", "kind", "module types", "init", "layers", "modules", "rank", "scaling", "parameters")
    caption = (
        "An arrow is AdaLoRA: modules begin with the rank before it, and end with the one behind it on average; "
        "each ends with its own."
    )
    shown = any(row.rank != row.target_rank for row in layout)
    return Table("Bands", header, rows, left=4, caption=caption if shown else "")


def _targets(rows: Sequence[LayoutRow], layout: Layout) -> str:
    """The module types of a band."""
    own, every = (dict.fromkeys(row.target for row in some) for some in (rows, layout))
    return f"all {len(every)}" if len(own) == len(every) > 3 else ", ".join(own)


def _rank(rows: Sequence[LayoutRow]) -> str:
    start, end = _span([row.rank for row in rows]), _span([row.target_rank for row in rows])
    return start if start == end else f"{start}→{end}"


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.3g}–{high:.3g}"
