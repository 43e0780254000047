"""Pictures of a sweep: its arms beside the control, the front, the search for learning rates, and rank maps."""

from __future__ import annotations

from collections.abc import Sequence

from qhybrid.report.axes import SMALL, Axes, Axis
from qhybrid.report.comparison import Interval, Point, intervals, scatter
from qhybrid.report.heat_map import Grid, Shades, name_of, small_map
from qhybrid.report.line_chart import Line, draw_lines, values_of
from qhybrid.report.page import Block, Figure, Gallery, Legend, Section
from qhybrid.sweep.results import LOWER_IS_BETTER, ArmResult, SweepResults
from qhybrid.sweep.text import difference_text, interval_text

PLAIN, ACCENT, WORSE, BETTER = 7, 0, 1, 2  # colours: grey, blue, orange, green


def metric_words(metric: str) -> str:
    """The name of a metric as people say it."""
    return metric.replace("_", " ")


def _is_better(metric: str, difference: float) -> bool:
    return difference < 0 if metric in LOWER_IS_BETTER else difference > 0


def verdict(arm: ArmResult, metric: str) -> int:
    """The colour of what a difference to the control says: better, worse, or not clear."""
    one = arm.differences.get(metric)
    if one is None:
        return ACCENT if arm.is_control and metric in arm.metrics else PLAIN
    if not one.is_clear:
        return PLAIN
    return BETTER if _is_better(metric, one.mean) else WORSE


def quality(results: SweepResults, arms: Sequence[ArmResult]) -> Section:
    """Every metric of the arms, and its difference to the control."""
    blocks: list[Block] = []
    for metric in results.metrics:
        blocks += [_means(results, arms, metric), _differences(results, arms, metric)]
    lead = "Two intervals that overlap may still differ: the second picture compares seed by seed and row by row."
    return Section("quality", "Quality", lead, blocks)


def _means(results: SweepResults, arms: Sequence[ArmResult], metric: str) -> Figure:
    rows = []
    for number, arm in enumerate(arms, 1):
        one = arm.metrics.get(metric)
        ends = None if one is None else (one.low, one.mean, one.high)
        text = arm.status if one is None else interval_text(one)
        rows.append(Interval(f"{number}  {arm.name}", ends, text, verdict(arm, metric)))
    control = results.arm(results.control).metrics.get(metric)
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    return Figure(
        f"{metric_words(metric).capitalize()} of each arm",
        intervals(
            rows,
            alt=f"{metric_words(metric)} of {len(arms)} arms with 95 % intervals",
            x_label=metric_words(metric),
            line=("control", control.mean) if control else None,
        ),
        f"The mean and its 95 % interval; {better} is better.",
        _legend(),
        wide=True,
    )


def _differences(results: SweepResults, arms: Sequence[ArmResult], metric: str) -> Figure:
    rows = []
    for number, arm in enumerate(arms, 1):
        one = arm.differences.get(metric)
        if one is not None:
            ends = (one.low, one.mean, one.high)
            rows.append(Interval(f"{number}  {arm.name}", ends, difference_text(one), verdict(arm, metric)))
    side = "left" if metric in LOWER_IS_BETTER else "right"
    return Figure(
        f"{metric_words(metric).capitalize()}: difference to {results.control}",
        intervals(
            rows,
            alt=f"Differences of {metric_words(metric)} to the control with 95 % intervals",
            x_label=f"{metric_words(metric)}, arm minus control",
            line=("no difference", 0.0),
        ),
        f"Better is to the {side} of the line. An interval that crosses it is a difference that may be none.",
        _legend()[1:],
        wide=True,
    )


def _legend() -> list[Legend]:
    return [
        Legend("the control", ACCENT, "dots"),
        Legend("clearly better", BETTER, "dots"),
        Legend("clearly worse", WORSE, "dots"),
        Legend("not clear", PLAIN, "dots"),
    ]


def front(results: SweepResults, arms: Sequence[ArmResult]) -> Section | None:
    """Quality against memory and against time; None where neither was measured."""
    metric = results.metrics[0]
    corner = "lower" if metric in LOWER_IS_BETTER else "upper"
    legend = [Legend("on the front", ACCENT, "dots"), Legend("beaten by another arm", PLAIN, "dots")]
    blocks: list[Block] = []
    for title, label, name, unit in (
        ("Quality and memory", "memory at the peak, GiB", "peak_bytes", 2**30),
        ("Quality and time", "time of a run's steps, minutes", "seconds", 60),
    ):
        points = []
        for number, arm in enumerate(arms, 1):
            cost = getattr(arm, name)
            if metric in arm.metrics and cost is not None:
                colour = ACCENT if arm.is_on_front else PLAIN
                points.append(Point(number, arm.name, cost / unit, arm.metrics[metric].mean, colour))
        if points:
            alt = f"{title} of {len(points)} arms"
            picture = scatter(points, alt=alt, x_label=label, y_label=metric_words(metric))
            caption = f"The best are in the {corner} left corner. Numbers as in the table."
            blocks.append(Figure(title, picture, caption, legend))
    if not blocks:
        return None
    names = ", ".join(arm.name for arm in arms if arm.is_on_front) or "none"
    lead = f"An arm is on the Pareto front when no other is at least as good in quality, memory and time: {names}."
    return Section("front", "Quality, memory and time", lead, blocks)


def learning_rates(results: SweepResults, arms: Sequence[ArmResult]) -> Section | None:
    """The search of each arm, on one scale; None where every arm had one rate only."""
    tried = {arm.name: sorted({run.learning_rate for run in results.runs_of(arm.name)}) for arm in arms}
    if all(len(rates) < 2 for rates in tried.values()):
        return None
    metric = results.metrics[0]
    curves = {arm.name: _curve(results, arm.name, metric) for arm in arms}
    every = [Line(name, points) for name, points in curves.items()]
    y_axis = Axis.around(values_of(every), metric_words(metric), log=None, most=SMALL.y_ticks)
    rates = sorted(results.learning_rates)
    ticks = rates if len(rates) <= SMALL.x_ticks else [rates[0], rates[len(rates) // 2], rates[-1]]
    axes = Axes(Axis("learning rate", rates[0] / 1.3, rates[-1] * 1.3, ticks, log=True), y_axis, SMALL)
    pictures = []
    for number, arm in enumerate(arms, 1):
        curve = curves[arm.name]
        lines = [Line(results.control, curves[results.control], PLAIN, "dashed")]
        lines += [Line(arm.name, curve, ACCENT), Line(arm.name, curve, ACCENT, "dots")]
        best = "none finished" if arm.best_learning_rate is None else f"best at {arm.best_learning_rate:g}"
        missing = ", ".join(f"{rate:g}" for rate in tried[arm.name] if rate not in dict(curve))
        gone = f"; given up: {missing}" if missing else ""
        alt = f"{metric_words(metric)} of {arm.name} at {len(curve)} learning rates"
        pictures.append((f"{number} {arm.name}: {best}{gone}", draw_lines(lines, axes, alt=alt)))
    caption = (
        f"The mean {metric_words(metric)} over the seeds of the search, on one scale; dashed is the control. "
        "Given up are rates that diverged or were pruned. A best rate at the edge may not be the arm's best."
    )
    lead = "Every arm got its own search: the best rate of one kind or rank is not that of another."
    return Section("rates", "Learning rates", lead, [Gallery("The search", pictures, caption)])


def _curve(results: SweepResults, arm: str, metric: str) -> list[tuple[float, float]]:
    """(rate, mean metric) of the rates at which all runs of the search finished: those the best was chosen of."""
    found: dict[float, list[float]] = {}
    for run in results.runs_of(arm):
        if run.seed in results.search_seeds and metric in run.metrics:
            found.setdefault(run.learning_rate, []).append(run.metrics[metric])
    whole = len(results.search_seeds)
    return [(rate, sum(values) / whole) for rate, values in sorted(found.items()) if len(values) == whole]


def rank_maps(arms: Sequence[ArmResult]) -> Section | None:
    """A map of the ranks of each arm; None where they are not known."""
    places = dict.fromkeys((module.layer, module.target) for arm in arms for module in arm.ranks)
    if not places:
        return None
    grid = Grid.of_places(places)
    shades = Shades(0, max(module.rank for arm in arms for module in arm.ranks))
    pictures = []
    for number, arm in enumerate(arms, 1):
        ranks = {name_of(module.layer, module.target): float(module.rank) for module in arm.ranks}
        if ranks:
            low, high = min(ranks.values()), max(ranks.values())
            span = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
            picture = small_map(grid, ranks, shades, alt=f"Map of the ranks of {arm.name}: {span}")
            pictures.append((f"{number} {arm.name}: rank {span}", picture))
    caption = (
        f"Layers from left to right, {', '.join(grid.targets)} from top to bottom, in the same colours: dark is a "
        f"low rank, bright a high one, up to {shades.high:.0f}. The ranks at the end of "
        "the run from the first seed, or as planned where it has not ended."
    )
    blocks = [Gallery("Ranks of the arms", pictures, caption)]
    return Section("maps", "Rank maps", "Where each arm has its ranks.", blocks)
