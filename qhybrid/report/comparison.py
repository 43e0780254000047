"""Pictures that compare arms: intervals below each other, and points of two figures with a number each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qhybrid.report.axes import Axes, Axis
from qhybrid.report.svg import Picture, linear_ticks, tick_text

_WIDTH = 800.0
_NAMES, _TEXTS = 180.0, 190.0  # on the left and on the right
_ROW = 24.0
_MOST_LETTERS = 24  # of a name


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval; None where an arm has none, then `text` says why."""

    name: str
    ends: tuple[float, float, float] | None  # low, mean, high
    text: str
    colour: int


@dataclass(frozen=True)
class Point:
    """Two figures of something that has a number."""

    number: int
    name: str
    x: float
    y: float
    colour: int


def intervals(rows: Sequence[Interval], *, alt: str, x_label: str, line: tuple[str, float] | None) -> Markup:
    """A line for each interval, with its mean as a dot and its text on the right.

    Args:
        line: words and a value: a vertical line to compare with.
    """
    values = [end for row in rows for end in row.ends or ()] + ([line[1]] if line else [])
    ticks = linear_ticks(min(values, default=0.0), max(values, default=1.0))
    top, height = 20.0, len(rows) * _ROW
    picture = Picture(_WIDTH, top + height + 38, alt, "bars", scale=1.35)

    def x(value: float) -> float:
        return _NAMES + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_WIDTH - _NAMES - _TEXTS)

    for tick in ticks:
        picture.add("line", css="grid", x1=x(tick), x2=x(tick), y1=top, y2=top + height)
        picture.label(x(tick), top + height + 15, tick_text(tick), "tick", "middle")
    picture.label((_NAMES + _WIDTH - _TEXTS) / 2, top + height + 32, x_label, "axis-label", "middle")
    if line is not None:
        picture.add("line", css="mark", x1=x(line[1]), x2=x(line[1]), y1=top, y2=top + height)
        picture.label(x(line[1]), 12, line[0], "tick", "middle")
    for number, row in enumerate(rows):
        y = top + (number + 0.5) * _ROW
        name = row.name if len(row.name) <= _MOST_LETTERS else row.name[: _MOST_LETTERS - 1] + "…"
        picture.label(_NAMES - 12, y + 4, name, "name", "end")
        picture.label(_WIDTH - _TEXTS + 12, y + 4, row.text, "tick")
        if row.ends is not None:
            low, mean, high = (x(end) for end in row.ends)
            whisker = picture.add("line", css=f"whisker c{row.colour}", x1=low, x2=high, y1=y, y2=y)
            picture.add("title", f"{row.name}: {row.text}", into=whisker)
            dot = picture.add("circle", css=f"disc c{row.colour}", cx=mean, cy=y, r=5.0)
            picture.add("title", f"{row.name}: {row.text}", into=dot)
    return picture.markup()


def scatter(points: Sequence[Point], *, alt: str, x_label: str, y_label: str) -> Markup:
    """Numbered discs between two axes."""
    axes = Axes(
        Axis.around([point.x for point in points], x_label), Axis.around([point.y for point in points], y_label)
    )
    picture = axes.picture(alt, grid_x=True)
    for point in points:
        x, y = axes.x(point.x), axes.y(point.y)
        group = picture.add("g")
        picture.add("circle", into=group, css=f"disc c{point.colour}", cx=x, cy=y, r=8.5)
        picture.add("text", str(point.number), into=group, css="disc-number", x=x, y=y + 3.4)
        told = f"{point.name}: {x_label} {tick_text(point.x)}, {y_label} {point.y:.4g}"
        picture.add("title", told, into=group)
    return picture.markup()
