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
    """Within, what is said is shown, and SIGTERM cleans up. "merging: 3 of 9" and "merging: 4 of 9" are one."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _sigterm_as_exit(), console.status(first) as status:
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
    with _sigterm_as_exit():
        yield say


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM ends the process as an exception does, so that half-written folders go."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
