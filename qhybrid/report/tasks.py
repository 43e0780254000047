"""The tasks of a run that trained several adapters: how each went, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qhybrid.errors import QhybridError
from qhybrid.recipe.tasks import FOLDER
from qhybrid.report.colours import NUM_SERIES
from qhybrid.report.curves import legend_of, window_of
from qhybrid.report.layout import kinds
from qhybrid.report.line_chart import Line, line_chart, smoothed
from qhybrid.report.overview import badge
from qhybrid.report.page import Block, Figure, Note, Section, Table
from qhybrid.report.run_facts import RunFacts, number, read_run
from qhybrid.units import format_count


def tasks_section(facts: RunFacts) -> Section | None:
    """The section; None for a run of one adapter."""
    if not facts.tasks:
        return None
    runs: dict[str, RunFacts] = {}
    problems: list[Block] = []
    for name in facts.tasks:
        try:
            runs[name] = read_run(facts.run.folder / FOLDER / name)
        except QhybridError as error:
            problems.append(Note(f"{name}: {error.message}.", "warning"))
    blocks = [figure for figure in (_losses(runs),) if figure]
    text = (
        "One base model was trained with an adapter for each task, in turns. Each task has a report of its own: "
        f"`qhybrid report {facts.run.folder / FOLDER / facts.tasks[0]}`."
    )
    return Section("tasks", "Tasks", text, [*blocks, _table(runs), *problems])


def _losses(runs: Mapping[str, RunFacts]) -> Figure | None:
    lines, dots = [], []
    for i, (name, run) in enumerate(runs.items()):
        colour, steps = i % NUM_SERIES, run.events.in_order
        points = [(float(step.step), step.loss) for step in steps]
        if points:
            lines.append(Line(name, smoothed(points, window_of(len(steps))), colour))
        if run.events.losses():
            dots.append(Line(f"{name}, held-out rows", run.events.losses(), colour, "dots"))
    if not lines:
        return None
    picture = line_chart(
        [*lines, *dots],
        alt=f"The training losses of {len(lines)} tasks",
        x_label="optimizer step of the task",
        y_label="loss",
        log=None,
    )
    caption = (
        "Mean cross-entropy of a trained token, in nats, smoothed over some steps. The losses of two tasks are of "
        "different answers: how each falls can be compared, and not their heights."
    )
    return Figure("Loss of each task", picture, caption, legend_of([*lines, *dots]))


def _table(runs: Mapping[str, RunFacts]) -> Table:
    header = ("task", "state", "adapters", "parameters", "rows", "steps", "first loss", "last tenth", "held-out")
    rows = []
    for name, run in runs.items():
        layout, audit, steps = run.layout, run.audit, run.events.in_order
        held_out = number(run.figures.get("eval_loss"))
        rows.append(
            (
                name,
                badge(run)[0],
                " / ".join(kinds(layout, band) for band in layout.bands) if layout else "",
                format_count(layout.num_parameters) if layout else "",
                format_count(audit.totals.get("train_rows", 0)) if audit else "",
                format_count(run.events.last_step),
                f"{steps[0].loss:.4f}" if steps else "",
                f"{run.events.last_tenth_loss:.4f}" if steps else "",
                f"{held_out:.4f}" if math.isfinite(held_out) else "",
            )
        )
    return Table("Every task", header, rows, left=3)
