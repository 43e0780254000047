"""Curves of a run: loss, learning rates, gradient norm and speed, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from qhybrid.report.colours import NUM_SERIES
from qhybrid.report.line_chart import Line, Mark, Points, line_chart, smoothed
from qhybrid.report.page import Figure, Legend, Section
from qhybrid.report.records import Step
from qhybrid.report.run_facts import RunFacts
from qhybrid.units import format_count


def curves(facts: RunFacts) -> Section | None:
    """The section; None before the first step."""
    steps = facts.events.in_order
    if not steps:
        return None
    marks = resume_marks(facts)
    figures = [_loss(facts, steps, marks), _learning_rates(steps, marks), _gradients(steps, marks)]
    figures.append(_speed(steps, marks))
    return Section("training", "Training", _words(facts), [figure for figure in figures if figure])


def resume_marks(facts: RunFacts) -> list[Mark]:
    """Where the run was resumed."""
    return [Mark(record["step"], "resumed") for record in facts.events.of("begin") if record["step"]]


def legend_of(lines: Sequence[Line]) -> list[Legend]:
    """One entry for each line."""
    return [Legend(line.name, line.colour, line.style) for line in lines]


def window_of(num_steps: int) -> int:
    """How many steps a smoothed curve averages: a twentieth, and at least five."""
    return max(5, num_steps // 20)


def _words(facts: RunFacts) -> str:
    first, last = facts.events.in_order[0].loss, facts.events.last_tenth_loss
    way = "fell" if last < first else "went"
    text = f"The training loss {way} from {first:.4f} at the first step to {last:.4f} in the last tenth of steps."
    evaluations = [loss for _, loss in facts.events.losses()]
    if len(evaluations) > 1:
        text += f" On held-out rows it went from {evaluations[0]:.4f} to {evaluations[-1]:.4f}."
        if evaluations[-1] > 1.02 * min(evaluations):
            text += f" Its lowest was {min(evaluations):.4f}: later steps did not help there."
    elif evaluations:
        text += f" On held-out rows it was {evaluations[0]:.4f}."
    return text


def _loss(facts: RunFacts, steps: Sequence[Step], marks: Sequence[Mark]) -> Figure:
    raw = [(float(step.step), step.loss) for step in steps]
    window = window_of(len(steps))
    lines = [Line("each step", raw, 0, "faint")]
    lines.append(Line(f"training, mean of {window} steps", smoothed(raw, window), 0))
    dots = []
    names = dict.fromkeys(name for losses in facts.events.evaluations.values() for name in losses)
    for colour, name in enumerate(names, 1):
        points = facts.events.losses(name)
        words = "held-out rows" if name == "eval_loss" else f"held-out rows, {name.removeprefix('eval_')}"
        lines.append(Line(words, points, colour % NUM_SERIES, "line" if len(points) > 1 else "dots"))
        dots.append(Line(words, points, colour % NUM_SERIES, "dots"))
    alt = f"The training loss over {format_count(len(steps))} steps, from {raw[0][1]:.4f} to {raw[-1][1]:.4f}"
    every = [*lines, *dots]
    return Figure(
        "Loss",
        line_chart(every, alt=alt, x_label="optimizer step", y_label="loss", log=None, marks=marks),
        "Mean cross-entropy of a trained token, in nats; lower is better. Where the curve of the held-out rows "
        "turns up while training goes on down, the model is learning its rows by heart.",
        legend_of(lines),
    )


def _learning_rates(steps: Sequence[Step], marks: Sequence[Mark]) -> Figure | None:
    groups: dict[Points, list[str]] = {}  # groups with one and the same curve share a line
    for name in dict.fromkeys(name for step in steps for name in step.learning_rates):
        points = tuple((float(s.step), s.learning_rates[name]) for s in steps if name in s.learning_rates)
        groups.setdefault(points, []).append(name)
    lines = [Line(_joined(names), points, i % NUM_SERIES) for i, (points, names) in enumerate(groups.items())]
    if not lines:
        return None
    alt = f"The learning rates of {len(lines)} groups of parameters"
    chart = line_chart(lines, alt=alt, x_label="optimizer step", y_label="learning rate", zero=True, marks=marks)
    return Figure(
        "Learning rate",
        chart,
        "By group of parameters; groups with one curve share a line. LoRA+ gives B a multiple of the rate of A.",
        legend_of(lines),
    )


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _gradients(steps: Sequence[Step], marks: Sequence[Mark]) -> Figure | None:
    raw = [(float(step.step), step.grad_norm) for step in steps]
    smooth = smoothed(raw, window_of(len(steps)))
    if not smooth:
        return None
    lines = [Line("each step", raw, 0, "faint"), Line(f"mean of {window_of(len(steps))} steps", smooth, 0)]
    alt = "The norm of the gradient over the steps"
    chart = line_chart(lines, alt=alt, x_label="optimizer step", y_label="gradient norm", log=None, marks=marks)
    caption = "Before clipping. Spikes are steps that would have moved the adapters far; a steady rise warns."
    return Figure("Gradient norm", chart, caption, legend_of(lines))


def _speed(steps: Sequence[Step], marks: Sequence[Mark]) -> Figure | None:
    raw = [(float(step.step), step.tokens / step.seconds) for step in steps if step.seconds > 0]
    if not raw:
        return None
    lines = [Line("each step", raw, 2, "faint")]
    lines.append(Line(f"mean of {window_of(len(steps))} steps", smoothed(raw, window_of(len(steps))), 2))
    alt = "Tokens a second over the steps"
    chart = line_chart(lines, alt=alt, x_label="optimizer step", y_label="tokens/s", zero=True, marks=marks)
    caption = "Tokens a second, padding not counted. Dips are short rows, or a machine that had other work to do."
    return Figure("Speed", chart, caption, legend_of(lines))
