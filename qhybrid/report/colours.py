"""Colours that people with any colour vision tell apart, and that keep their order in print.

Scales: a few points of matplotlib's viridis and cividis (CC0), with straight lines between them.
"""

from __future__ import annotations

VIRIDIS = (
    "#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725",
)  # fmt: skip
CIVIDIS = (
    "#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
)  # fmt: skip
NUM_SERIES = 8  # classes c0 to c7 of page.css: the palette of Okabe and Ito, and grey


def colour_of(share: float, scale: tuple[str, ...] = VIRIDIS) -> str:
    """The colour "#rrggbb" at `share` (0 to 1) of a scale; what is outside gets the end's."""
    place = min(max(share, 0.0), 1.0) * (len(scale) - 1)
    low = min(int(place), len(scale) - 2)
    channels = zip(_channels(scale[low]), _channels(scale[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in channels)


def is_dark(colour: str) -> bool:
    """Whether white has a higher contrast on `colour` than black (WCAG 2.1, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _shares(colour)]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _shares(colour: str) -> list[float]:
    return [channel / 255 for channel in _channels(colour)]
