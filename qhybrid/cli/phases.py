"""Signs of life on standard error: a live line on a terminal, one line for each phase elsewhere."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console


@contextmanager
def phases(first: str) -> Iterator[Callable[[str], None]]:
    """Within, what is said is shown. "merging: 3 of 9" and "merging: 4 of 9" are one phase."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(first) as status:
            yield status.update
        return
    last = ""

    def say(text: str) -> None:
        nonlocal last
        phase = text.partition(":")[0]
        if phase != last:
            click.echo(f"{phase} ...", err=True)
        last = phase

    say(first)
    yield say


def stop_on_sigterm() -> None:
    """Let SIGTERM end the process as an exception does, so that half-written folders go."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
