"""Pictures say what they were given: places, colours and numbers, held against independent computations."""

from __future__ import annotations

import itertools
import math
import random
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import tiny_layout
from hypothesis import given
from hypothesis import strategies as st

from qhybrid.report.axes import is_far_apart
from qhybrid.report.bars import Bar, bars, layer_bars
from qhybrid.report.colours import CIVIDIS, VIRIDIS, colour_of, is_dark
from qhybrid.report.heat_map import Grid, Shades, heat_map, small_map
from qhybrid.report.line_chart import Line, Mark, line_chart, smoothed, thinned
from qhybrid.report.svg import linear_ticks, log_ticks, tick_text

finite = st.floats(-1e12, 1e12, allow_nan=False)


@given(finite, finite)
def test_linear_ticks_are_round_and_reach_around(one, other):
    low, high = min(one, other), max(one, other)
    ticks = linear_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
    mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - factor) for factor in (1, 2, 5, 10)) < 1e-3


@given(st.floats(1e-9, 1e9), st.floats(1, 1e9))
def test_log_ticks_reach_around(low, factor):
    ticks = log_ticks(low, low * factor)
    assert ticks == sorted(ticks) and ticks[0] <= low and ticks[-1] >= low * factor


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.02, "0.02"),
        (1500, "1,500"),
        (2e-5, "2e-5"),
        (2_500_000, "2.5M"),
        (3e12, "3e12"),
        (-0.5, "-0.5"),
    ],
)
def test_ticks_as_text(value, text):
    assert tick_text(value) == text


def test_smoothing_is_the_mean_of_the_last_values():
    generator = random.Random(0)
    points = [(float(i), generator.random()) for i in range(200)]
    found = smoothed(points, 7)
    for i, (x, y) in enumerate(found):
        assert x == i and y == pytest.approx(
            np.mean([value for _, value in points[max(0, i - 6) : i + 1]]), rel=1e-12
        )
    assert smoothed([(1.0, math.nan), (2.0, 3.0), (3.0, math.inf), (4.0, 5.0)], 2) == [(2.0, 3.0), (4.0, 4.0)]


def test_thinning_keeps_ends_and_extremes():
    generator = random.Random(1)
    points = [(float(i), generator.gauss(0, 1)) for i in range(50_000)]
    points[12_345] = (12_345.0, 99.0)
    points[40_000] = (40_000.0, -99.0)
    kept = thinned(points)
    assert len(kept) < 1200 and set(kept) <= set(points)
    assert {points[0], points[-1], points[12_345], points[40_000]} <= set(kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def numbers_of(svg: str, css: str) -> list[list[tuple[float, float]]]:
    """The points of the paths of a class."""
    found = []
    for element in ElementTree.fromstring(svg).iter("path"):
        if css in (element.get("class") or "").split():
            pairs = element.get("d", "").lstrip("M").rstrip("Z").split(" L")
            found.append([tuple(float(number) for number in pair.split()) for pair in pairs])
    return found


@pytest.mark.parametrize("log", [False, True])
def test_points_are_where_their_values_are(log):
    values = [0.01, 0.1, 1.0, 10.0]
    svg = line_chart(
        [Line("a", list(enumerate(values, 1)))], alt="a", x_label="x", y_label="y", log=log, zero=not log
    )
    (placed,) = numbers_of(svg, "line")
    xs, ys = np.array(placed).T
    assert np.allclose(np.diff(xs), np.diff(xs)[0], atol=0.02)
    heights = ys[0] - ys
    expected = np.log(np.array(values) / values[0]) if log else np.array(values) - values[0]
    assert np.allclose(heights / heights[-1], expected / expected[-1], atol=1e-3)
    assert ("logarithmic" in svg) == log


def test_gaps_steps_bands_and_marks():
    points = [(1.0, 1.0), (2.0, math.nan), (3.0, 2.0), (4.0, 3.0)]
    svg = line_chart([Line("a", points)], alt="a", x_label="x", y_label="y", marks=[Mark(3.0, "here")])
    assert len(numbers_of(svg, "line")) == 1 and "here" in svg and "nan" not in svg.lower()
    (steps,) = numbers_of(
        line_chart([Line("a", [(0.0, 1.0), (5.0, 4.0)], style="steps")], alt="a", x_label="x", y_label="y"),
        "steps",
    )
    assert len(steps) == 3 and steps[0][1] == steps[1][1] and steps[1][0] == steps[2][0]
    (area,) = numbers_of(
        line_chart([Line("a", [(0.0, 1.0), (1.0, 2.0)], around=[(0.0, 0.5, 1.5), (1.0, 1.0, 3.0)])], alt="a",
                   x_label="x", y_label="y"), "area",
    )  # fmt: skip
    assert len(area) == 4


@pytest.mark.parametrize("points", [[], [(1.0, math.nan)], [(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)]])
@pytest.mark.parametrize("log", [False, True, None])
def test_charts_of_hardly_anything(points, log):
    svg = line_chart([Line("a", points)], alt="a", x_label="x", y_label="y", log=log)
    assert "nan" not in svg and "inf" not in svg


def test_far_apart():
    assert is_far_apart([0.01, 1.0]) and not is_far_apart([0.5, 1.0])
    assert not is_far_apart([0.0, 1.0]) and not is_far_apart([])


@pytest.mark.parametrize("scale", [VIRIDIS, CIVIDIS])
def test_colours_become_lighter_from_end_to_end(scale):
    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    shares = np.linspace(0, 1, 101)
    found = [luminance(colour_of(share, scale)) for share in shares]
    assert colour_of(0, scale) == colour_of(-3, scale) == scale[0]
    assert colour_of(1, scale) == colour_of(7, scale) == scale[-1]
    assert all(b > a - 1e-3 for a, b in itertools.pairwise(found)) and found[-1] > found[0] + 0.5
    for share, value in zip(shares, found, strict=True):  # at least 4.5 : 1, WCAG's AA
        contrast = 1.05 / (value + 0.05) if is_dark(colour_of(share, scale)) else (value + 0.05) / 0.05
        assert contrast >= 4.5


def test_the_key_of_a_narrow_map_is_not_cut_off():
    grid = Grid.of_places([(0, "q_proj"), (1, "q_proj")])
    shades = Shades(1, 1234, log=True)
    svg = ElementTree.fromstring(heat_map(grid, {}, shades, alt="a", what="of every module"))
    note = next(text for text in svg.iter("text") if "of every module" in (text.text or ""))
    assert note.text == "1,230  of every module (logarithmic)"
    width = float(svg.attrib["viewBox"].split()[2])
    assert width >= float(note.attrib["x"]) + 6 * len(note.text)


def test_a_map_has_a_cell_for_each_module():
    layout = tiny_layout()
    grid = Grid.of(layout)
    values = {row.module: float(i) for i, row in enumerate(layout)}
    first = layout.rows[0].module
    del values[first]
    shades = Shades(0, len(layout))
    svg = ElementTree.fromstring(heat_map(grid, values, shades, alt="a", what="things"))
    cells = {}
    for cell in (element for element in svg.iter("g") if element.get("class") == "cell"):
        rect, number, title = cell.find("rect"), cell.find("text"), cell.find("title")
        assert rect is not None and number is not None and title is not None
        name = (title.text or "").split(":")[0]
        cells[name] = (rect.get("x"), rect.get("y"), number.text, rect.get("fill"))
    assert cells.keys() == values.keys()
    assert len({place[:2] for place in cells.values()}) == len(values)
    for module, (_, _, text, fill) in cells.items():
        assert text == f"{values[module]:.0f}" and fill == shades.colour(values[module])
    rows = {row.module: (row.layer, row.target) for row in layout}
    for one in cells:
        for other in cells:
            assert (cells[one][0] == cells[other][0]) == (rows[one][0] == rows[other][0])
            assert (cells[one][1] == cells[other][1]) == (rows[one][1] == rows[other][1])
    assert len([element for element in svg.iter("rect") if element.get("class") == "empty"]) == 1
    means = [element.text for element in svg.iter("text") if element.get("class") == "mean"]
    own = [values[row.module] for row in layout if row.target == grid.targets[1]]
    assert means[1] == f"{np.mean(own):.1f}"
    names = [element.text for element in svg.iter("text")]
    assert all(band in names for band in layout.bands) and "2" in names
    assert small_map(grid, values, shades, alt="a").count("<rect") == len(values)


def test_bands_that_share_layers_have_no_brackets():
    bands = [
        {"band": "a", "layers": "all", "kind": "lora", "rank": 2, "target_modules": ["q_proj"]},
        {"band": "b", "layers": "2-3", "kind": "lora", "rank": 2, "target_modules": ["v_proj"]},
    ]
    assert Grid.of(tiny_layout(bands)).bands == ()
    apart = [{**bands[0], "layers": "0"}, {**bands[1], "layers": "4-5"}]
    grid = Grid.of(tiny_layout(apart))
    assert grid.bands == (("a", 0, 0), ("b", 4, 5)) and grid.columns == (0, 1, 2, 3, 4, 5)


def test_shades_by_spread():
    assert not Shades.spread([1.0, 2.0]).log and Shades.spread([1.0, 2.0]).low == 0
    wide = Shades.spread([0.0, 0.01, 1.0])
    assert wide.log and (wide.low, wide.high) == (0.01, 1.0)
    assert wide.colour(0.1) == colour_of(0.5) and wide.colour(0.0) == colour_of(0)
    assert Shades.spread([]).colour(0.0) == Shades.spread([0.0]).colour(0.0) == colour_of(0)


def test_bars_have_the_lengths_of_their_parts():
    rows = [Bar("planned", [("a", 3.0, 0), ("b", 1.0, 1)]), Bar("measured", [("all", 2.0, 7)])]
    svg = ElementTree.fromstring(
        bars(rows, alt="a", x_label="GiB", text=lambda size: f"{size:.1f} units", limit=("limit", 8.0))
    )
    widths = [float(rect.get("width", 0)) for rect in svg.iter("rect")]
    assert np.allclose(np.array(widths) / widths[0], [1, 1 / 3, 2 / 3], atol=1e-3)
    texts = [element.text for element in svg.iter("text")]
    assert "4.0 units" in texts and "2.0 units" in texts and "limit" in texts
    svg = ElementTree.fromstring(
        layer_bars((0, 1, 2), {0: [("a", 10.0, 0)], 2: [("a", 5.0, 0), ("b", 10.0, 1)]}, alt="a", y_label="y",
                   text=str)
    )  # fmt: skip
    heights = [float(rect.get("height", 0)) for rect in svg.iter("rect")]
    assert np.allclose(np.array(heights) / heights[0], [1, 0.5, 1], atol=1e-3)
