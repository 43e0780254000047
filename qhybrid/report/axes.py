"""The frame of a chart: two axes with round numbers, linear or logarithmic, and the places of values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qhybrid.report.svg import Picture, linear_ticks, log_ticks, tick_text

_FAR_APART = 20  # positive values whose extremes differ by more get a logarithmic axis


@dataclass(frozen=True)
class Size:
    """A chart's size and margins, in its own units; letters are 11 of them high."""

    width: float = 460.0
    height: float = 270.0
    left: float = 56.0
    right: float = 18.0
    top: float = 14.0
    bottom: float = 40.0
    x_ticks: int = 7
    y_ticks: int = 6


SMALL = Size(width=250.0, height=150.0, left=44.0, top=8.0, bottom=34.0, x_ticks=4, y_ticks=4)


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        low, high: the values at its ends.
        ticks: where it is labelled.
        text: how a value is written.
    """

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False
    text: Callable[[float], str] = tick_text

    @classmethod
    def around(
        cls,
        values: Sequence[float],
        label: str,
        *,
        log: bool | None = False,
        most: int = 6,
        text: Callable[[float], str] = tick_text,
    ) -> Axis:
        """An axis that begins and ends at round numbers around some values.

        Args:
            log: logarithmic, of the positive values; None where they are all positive and far apart.
        """
        found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        if is_far_apart(found) if log is None else log:
            positive = [value for value in found if value > 0] or [1.0]
            ticks = log_ticks(min(positive), max(positive))
            return cls(f"{label} (logarithmic)", ticks[0], ticks[-1], ticks, True, text)
        ticks = linear_ticks(min(found), max(found), most)
        return cls(label, ticks[0], ticks[-1], ticks, False, text)

    @classmethod
    def between(cls, values: Sequence[float], label: str, *, most: int = 7, integers: bool = False) -> Axis:
        """An axis that begins at the least value and ends at the largest, with round numbers in between."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        ticks = [tick for tick in linear_ticks(low, high, most) if low <= tick <= high]
        return cls(label, low, high, [tick for tick in ticks if not integers or tick == int(tick)])

    def share(self, value: float) -> float:
        """How far along the axis a value is: 0 to 1."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return (value - low) / ((high - low) or 1.0)


@dataclass(frozen=True)
class Axes:
    """Both axes of a chart of some size."""

    x_axis: Axis
    y_axis: Axis
    size: Size = Size()

    def x(self, value: float) -> float:
        """The place of a value from the left."""
        return self.size.left + self.x_axis.share(value) * (self.size.width - self.size.right - self.size.left)

    def y(self, value: float) -> float:
        """The place of a value from the top."""
        low, high = self.size.height - self.size.bottom, self.size.top
        return low - self.y_axis.share(value) * (low - high)

    def picture(self, alt: str, *, grid_x: bool = False) -> Picture:
        """A picture with the axes drawn, and lines across at the y axis' ticks (and the x axis')."""
        size = self.size
        bottom, right = size.height - size.bottom, size.width - size.right
        picture = Picture(size.width, size.height, alt, "chart")
        for tick in self.y_axis.ticks:
            picture.add("line", css="grid", x1=size.left, x2=right, y1=self.y(tick), y2=self.y(tick))
            picture.label(size.left - 7, self.y(tick) + 4, self.y_axis.text(tick), "tick", "end")
        for tick in self.x_axis.ticks:
            if grid_x:
                picture.add("line", css="grid", x1=self.x(tick), x2=self.x(tick), y1=size.top, y2=bottom)
            picture.label(self.x(tick), bottom + 16, self.x_axis.text(tick), "tick", "middle")
        picture.add("line", css="axis", x1=size.left, x2=right, y1=bottom, y2=bottom)
        picture.label((size.left + right) / 2, size.height - 6, self.x_axis.label, "axis-label", "middle")
        if self.y_axis.label:
            picture.upright(12, (size.top + bottom) / 2, self.y_axis.label)
        return picture


def is_far_apart(values: Sequence[float]) -> bool:
    """Whether values are positive and differ so much that the small ones need a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > _FAR_APART
