"""Curves over steps: lines, bands around them, and marks, on linear or logarithmic axes."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from qhybrid.report.svg import Picture, linear_ticks, log_ticks, path_of, tick_text

_WIDTH, _HEIGHT = 460.0, 270.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 12.0, 14.0, 40.0
_MOST_POINTS = 900  # of a line; beyond that the extremes of each stretch are drawn
_MOST_TOLD = 150  # points with their values on hover
_FAR_APART = 20  # positive values whose extremes differ by more get a logarithmic axis

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
    integers: bool = True,
) -> Markup:
    """Draw lines into one picture.

    Args:
        log: a logarithmic y axis; None where the values are positive and far apart.
        zero: begin the y axis at 0.
        y_text: how a value is written.
        integers: x has whole numbers only.
    """
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    values += [y for line in lines for _, *pair in line.around for y in pair if math.isfinite(y)]
    xs = [x for line in lines for x, _ in line.points] or [0.0, 1.0]
    values = values or [0.0, 1.0]
    if log is None:
        log = is_far_apart(values)
    if log:
        values = [y for y in values if y > 0] or [1.0]
        y_label += " (logarithmic)"
    y_ticks = (
        log_ticks(min(values), max(values)) if log else linear_ticks(min([*values, *[0] * zero]), max(values))
    )
    x_ticks = [t for t in linear_ticks(min(xs), max(xs), 7) if min(xs) <= t <= max(xs)]
    if integers:
        x_ticks = [t for t in x_ticks if t == int(t)]
    place = _Scale(min(xs), max(xs), y_ticks[0], y_ticks[-1], log)
    picture = Picture(_WIDTH, _HEIGHT, alt, "chart")
    for tick in y_ticks:
        y = place.y(tick)
        picture.add("line", css="grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y)
        picture.label(_LEFT - 7, y + 4, y_text(tick), "tick", "end")
    for tick in x_ticks:
        picture.label(place.x(tick), _HEIGHT - _BOTTOM + 16, tick_text(tick), "tick", "middle")
    picture.add("line", css="axis", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=_HEIGHT - _BOTTOM, y2=_HEIGHT - _BOTTOM)
    picture.label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label, "axis-label", "middle")
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    picture.add(
        "text", y_label, css="axis-label", text_anchor="middle", transform=f"translate(12 {middle:g}) rotate(-90)"
    )
    for mark in marks:
        x = place.x(mark.x)
        picture.add("line", css="mark", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM)
        late = x > (_LEFT + _WIDTH) / 2
        picture.label(x - 4 if late else x + 4, _TOP + 9, mark.text, "tick", "end" if late else None)
    for line in lines:
        _draw(picture, line, place, y_text)
    return picture.markup()


def is_far_apart(values: Sequence[float]) -> bool:
    """Whether values are positive and differ so much that the small ones need a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > _FAR_APART


@dataclass(frozen=True)
class _Scale:
    """From values to places in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log: bool

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        return _LEFT + share * (_WIDTH - _RIGHT - _LEFT)

    def y(self, value: float) -> float:
        low, high = self.y_low, self.y_high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        share = (value - low) / ((high - low) or 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)


def _draw(picture: Picture, line: Line, place: _Scale, y_text: Callable[[float], str]) -> None:
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
        picture.add("title", f"{line.name}, {tick_text(x)}: {y_text(y)}", into=dot)


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
