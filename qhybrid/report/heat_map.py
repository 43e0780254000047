"""Maps of layer × module: one cell for each adapted module, numbered where there is room."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from qhybrid.architecture.layout import Layout
from qhybrid.report.colours import VIRIDIS, colour_of, is_dark
from qhybrid.report.svg import Picture, tick_text

_CELL = 22.0
_SMALL = 8.0  # side of a cell in small maps
_NAMES = 76.0  # width of the modules' names
_MEANS = 40.0
_BANDS = 20.0
_AXIS = 34.0
_KEY = 22.0  # height of the scale of colours
_STEPS, _STEP, _GAP = 24, 6.0, 8.0  # of that scale
_LETTER = 6.5  # width of a letter, about
_MOST_NUMBERED = 48  # layers; beyond that the numbers in the cells are too small to read
_MOST_LAYER_NAMES = 40
_MOST_COLUMNS = 512  # beyond that only layers with adapters get one


@dataclass(frozen=True)
class Grid:
    """The places: a column for each layer, a row for each type of module, and the bands above them.

    Attributes:
        columns: layers from 0 on, those without adapters too.
        targets: the last parts of the modules' names.
        modules: column and target of every module by its name.
        bands: name, first and last column of each; none where bands share layers.
    """

    columns: tuple[int, ...]
    targets: tuple[str, ...]
    modules: Mapping[str, tuple[int, str]]
    bands: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, layout: Layout) -> Grid:
        """The grid of a layout, which has at least one row."""
        adapted = sorted({row.layer for row in layout})
        columns = tuple(range(adapted[-1] + 1)) if adapted[-1] < _MOST_COLUMNS else tuple(adapted)
        modules = {row.module: (columns.index(row.layer), row.target) for row in layout}
        spans = []
        for band in layout.bands:
            layers = [columns.index(row.layer) for row in layout.of_band(band)]
            spans.append((band, min(layers), max(layers)))
        spans.sort(key=lambda span: span[1])
        shared = any(one[2] >= other[1] for one, other in itertools.pairwise(spans))
        targets = tuple(dict.fromkeys(row.target for row in layout))
        return cls(columns, targets, modules, () if shared else tuple(spans))

    @classmethod
    def of_places(cls, places: Iterable[tuple[int, str]]) -> Grid:
        """The grid of modules that are known by layer and target; their names are those of `name_of`."""
        found = list(places)
        layers = sorted({layer for layer, _ in found})
        columns = tuple(range(layers[-1] + 1)) if layers[-1] < _MOST_COLUMNS else tuple(layers)
        modules = {name_of(layer, target): (columns.index(layer), target) for layer, target in found}
        return cls(columns, tuple(dict.fromkeys(target for _, target in found)), modules, ())


def name_of(layer: int, target: str) -> str:
    """A name for a module of which only the place is known."""
    return f"layer {layer} {target}"


@dataclass(frozen=True)
class Shades:
    """Values as colours.

    Attributes:
        low, high: what the ends of the scale stand for.
        log: equal factors are equal steps of colour.
    """

    low: float
    high: float
    scale: tuple[str, ...] = VIRIDIS
    log: bool = False

    def colour(self, value: float) -> str:
        """The colour of a value; those outside get the end's."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return colour_of((value - low) / ((high - low) or 1.0), self.scale)

    @classmethod
    def spread(cls, values: list[float], scale: tuple[str, ...] = VIRIDIS) -> Shades:
        """From the least to the largest of some values; logarithmic where they are positive and far apart."""
        found = [value for value in values if math.isfinite(value)] or [0.0]
        positive = [value for value in found if value > 0]
        if positive and max(positive) > 20 * min(positive):
            return cls(min(positive), max(positive), scale, log=True)
        return cls(min(0.0, *found), max(found) or 1.0, scale)


def heat_map(
    grid: Grid,
    values: Mapping[str, float],
    shades: Shades,
    *,
    alt: str,
    what: str,
    text: Callable[[float], str] = lambda value: f"{value:.0f}",
    told: Callable[[str, float], str] | None = None,
    means: bool = True,
) -> Markup:
    """A numbered map, with each module type's mean on the right.

    Args:
        values: by module; modules without one are outlined.
        what: what the scale of colours says it shows.
        text: a value as it stands in its cell. told: as it is told on hover.
    """
    width = _NAMES + len(grid.columns) * _CELL + (_MEANS if means else 6)
    top = _BANDS if grid.bands else 4.0
    bottom = top + len(grid.targets) * _CELL
    key = _Key.of(shades, what)
    picture = Picture(max(width, key.right), bottom + _AXIS + _KEY, alt, "map", scale=1.45)
    told = told or (lambda module, value: f"{module}: {text(value)}")
    _band_names(picture, grid, top, bottom)
    for row, target in enumerate(grid.targets):
        picture.label(_NAMES - 8, top + (row + 0.68) * _CELL, target, "name", "end")
        own = [values[m] for m, place in grid.modules.items() if place[1] == target and m in values]
        if means and own:
            mean = sum(own) / len(own)
            shown = f"{mean:.1f}" if mean >= 1 else tick_text(float(f"{mean:.2g}"))
            picture.label(width - 2, top + (row + 0.68) * _CELL, shown, "mean", "end")
    if means:
        picture.label(width - 2, top - 6 if grid.bands else bottom + 13, "mean", "tick", "end")
    for module, (column, target) in grid.modules.items():
        x, y = _NAMES + column * _CELL, top + grid.targets.index(target) * _CELL
        if module not in values or not math.isfinite(values[module]):
            picture.add("rect", css="empty", x=x + 1.5, y=y + 1.5, width=_CELL - 3, height=_CELL - 3)
            continue
        colour = shades.colour(values[module])
        cell = picture.add("g", css="cell")
        rect = {"x": x + 0.5, "y": y + 0.5, "width": _CELL - 1, "height": _CELL - 1}
        picture.add("rect", into=cell, fill=colour, **rect)
        if len(grid.columns) <= _MOST_NUMBERED:
            css = "number on-dark" if is_dark(colour) else "number"
            picture.add("text", text(values[module]), into=cell, css=css, x=x + _CELL / 2, y=y + _CELL * 0.66)
        picture.add("title", told(module, values[module]), into=cell)
    _layer_axis(picture, grid, bottom)
    key.draw(picture, bottom + _AXIS + 4)
    return picture.markup()


def small_map(grid: Grid, values: Mapping[str, float], shades: Shades, *, alt: str) -> Markup:
    """A map without names and numbers, for comparing many of them."""
    width = len(grid.columns) * _SMALL
    picture = Picture(width, len(grid.targets) * _SMALL, alt, "small-map", scale=min(4.0, 280 / width))
    for module, (column, target) in grid.modules.items():
        if module in values:
            side = {"width": _SMALL - 0.5, "height": _SMALL - 0.5, "fill": shades.colour(values[module])}
            cell = picture.add("rect", x=column * _SMALL, y=grid.targets.index(target) * _SMALL, **side)
            picture.add("title", f"{module}: {tick_text(values[module])}", into=cell)
    return picture.markup()


def _band_names(picture: Picture, grid: Grid, top: float, bottom: float) -> None:
    for name, first, last in grid.bands:
        left, right = _NAMES + first * _CELL, _NAMES + (last + 1) * _CELL
        most = int((right - left) / _LETTER)  # letters
        shown = name if len(name) <= most else name[: max(1, most - 1)] + "…"
        picture.add("line", css="bracket", x1=left + 2, x2=right - 2, y1=top - 4, y2=top - 4)
        picture.label((left + right) / 2, top - 8, shown, "tick", "middle")
        if last + 1 < len(grid.columns):
            picture.add("line", css="bracket", x1=right, x2=right, y1=top - 4, y2=bottom)


def _layer_axis(picture: Picture, grid: Grid, bottom: float) -> None:
    every = max(1, math.ceil(len(grid.columns) / _MOST_LAYER_NAMES))
    for column, layer in list(enumerate(grid.columns))[::every]:
        picture.label(_NAMES + (column + 0.5) * _CELL, bottom + 13, str(layer), "tick", "middle")
    picture.label(_NAMES + len(grid.columns) * _CELL / 2, bottom + 29, "layer", "axis-label", "middle")


@dataclass(frozen=True)
class _Key:
    """The scale of colours with its ends, below the map on the left; it can be wider than a narrow map."""

    scale: tuple[str, ...]
    low: str
    note: str

    @classmethod
    def of(cls, shades: Shades, what: str) -> _Key:
        low, high = (tick_text(float(f"{end:.3g}")) for end in (shades.low, shades.high))
        return cls(shades.scale, low, f"{high}  {what}" + (" (logarithmic)" if shades.log else ""))

    @property
    def left(self) -> float:
        return _NAMES + _GAP + _LETTER * len(self.low)

    @property
    def right(self) -> float:
        return self.left + _STEPS * _STEP + _GAP + _LETTER * len(self.note)

    def draw(self, picture: Picture, y: float) -> None:
        picture.label(_NAMES, y + 11, self.low, "tick")
        for i in range(_STEPS):
            colour, x = colour_of(i / (_STEPS - 1), self.scale), self.left + i * _STEP
            picture.add("rect", x=x, y=y + 2, width=_STEP + 0.3, height=11.0, fill=colour)
        picture.label(self.left + _STEPS * _STEP + _GAP, y + 11, self.note, "tick")
