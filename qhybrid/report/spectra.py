"""How large each module's change is, and how many directions it has: the singular values of s·B·A."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qhybrid.recipe.band import PISSA
from qhybrid.report.colours import CIVIDIS, NUM_SERIES
from qhybrid.report.curves import legend_of
from qhybrid.report.heat_map import Grid, Shades, heat_map
from qhybrid.report.layout import KINDS
from qhybrid.report.line_chart import Line, line_chart
from qhybrid.report.page import Block, Figure, Note, Section
from qhybrid.report.records import ModuleSpectrum
from qhybrid.report.run_facts import RunFacts, number
from qhybrid.units import format_count


@dataclass(frozen=True)
class Measured:
    """Spectra by module, and what they are of: "of the finished adapter"."""

    modules: Mapping[str, ModuleSpectrum]
    what: str


def measure(facts: RunFacts) -> Measured | None:
    """The spectra of the adapter: from the event log where its step was measured, else from its tensors.

    Returns:
        None where there is neither an adapter nor a measurement.

    Raises:
        AdapterError, ModelError, LayoutError: the adapter cannot be read.
    """
    events, finished = facts.events, facts.run.adapter.is_dir()
    step = int(number(facts.figures.get("adapter_of_step"), events.last_step))
    if finished and step in events.spectra and not _has_principal_parts(facts):
        return Measured(events.spectra[step].modules, "of the finished adapter")
    if finished:
        from qhybrid.export.derive.inspect import inspect_adapter

        report = inspect_adapter(facts.run.adapter)
        found = {m.module: ModuleSpectrum.model_validate(m, from_attributes=True) for m in report.modules}
        return Measured(found, "of the finished adapter")
    if events.spectra:
        step = max(events.spectra)
        return Measured(events.spectra[step].modules, f"after step {format_count(step)}")
    return None


def _has_principal_parts(facts: RunFacts) -> bool:
    """Whether s·B·A of some modules is not the change alone."""
    return facts.layout is not None and any(row.init == PISSA for row in facts.layout)


def spectra_section(facts: RunFacts, measured: Measured | None, problem: str | None = None) -> Section | None:
    """The section; None without a layout."""
    layout = facts.layout
    if layout is None or not len(layout):
        return None
    title = "Size and spectra of the change"
    lead = (
        "What the adapters add to the weights: the norm says how much, the singular values in how many "
        "directions. A module that needs few of them for 99 % of its change would have done with a lower rank."
    )
    if _has_principal_parts(facts):
        lead += " What was measured while it trained has in it the part of the weight that PiSSA began with."
    grid = Grid.of(layout)
    spectra = {name: one for name, one in measured.modules.items() if name in grid.modules} if measured else {}
    if measured is None or not spectra:
        text = problem or "They are taken from the finished adapter, and there is none yet."
        return Section("spectra", title, lead, [Note(text, "warning" if problem else "plain")])
    blocks: list[Block] = [_ranks_used(grid, spectra, measured.what), _sizes(grid, spectra, measured.what)]
    blocks += [_curves(facts, spectra), _over_depth(facts, spectra)]
    if len(facts.events.spectra) > 1:
        blocks += [
            _over_time(facts, "norm", "Growth", "‖ΔW‖ of a module"),
            _over_time(facts, "effective_rank", "Directions over time", "effective rank of a module"),
        ]
    return Section("spectra", title, lead, blocks)


def _ranks_used(grid: Grid, spectra: Mapping[str, ModuleSpectrum], what: str) -> Figure:
    ranks = {module: float(one.energy_rank_99) for module, one in spectra.items()}
    return Figure(
        f"Singular values that hold 99 % of the change, {what}",
        heat_map(
            grid,
            ranks,
            Shades(0, max(one.rank for one in spectra.values())),
            alt=f"Map of the energy ranks: {min(ranks.values()):.0f} to {max(ranks.values()):.0f}",
            what="singular values for 99 % of ‖ΔW‖²",
            told=lambda module, rank: f"{module}: {rank:.0f} of rank {spectra[module].live_rank}",
        ),
        "Where the number is near the module's rank, all of the rank is used; where it is far below, the rank "
        "is more than the module needs.",
        wide=True,
    )


def _sizes(grid: Grid, spectra: Mapping[str, ModuleSpectrum], what: str) -> Figure:
    norms = {module: one.norm for module, one in spectra.items()}
    finite = [norm for norm in norms.values() if math.isfinite(norm)] or [0.0]
    return Figure(
        f"Size of the change, {what}",
        heat_map(
            grid,
            norms,
            Shades.spread(finite, CIVIDIS),
            alt=f"Map of the norms: {min(finite):.3g} to {max(finite):.3g}",
            what="‖ΔW‖",
            text=short,
            told=lambda module, norm: f"{module}: {norm:.4g}",
        ),
        "The Frobenius norm of s·B·A; of DoRA, what is inside its norm. Kinds of adapters differ in how fast they "
        "grow: compare within a band first.",
        wide=True,
    )


def _over_depth(facts: RunFacts, spectra: Mapping[str, ModuleSpectrum]) -> Figure:
    """The norm of all modules of a layer together, by band."""
    assert facts.layout is not None
    lines = []
    for colour, band in enumerate(facts.layout.bands):
        norms: dict[int, list[float]] = {}
        for row in facts.layout.of_band(band):
            if row.module in spectra:
                norms.setdefault(row.layer, []).append(spectra[row.module].norm)
        points = [(float(layer), math.hypot(*own)) for layer, own in sorted(norms.items())]
        lines.append(Line(band, points, colour % NUM_SERIES))
    alt = "The size of the change of each layer"
    chart = line_chart(lines, alt=alt, x_label="layer", y_label="‖ΔW‖ of the layer", log=None)
    caption = (
        "The root of the sum of squares over the modules of each layer: where in the depth the model was changed."
    )
    return Figure("Size over the depth", chart, caption, legend_of(lines))


def _over_time(facts: RunFacts, name: str, title: str, y_label: str) -> Figure:
    """A figure of each band's modules at every measurement: the median, and the middle half around it."""
    assert facts.layout is not None
    lines = []
    for colour, band in enumerate(facts.layout.bands):
        own = {row.module for row in facts.layout.of_band(band)}
        points, around = [], []
        for step, event in sorted(facts.events.spectra.items()):
            values = [getattr(one, name) for module, one in event.modules.items() if module in own]
            values = sorted(value for value in values if math.isfinite(value))
            if values:
                points.append((float(step), statistics.median(values)))
                around.append((float(step), _quantile(values, 0.25), _quantile(values, 0.75)))
        if points:
            lines.append(Line(band, points, colour % NUM_SERIES, around=around))
    alt = f"{title}: the median of each band at {len(facts.events.spectra)} moments"
    chart = line_chart(lines, alt=alt, x_label="optimizer step", y_label=y_label, log=None)
    captions = {
        "norm": "How far the weights have been moved. A curve that has become flat has learnt what it will.",
        "effective_rank": "exp of the entropy of the singular values: how many directions a change has in effect.",
    }
    return Figure(
        title, chart, f"{captions[name]} The median of each band, and its middle half.", legend_of(lines)
    )


def _curves(facts: RunFacts, spectra: Mapping[str, ModuleSpectrum]) -> Figure:
    """Each band's median of σ_i / σ_1 over its modules, and the middle half of them around it."""
    assert facts.layout is not None
    lines = []
    for colour, band in enumerate(facts.layout.bands):
        rows = facts.layout.of_band(band)
        own = [
            spectra[row.module].singular_values
            for row in rows
            if row.module in spectra and spectra[row.module].norm > 0
        ]
        if not own:
            continue
        points, around = [], []
        for i in range(max(len(values) for values in own)):
            shares = sorted(values[i] / values[0] if i < len(values) else 0.0 for values in own)
            points.append((float(i + 1), statistics.median(shares)))
            around.append((float(i + 1), _quantile(shares, 0.25), _quantile(shares, 0.75)))
        lines.append(
            Line(f"{band}: {KINDS.get(rows[0].kind, rows[0].kind)}", points, colour % NUM_SERIES, around=around)
        )
    alt = "The singular values of each band, relative to the largest"
    chart = line_chart(lines, alt=alt, x_label="singular value", y_label="share of the largest", zero=True)
    caption = (
        "The median over each band's modules, and the middle half of them as a ribbon. A curve that falls early "
        "means few directions; a flat one that ends above zero means that more rank would have been used."
    )
    return Figure("Spectra", chart, caption, legend_of(lines))


def short(norm: float) -> str:
    """At most four characters: "3.5", ".02", "7e-5"."""
    if norm >= 1 or norm == 0:
        return f"{norm:.2g}"
    return f"{norm:.1g}".removeprefix("0") if norm >= 0.001 else f"{norm:.0e}".replace("e-0", "e-")


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
