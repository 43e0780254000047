"""The progress of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from qhybrid.units import format_bytes, format_duration


class ProgressDisplay:
    """Shows step, loss, tokens/s, time left, memory and live ranks. Plain lines come every `line_every` steps."""

    def __init__(self, console: Console | NamedConsole, *, line_every: int, initial_ranks: int) -> None:
        self._console = console
        self._line_every = max(1, line_every)
        self._initial_ranks = initial_ranks
        self._progress: Progress | None = None
        self._total = 0
        self._first_step = 0
        self._began = 0.0

    def begin(self, step: int, total_steps: int) -> None:
        """Start the display before step `step` + 1 of `total_steps`."""
        self._total, self._first_step, self._began = total_steps, step, time.perf_counter()
        if isinstance(self._console, Console) and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=step, state="")
            self._progress.start()

    def step(self, record: dict[str, Any]) -> None:
        """Show one optimizer step."""
        state = self._state(record)
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], state=state)
        step = record["step"]
        if self._progress is None and (
            step % self._line_every == 0 or step in (self._first_step + 1, self._total)
        ):
            self._console.print(f"step {step}/{self._total}  {state}", highlight=False, soft_wrap=True)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Show one evaluation; it stays on the screen."""
        losses = ", ".join(f"{key} {value:.4f}" for key, value in record.items() if key.endswith("loss"))
        self._console.print(f"evaluation at step {record['step']}: {losses}", highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Take the live line away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _state(self, record: dict[str, Any]) -> str:
        done = record["step"] - self._first_step
        left = (time.perf_counter() - self._began) / done * (self._total - record["step"])
        memory = record["memory"]
        used = memory.get("cuda_max_reserved_bytes", memory["process_bytes"])
        rate = min(record["learning_rates"].values(), default=0.0)  # LoRA+ multiplies it for B
        parts = [
            f"loss {record['loss']:.4f}",
            f"grad {record['grad_norm']:.3f}",
            f"lr {rate:.2e}",
            f"{record['tokens_per_second']:,.0f} tok/s",
            f"{format_duration(left)} left",
            format_bytes(used),
        ]
        if "live_ranks" in record:
            parts.append(f"ranks {sum(record['live_ranks'].values())}/{self._initial_ranks}")
        return "  ".join(parts)


class NamedConsole:
    """A console on which every line begins with a name: of one of several tasks that take turns.

    A live line is not for it: a terminal has one for all.
    """

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name

    def print(self, text: str, **style: Any) -> None:
        """As rich's."""
        for line in text.splitlines():
            self._console.print(f"{self._name}: {line}".rstrip(), **style)
