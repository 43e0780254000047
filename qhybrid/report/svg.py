"""Pictures as inline SVG: elements that escape what they are given, and axes with round numbers.

Colours come from page.css by class, so that they follow the reader's light or dark mode; nothing has an id.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from markupsafe import Markup

from qhybrid.redaction import redacted

Element = ElementTree.Element
_MANY = 560  # units; a wider picture is not shrunk to a small screen, but scrolled
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def shown(text: str) -> str:
    """`text` as it may be shown: redacted, and without control characters and halves of surrogate pairs."""
    return redacted(_UNPRINTABLE.sub("\ufffd", text))


class Picture:
    """An SVG picture of a size in its own units; the page scales it.

    Args:
        alt: what it shows, for readers who cannot see it.
        css: its class.
        scale: pixels for one of its units, where there is room; None takes all the room there is.
    """

    def __init__(self, width: float, height: float, alt: str, css: str, scale: float | None = None) -> None:
        self.root = ElementTree.Element("svg")
        if width > _MANY:
            css += " many"
        _set(self.root, {"viewBox": f"0 0 {_text(width)} {_text(height)}", "class": css})
        _set(self.root, {"width": scale and round(scale * width), "role": "img", "aria_label": shown(alt)})

    def add(self, tag: str, text: str | None = None, into: Element | None = None, **attributes: object) -> Element:
        """Append an element. Attributes: `css` is the class, underscores become hyphens, None is left out."""
        element = ElementTree.SubElement(self.root if into is None else into, tag)
        _set(element, {"class" if key == "css" else key: value for key, value in attributes.items()})
        if text is not None:
            element.text = shown(text)
        return element

    def label(self, x: float, y: float, text: str, css: str = "", anchor: str | None = None) -> Element:
        """Text at a place; anchor is start, middle or end."""
        return self.add("text", text, x=x, y=y, css=css, text_anchor=anchor)

    def upright(self, x: float, y: float, text: str) -> Element:
        """The name of a vertical axis, read from below, with its middle at a place."""
        turned = f"translate({_text(float(x))} {_text(float(y))}) rotate(-90)"
        return self.add("text", text, css="axis-label", text_anchor="middle", transform=turned)

    def markup(self) -> Markup:
        """The picture, ready to be put into a page."""
        return Markup(ElementTree.tostring(self.root, encoding="unicode", short_empty_elements=False))


def _set(element: Element, attributes: dict[str, object]) -> None:
    for name, value in attributes.items():
        if value is not None and value != "":
            element.set(name.replace("_", "-"), _text(value))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
    return str(value)


def path_of(points: Sequence[tuple[float, float]]) -> str:
    """The `d` of a line through points."""
    return "M" + " L".join(f"{_text(float(x))} {_text(float(y))}" for x, y in points)


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    if high - low <= 1e-9 * abs(low) or high - low < 1e-290:  # floats have no round numbers in between
        high = low + (abs(low) if abs(low) > 1e-280 else 1.0)
    raw = (high - low) / max(1, most - 1)
    exponent = math.floor(math.log10(raw))
    power = 10.0**exponent
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 2 - exponent) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers, with 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if last - first > 3 else (1, 2, 5)
    ticks = [
        factor * 10.0**power for power in range(first - 1, last + 2) for factor in factors
    ]  # rounding: one more
    below, above = max(tick for tick in ticks if tick <= low), min(tick for tick in ticks if tick >= high)
    return [tick for tick in ticks if below <= tick <= above]


def tick_text(value: float) -> str:
    """A number on an axis: "0.02", "1,500", "2M", "2e-5"."""
    if value == 0:
        return "0"
    if 1e6 <= abs(value) < 1e9:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e9 or abs(value) < 1e-3:
        return re.sub(r"e([+-])0*", lambda sign: "e-" if sign[1] == "-" else "e", f"{value:.3g}")
    return f"{value:,.6g}"
