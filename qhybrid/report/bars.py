"""Bars: sizes beside each other, whole or made of parts, and sums layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qhybrid.report.svg import Picture, linear_ticks, tick_text

_NAMES = 126.0
_RIGHT = 74.0  # for the sums behind the bars
_BAR, _GAP = 26.0, 12.0


@dataclass(frozen=True)
class Bar:
    """A bar of parts: their names, sizes and colours from left to right."""

    name: str
    parts: Sequence[tuple[str, float, int]]

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(size for _, size, _ in self.parts)


def bars(
    rows: Sequence[Bar],
    *,
    alt: str,
    x_label: str,
    text: Callable[[float], str],
    limit: tuple[str, float] | None = None,
    width: float = 760.0,
) -> Markup:
    """Horizontal bars on one scale, each with its sum.

    Args:
        text: a size as it is told.
        limit: a vertical line, such as the memory that there is.
        width: of the picture, in its own units.
    """
    largest = max([bar.total for bar in rows] + ([limit[1]] if limit else [])) or 1.0
    ticks = linear_ticks(0, largest, 6)
    scale = (width - _NAMES - _RIGHT) / max(ticks[-1], largest)
    top = 18.0 if limit else 4.0
    bottom = top + len(rows) * (_BAR + _GAP)
    picture = Picture(width, bottom + 36, alt, "bars", scale=1.35)
    for tick in ticks:
        x = _NAMES + tick * scale
        picture.add("line", css="grid", x1=x, x2=x, y1=top, y2=bottom)
        picture.label(x, bottom + 15, tick_text(tick), "tick", "middle")
    picture.label(_NAMES + ticks[-1] * scale / 2, bottom + 31, x_label, "axis-label", "middle")
    for number, bar in enumerate(rows):
        y, x = top + number * (_BAR + _GAP) + _GAP / 2, _NAMES
        picture.label(_NAMES - 10, y + _BAR * 0.67, bar.name, "name", "end")
        for name, size, colour in bar.parts:
            part = picture.add("rect", css=f"fill c{colour}", x=x, y=y, width=size * scale, height=_BAR)
            picture.add("title", f"{bar.name}, {name}: {text(size)}", into=part)
            x += size * scale
        picture.label(x + 7, y + _BAR * 0.67, text(bar.total), "value")
    if limit is not None:
        x = _NAMES + limit[1] * scale
        picture.add("line", css="mark", x1=x, x2=x, y1=top, y2=bottom)
        picture.label(x, 12, limit[0], "tick", "middle")
    return picture.markup()


def layer_bars(
    columns: Sequence[int],
    stacks: Mapping[int, Sequence[tuple[str, float, int]]],
    *,
    alt: str,
    y_label: str,
    text: Callable[[float], str],
) -> Markup:
    """A bar for each layer, made of its bands.

    Args:
        columns: the layers that have a place.
        stacks: (band, size, colour) by layer, from the bottom up.
    """
    left, top, height, right = 76.0, 10.0, 130.0, 8.0
    step = min(26.0, max(8.0, 700.0 / len(columns)))
    ticks = linear_ticks(0, max(sum(size for _, size, _ in stack) for stack in stacks.values()), 4)
    width = left + len(columns) * step + right
    picture = Picture(width, top + height + 38, alt, "bars", scale=1.35)
    for tick in ticks:
        y = top + height * (1 - tick / ticks[-1])
        picture.add("line", css="grid", x1=left, x2=width - right, y1=y, y2=y)
        picture.label(left - 7, y + 4, tick_text(tick), "tick", "end")
    for layer, stack in stacks.items():
        y = top + height
        for name, size, colour in stack:
            part = {
                "x": left + columns.index(layer) * step + 1,
                "width": step - 2,
                "height": height * size / ticks[-1],
            }
            y -= part["height"]
            bar = picture.add("rect", css=f"fill c{colour}", y=y, **part)
            picture.add("title", f"layer {layer}, {name}: {text(size)}", into=bar)
    every = max(1, round(24 / step))
    for column, layer in list(enumerate(columns))[::every]:
        picture.label(left + (column + 0.5) * step, top + height + 15, str(layer), "tick", "middle")
    picture.label(left + len(columns) * step / 2, top + height + 33, "layer", "axis-label", "middle")
    picture.upright(12, top + height / 2, y_label)
    return picture.markup()
