"""The report of one run: its folder in, one page out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qhybrid.errors import QhybridError
from qhybrid.report import overview
from qhybrid.report.curves import curves
from qhybrid.report.data import data_section
from qhybrid.report.importance import importance_section
from qhybrid.report.layout import layout_section
from qhybrid.report.memory import memory_section
from qhybrid.report.page import Page, render
from qhybrid.report.ranks import rank_section
from qhybrid.report.run_facts import read_run
from qhybrid.report.samples import samples_section
from qhybrid.report.spectra import measure, spectra_section
from qhybrid.report.stages import stages_section
from qhybrid.report.tasks import tasks_section


def run_report(folder: Path, tell: Callable[[str], None] = lambda text: None) -> str:
    """The HTML of a run's report.

    Args:
        tell: is told what is being done, where it takes a while.

    Raises:
        RunFolderError: the folder is not a run of qhybrid.
    """
    facts = read_run(folder)
    tell("reading the adapter")
    measured, problem = None, None
    try:
        measured = measure(facts)
    except QhybridError as error:
        problem = f"The adapter cannot be read: {error.message}."
    sections = [
        tasks_section(facts),
        curves(facts),
        layout_section(facts),
        rank_section(facts),
        stages_section(facts),
        importance_section(facts),
        spectra_section(facts, measured, problem),
        memory_section(facts),
        data_section(facts),
        samples_section(facts),
        overview.settings(facts),
    ]
    return render(
        Page(
            kind="training run",
            title=facts.name,
            badge=overview.badge(facts),
            lead=overview.lead(facts),
            cards=overview.cards(facts),
            notes=overview.notes(facts),
            sections=[section for section in sections if section is not None],
        )
    )
