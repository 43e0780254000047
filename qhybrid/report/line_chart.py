"""Curves over steps: lines, bands around them, and marks, on linear or logarithmic axes."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from qhybrid.report.axes import Axes, Axis, Size
from qhybrid.report.svg import Picture, path_of, tick_text

_MOST_POINTS = 900  # of a line; beyond that the extremes of each stretch are drawn
_MOST_TOLD = 150  # points with their values on hover

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve. Points that are not finite interrupt it.

    Attributes:
        style: "faint" is for raw values behind smoothed ones, "steps" holds a value until the next.
        around: (x, low, high) of a band behind the line.
    """

    name: str
    points: Points
    colour: int = 0
    style: Literal["line", "faint", "dashed", "dots", "steps"] = "line"
    around: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Mark:
    """A vertical line at x, with words."""

    x: float
    text: str


def line_chart(
    lines: Sequence[Line],
    *,
    alt: str,
    x_label: str,
    y_label: str,
    log: bool | None = False,
    zero: bool = False,
    marks: Sequence[Mark] = (),
    y_text: Callable[[float], str] = tick_text,
) -> Markup:
    """Draw lines over whole numbers, such as steps, into one picture.

    Args:
        log: a logarithmic y axis; None where the values are positive and far apart.
        zero: begin the y axis at 0.
        y_text: how a value is written.
    """
    size = Size()
    xs = [x for line in lines for x, _ in line.points]
    x_axis = Axis.between(xs, x_label, most=size.x_ticks, integers=True)
    y_axis = Axis.around(values_of(lines, zero=zero), y_label, log=log, most=size.y_ticks, text=y_text)
    return draw_lines(lines, Axes(x_axis, y_axis, size), alt=alt, marks=marks)


def values_of(lines: Sequence[Line], *, zero: bool = False) -> list[float]:
    """All finite values of some lines and of the bands around them; and 0, if it is asked for."""
    values = [y for line in lines for _, y in line.points]
    values += [y for line in lines for _, *pair in line.around for y in pair]
    return [value for value in values if math.isfinite(value)] + [0.0] * zero


def draw_lines(lines: Sequence[Line], axes: Axes, *, alt: str, marks: Sequence[Mark] = ()) -> Markup:
    """Draw lines between axes that are given."""
    picture, size = axes.picture(alt), axes.size
    for mark in marks:
        x = axes.x(mark.x)
        picture.add("line", css="mark", x1=x, x2=x, y1=size.top, y2=size.height - size.bottom)
        late = x > (size.left + size.width) / 2
        picture.label(x - 4 if late else x + 4, size.top + 9, mark.text, "tick", "end" if late else None)
    for line in lines:
        _draw(picture, line, axes)
    return picture.markup()


def _draw(picture: Picture, line: Line, place: Axes) -> None:
    colour = f"c{line.colour}"
    if line.around:
        low = [(place.x(x), place.y(bottom)) for x, bottom, _ in line.around]
        high = [(place.x(x), place.y(top)) for x, _, top in reversed(line.around)]
        picture.add("path", css=f"area {colour}", d=path_of([*low, *high]) + "Z")
    for piece in _pieces(line.points):
        placed = [(place.x(x), place.y(y)) for x, y in thinned(piece)]
        if line.style == "steps":
            placed = [placed[0], *(p for a, b in itertools.pairwise(placed) for p in ((b[0], a[1]), b))]
        if line.style != "dots" and len(placed) > 1:
            picture.add("path", css=f"{line.style} {colour}", d=path_of(placed))
        elif line.style != "dots":
            picture.add("circle", css=f"dot {colour}", cx=placed[0][0], cy=placed[0][1], r=2.5)
    told = [(x, y) for x, y in line.points if math.isfinite(y)]
    if line.style == "faint" or len(told) > _MOST_TOLD:
        return
    for x, y in told:
        css = f"dot {colour}" if line.style == "dots" else "hit"
        dot = picture.add("circle", css=css, cx=place.x(x), cy=place.y(y), r=4.0 if line.style == "dots" else 6.0)
        picture.add("title", f"{line.name}, {tick_text(x)}: {place.y_axis.text(y)}", into=dot)


def _pieces(points: Points) -> Iterator[list[tuple[float, float]]]:
    """The stretches without a value that is not finite."""
    for finite, piece in itertools.groupby(points, key=lambda point: math.isfinite(point[1])):
        if finite:
            yield list(piece)


def thinned(points: Points) -> Points:
    """At most about `_MOST_POINTS` points that look the same: of every stretch the lowest and the highest."""
    if len(points) <= _MOST_POINTS:
        return points
    kept: list[tuple[float, float]] = [points[0]]
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(extremes)
    return [*kept, points[-1]]


def smoothed(points: Points, window: int) -> Points:
    """The mean of the last `window` finite values at each place (of as many as there are at the beginning)."""
    last: deque[float] = deque()
    total, result = 0.0, []
    for x, y in points:
        if not math.isfinite(y):
            continue
        last.append(y)
        total += y
        if len(last) > window:
            total -= last.popleft()
        result.append((x, total / len(last)))
    return result
