"""A picture of an adapter: the rank that every module needs, how large its change is, and each band's spectra.

matplotlib is not among the requirements: it comes with the extra `plots`.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qhybrid.errors import ExportError
from qhybrid.export.derive.inspect import ModuleReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _GRID = "#1f2933", "#d9dee3"
_LINES = ("#1f6feb", "#d1480f", "#2f855a", "#805ad5", "#b7791f", "#0f8b8d")
_DASHES = ("-", "--", "-.", ":")
_NOTHING = 1e-30  # in the place of a largest value of 0
_FAR_APART = 20  # norms whose extremes differ by more get logarithmic colours
_MOST_NUMBERED = 260  # cells; beyond that the numbers in them are too small to read


def draw(report: Report, file: Path) -> None:
    """Draw `report` into a new .png or .svg file, which is there whole or not at all.

    Raises:
        ExportError: matplotlib is not installed.
        OSError: the disk is full or fails.
    """
    try:
        import matplotlib
    except ImportError:
        raise ExportError("--plot needs matplotlib", hint="pip install 'qhybrid[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "text.color": _INK}
    with plt.rc_context({**style, "xtick.color": _INK, "ytick.color": _INK}):
        layers = sorted({module.layer for module in report.modules})
        width = min(20.0, max(9.0, 4.5 + 0.27 * len(layers)))
        figure = plt.figure(figsize=(width, 8), layout="constrained")
        upper, middle, lower = figure.subplots(3, 1, height_ratios=[1, 1, 1.25])
        _heat_map(upper, report, layers, "energy_rank_99", "Energy rank: singular values with 99 % of ‖ΔW‖²")
        _heat_map(middle, report, layers, "norm", "Size of the change: ‖ΔW‖ (Frobenius)")
        _spectra(lower, report)
        temporary = file.with_name(f".{file.name}.partial")
        try:
            figure.savefig(temporary, dpi=120, format=file.suffix.lower().lstrip("."))
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
            plt.close(figure)


def _heat_map(axes: Axes, report: Report, layers: list[int], figure: str, title: str) -> None:
    from matplotlib.colors import LogNorm, Normalize

    targets = list(dict.fromkeys(module.target for module in report.modules))
    grid = np.full((len(targets), len(layers)), np.nan)
    for module in report.modules:
        grid[targets.index(module.target), layers.index(module.layer)] = getattr(module, figure)
    largest = max(float(np.nanmax(grid)), _NOTHING)
    scale = Normalize(0, 1.1 * largest)
    if figure == "norm":
        least = float(np.nanmin(np.where(grid > 0, grid, largest)))
        if largest > _FAR_APART * least:
            scale, title = LogNorm(least / 1.5, 1.1 * largest), f"{title}, on a logarithmic scale"
    image = axes.imshow(grid, aspect="auto", cmap="Blues" if figure != "norm" else "Oranges", norm=scale)
    axes.set_yticks(range(len(targets)), targets)
    step = max(1, len(layers) // 32)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer", labelpad=1)
    axes.set_title(title, fontsize=10, loc="left", weight="bold", pad=20)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=12).outline.set_visible(False)
    _name_bands(axes, report, layers)
    if grid.size <= _MOST_NUMBERED:
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "white" if scale(value) > 0.6 else _INK
                text = f"{value:.0f}" if figure != "norm" else f"{value:.2g}"
                axes.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)


def _name_bands(axes: Axes, report: Report, layers: list[int]) -> None:
    """The bands' names above their layers, and lines between them; not where bands share layers."""
    spans = [band.layers for band in report.bands]
    if any(b[0] <= a[1] for a, b in itertools.pairwise(sorted(spans))):
        return
    for band in report.bands:
        first, last = (layers.index(layer) for layer in band.layers)
        if last < len(layers) - 1:
            axes.axvline(last + 0.5, color="white", linewidth=3)
        axes.text((first + last) / 2, -0.65, f"{band.band}: {band.kind}", ha="center", va="bottom")


def _spectra(axes: Axes, report: Report) -> None:
    """Each band's median of σ_i / σ_1 over its modules, and the middle half of them around it."""
    for number, band in enumerate(report.bands):
        own = [m for m in report.modules if (m.band, m.kind) == (band.band, band.kind) and m.norm > 0]
        if not own:
            continue
        low, median, high = np.nanpercentile(_relative(own), (25, 50, 75), axis=0)
        x = np.arange(1, len(median) + 1)
        colour = _LINES[number % len(_LINES)]
        dash = _DASHES[number // len(_LINES) % len(_DASHES)]
        label = f"{band.band} ({band.kind}, {len(own)} modules)"
        axes.plot(x, median, dash, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("singular value")
    axes.set_ylabel("share of the largest")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color=_GRID, linewidth=0.6)
    title = "Spectra: the median of each band, and the middle half of its modules"
    axes.set_title(title, fontsize=10, loc="left", weight="bold")
    if axes.lines:
        axes.legend(frameon=False)


def _relative(modules: list[ModuleReport]) -> Any:
    """σ_i / σ_1 (modules, longest); 0 where a module has no more."""
    longest = max(len(module.singular_values) for module in modules)
    values = np.zeros((len(modules), longest))
    for row, module in zip(values, modules, strict=True):
        row[: len(module.singular_values)] = np.array(module.singular_values) / module.singular_values[0]
    return values
