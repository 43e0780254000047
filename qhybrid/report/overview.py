"""The head of a run's report: what was trained, how it ended, and what happened on the way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qhybrid.report.curves import resume_marks
from qhybrid.report.page import Card, Folded, Note, Section
from qhybrid.report.ranks import kept_moment, moments
from qhybrid.report.run_facts import RunFacts, number
from qhybrid.units import format_bytes, format_count, format_duration

_BADGES = {
    "finished": ("finished", "good"),
    "running": ("in progress", "warning"),
    "interrupted": ("interrupted", "warning"),
    "failed": ("failed", "bad"),
    "killed": ("killed", "bad"),
}
_ENDS = {"failed": "failed", "interrupted": "was interrupted"}
_MOST_TOLD = 8  # rows, and events of a kind


def badge(facts: RunFacts) -> tuple[str, str]:
    """The run's state as a word, and whether it is good or bad."""
    return _BADGES.get(facts.status, (facts.status, "warning"))


def lead(facts: RunFacts) -> str:
    """What was trained, in a sentence or two."""
    words = []
    if facts.recipe is not None:
        held = "held in 4-bit NF4" if facts.recipe.quantization.method == "nf4" else "unquantised"
        words.append(f"{model_name(facts.recipe.model.path)}, {held}, fine-tuned")
    else:
        model = model_name(facts.plan.model) if facts.plan else ""
        words.append(f"{model or 'A model'}, fine-tuned")
    if facts.audit is not None:
        words.append(f"on {format_count(facts.audit.totals.get('train_rows', 0))} rows")
    words.append(f"for {_steps(facts)}" if not facts.tasks else f"to {format_count(len(facts.tasks))} tasks")
    if facts.layout is not None:
        number = len(facts.layout.bands)
        words.append(f"with {number} band{'s' * (number > 1)} of adapters: {_trained(facts)}")
    return " ".join(words) + "."


def model_name(path: str) -> str:
    """A model's path as people say it: hub ids whole, files and folders by their names."""
    return path if path.count("/") == 1 and ":" not in path else path.rstrip("/").rpartition("/")[2]


def _steps(facts: RunFacts) -> str:
    done = facts.events.last_step
    total = facts.events.total_steps
    of = f" of {format_count(total)}" if total is not None and total != done else ""
    return f"{format_count(done)}{of} optimizer step{'s' * (done != 1)}"


def _trained(facts: RunFacts) -> str:
    assert facts.layout is not None
    number = facts.layout.num_parameters
    text = f"{format_count(number)} trained parameters"
    if facts.plan is not None and facts.plan.download_bytes > 0:  # which is two bytes for each parameter
        model = facts.plan.download_bytes // 2
        text += f", {number / model:.2%} of the {format_count(model)} of the model"
    return text


def cards(facts: RunFacts) -> list[Card]:
    """The figures of the result, as far as there are any."""
    found, events = [], facts.events
    result, evaluations = number(facts.figures.get("eval_loss")), events.losses()
    if math.isfinite(result):
        step = facts.figures.get("adapter_of_step")
        note = "on held-out rows, at the end" if step is None else f"the best, of step {step}, and kept"
        found.append(Card("Evaluation loss", f"{result:.4f}", note))
    elif evaluations:
        step, loss = evaluations[-1]
        found.append(Card("Evaluation loss", f"{loss:.4f}", f"on held-out rows, at step {step:,.0f}"))
    if events.steps:
        first = f"mean of the last tenth; {events.in_order[0].loss:.4f} at the first step"
        found.append(Card("Training loss", f"{events.last_tenth_loss:.4f}", first))
        seconds, tokens = (sum(getattr(step, name) for step in events.in_order) for name in ("seconds", "tokens"))
        if resume_marks(facts):  # the run knows the time since its last start alone
            time, note = seconds, f"of {_steps(facts)}, over all starts"
        else:
            time, note = number(facts.figures.get("seconds"), seconds), _steps(facts)
        found.append(Card("Time", format_duration(time), note))
        if seconds > 0 and tokens:
            found.append(Card("Tokens a second", f"{tokens / seconds:,.1f}", f"{format_count(tokens)} in all"))
    main = facts.expected.counts if facts.expected else "process_bytes"
    if facts.peaks.get(main):
        planned = f"planned {format_bytes(facts.expected.needed_bytes)}" if facts.expected else ""
        found.append(Card("Memory at the peak", format_bytes(facts.peaks[main]), planned))
    if facts.layout is not None:
        ranks = f"{format_count(kept_moment(facts, moments(facts)).total)} ranks in all"
        found.append(Card("Adapted modules", format_count(len(facts.layout)), ranks))
    return found


def notes(facts: RunFacts) -> list[Note]:
    """How the run ended, if not well; what a reader should know; and what could not be read."""
    found = []
    if facts.status == "killed":
        found.append(
            Note("The run ended without a word: its process is gone. `qhybrid sft --resume auto` goes on.", "bad")
        )
    elif facts.status == "running":
        found.append(Note("The run is going on; this is how far it was when the report was made.", "warning"))
    found += [Note(text, tone) for text, tone in _happenings(facts)]
    found += [Note(problem, "warning") for problem in facts.problems]
    return found


def _happenings(facts: RunFacts) -> Iterator[tuple[str, str]]:
    told: Counter[str] = Counter()
    for record in facts.events.others:
        kind, step = str(record.get("event")), record.get("step")
        told[kind] += 1
        if told[kind] > _MOST_TOLD:
            continue
        if kind == "begin" and step:
            yield f"The run was resumed after step {step}.", "plain"
        elif kind in ("failed", "interrupted"):
            names = ("error", "message") if kind == "failed" else ("message",)
            reason = ": ".join(str(record[name]).strip() for name in names if record.get(name))
            yield f"The run {_ENDS[kind]}: {reason}", "bad" if kind == "failed" else "warning"
        elif kind == "loss_spike":
            loss = number(record.get("loss"))
            yield f"The loss leapt to {loss:.4f} at step {step}; its rows: {_rows(record)}.", "warning"
        elif kind == "non_finite":
            what = f"The {record.get('what')} was {record.get('value')}"
            yield f"{what} at step {step}; its rows: {_rows(record)}.", "bad"
        elif kind == "out_of_memory":
            rows = record.get("rows_from_now_on")
            yield f"Memory ran out at step {step}; from then on {rows} rows were taken at a time.", "warning"
    for kind, words in (("loss_spike", "leaps of the loss"), ("out_of_memory", "times without memory")):
        if told[kind] > _MOST_TOLD:
            yield f"There were {told[kind]} {words} in all.", "warning"
    for cap in facts.plan.rank_caps if facts.plan else []:
        if cap.asked != cap.got:
            yield f"{cap.told[0].upper()}{cap.told[1:]}: more did not fit.", "plain"


def _rows(record: dict[str, Any]) -> str:
    rows = record.get("rows")
    names = [str(row) for row in rows] if isinstance(rows, list) else []
    return ", ".join(names[:_MOST_TOLD]) + (" …" if len(names) > _MOST_TOLD else "")


def settings(facts: RunFacts) -> Section:
    """The whole recipe, and the versions."""
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    text = f"The run was made with {versions}."
    blocks = [Folded("The recipe, with every default written out", facts.recipe_text)] if facts.recipe_text else []
    return Section("settings", "Settings", text, blocks)
