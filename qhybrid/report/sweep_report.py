"""The report of a sweep: results.json in, one page out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qhybrid.report.overview import model_name
from qhybrid.report.page import Block, Card, Folded, Note, Page, Section, Table, render
from qhybrid.report.sweep_pictures import (
    BETTER,
    WORSE,
    front,
    learning_rates,
    metric_words,
    quality,
    rank_maps,
    verdict,
)
from qhybrid.sweep.results import RESULTS, ArmResult, SweepResults, read_results
from qhybrid.sweep.text import interval_text, marked_difference
from qhybrid.units import format_bytes, format_count, format_duration


def is_sweep(folder: Path) -> bool:
    """Whether a sweep, and no run, was begun or ended in a folder."""
    if (folder / "run.json").is_file():
        return False
    return (folder / RESULTS).is_file() or (folder / "sweep.json").is_file()


def sweep_report(folder: Path) -> str:
    """The HTML of a sweep's report.

    Raises:
        SweepError: the sweep has not ended, or its results cannot be read.
    """
    results = read_results(folder)
    arms = results.best_first  # an arm's number is its place, from 1
    sections = [
        _result(results, arms),
        quality(results, arms),
        front(results, arms),
        learning_rates(results, arms),
        rank_maps(arms),
        _runs(results),
    ]
    return render(
        Page(
            kind="sweep",
            title=folder.resolve().name,
            badge=("finished", "good"),
            lead=_lead(results),
            cards=_cards(results, arms),
            notes=[Note(note) for note in results.notes],
            sections=[section for section in sections if section is not None],
        )
    )


def _lead(results: SweepResults) -> str:
    where = "the CPU" if results.device == "cpu" else "a GPU"
    return (
        f"{len(results.arms)} ways to spend {format_count(results.parameters)} adapter parameters on "
        f"{model_name(results.model)}, each compared with the control, {results.control}: "
        f"{format_count(len(results.runs))} runs on {where}, {results.date}."
    )


def _cards(results: SweepResults, arms: Sequence[ArmResult]) -> list[Card]:
    first = results.metrics[0]
    found = []
    for title, arm in (("Best arm", arms[0]), ("The control", results.arm(results.control))):
        if first in arm.metrics:
            found.append(Card(title, arm.name, f"{metric_words(first)} {interval_text(arm.metrics[first])}"))
    verdicts = [verdict(arm, first) for arm in arms]
    against = f"than the control, by {metric_words(first)}"
    found.append(Card("Clearly better", f"{verdicts.count(BETTER)} of {len(arms) - 1}", against))
    found.append(Card("Clearly worse", f"{verdicts.count(WORSE)} of {len(arms) - 1}", against))
    seeds = f"held out, {len(results.seeds)} seed{'s' * (len(results.seeds) != 1)} for each arm"
    found.append(Card("Measured on", f"{format_count(results.num_rows)} rows", seeds))
    seconds = sum(run.seconds + run.other_seconds for run in results.runs)
    found.append(Card("Time of all runs", format_duration(seconds), f"{results.jobs} at a time, at most"))
    return found


def _result(results: SweepResults, arms: Sequence[ArmResult]) -> Section:
    header = ["", "arm", "best rate"]
    for metric in results.metrics:
        header += [metric_words(metric), "to the control"]
    rows = [[str(number), *_cells(arm, results)] for number, arm in enumerate(arms, 1)]
    caption = (
        "Means with 95 % intervals in brackets (bootstrap over seeds and held-out rows; of differences in pairs). "
        "● a difference that is clear of 0; ! a rate at the edge of those tried: a better one may lie beyond; "
        "* not beaten in quality, memory and time at once."
    )
    table = Table("All arms, the best first", [*header, "time", "memory", "front"], rows, left=2, caption=caption)
    what = [
        (str(number), arm.name, arm.description, f"{arm.mean_rank:.2f}", format_count(arm.parameters))
        for number, arm in enumerate(arms, 1)
    ]
    arm_table = Table("What the arms are", ("", "arm", "what it is", "mean rank", "parameters"), what, left=3)
    return Section("result", "Result", _sentence(results, arms), [table, arm_table])


def _sentence(results: SweepResults, arms: Sequence[ArmResult]) -> str:
    first = results.metrics[0]
    better = [arm.name for arm in arms if verdict(arm, first) == BETTER]
    worse = [arm.name for arm in arms if verdict(arm, first) == WORSE]
    unclear = len(arms) - len(better) - len(worse) - 1
    text = f"By {metric_words(first)}, "
    text += f"clearly better than {results.control}: {', '.join(better) or 'none'}; "
    text += f"clearly worse: {', '.join(worse) or 'none'}. "
    if unclear:
        text += f"For the other {unclear} this sweep cannot tell."
    return text


def _cells(arm: ArmResult, results: SweepResults) -> list[str]:
    name = f"{arm.name} (control)" if arm.name == results.control else arm.name
    rate = "–" if arm.best_learning_rate is None else f"{arm.best_learning_rate:g}" + " !" * arm.is_best_at_edge
    cells = [name, rate]
    for metric in results.metrics:
        one = arm.metrics.get(metric)
        cells.append(arm.status if one is None else interval_text(one))
        cells.append(marked_difference(arm.differences.get(metric)))
    cells.append("" if arm.seconds is None else format_duration(arm.seconds))
    cells.append("" if arm.peak_bytes is None else format_bytes(arm.peak_bytes))
    return [*cells, "*" if arm.is_on_front else ""]


def _runs(results: SweepResults) -> Section:
    header = ["run", "status", "phase", "steps", *map(metric_words, results.metrics), "time", "memory", "note"]
    rows = []
    for run in results.runs:
        metrics = [f"{run.metrics[name]:.4f}" if name in run.metrics else "" for name in results.metrics]
        steps = f"{format_count(run.step)} of {format_count(run.total_steps)}"
        memory = "" if run.peak_bytes is None else format_bytes(run.peak_bytes)
        time = format_duration(run.seconds)
        rows.append([run.name, run.status, run.phase, steps, *metrics, time, memory, run.note])
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    blocks: list[Block] = [Table(f"All {len(rows)} runs", header, rows, left=3, folded=True)]
    blocks.append(Folded("Versions", versions))
    lead = "Each run has a folder and a report of its own: `qhybrid report SWEEP/runs/ARM/RUN/run`."
    return Section("runs", "Runs", lead, blocks)
