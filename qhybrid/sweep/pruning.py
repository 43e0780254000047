"""Giving up hopeless runs: optuna's percentile pruner, on the losses that runs log while they train.

A study in a journal file in the sweep's folder holds the runs that have ended, one trial each; optuna's own tools
can open it. What the runs left on the disk decides: a trial that a crash kept out of the journal is put in when
the sweep goes on.
"""

from __future__ import annotations

import json
import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qhybrid.errors import SweepError
from qhybrid.recipe.sweep import PruneSection
from qhybrid.sweep.outcome import Outcome

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_STEP = re.compile(rb'\{"event": "step", "time": [0-9.]+, "step": ([0-9]+)')
_RUN = "run"  # the trial's attribute that names the run


class RunTail:
    """How far a run has come, and the losses of its evaluations by step, from what was added to its log."""

    def __init__(self, events: Path) -> None:
        self._events = events
        self._read = 0
        self.step = self.total_steps = 0
        self.losses: dict[int, float] = {}

    def refresh(self) -> bool:
        """Read on. Returns whether there was an evaluation."""
        try:
            with self._events.open("rb") as stream:
                stream.seek(self._read)
                added = stream.read()
        except OSError:
            return False
        whole = added[: added.rfind(b"\n") + 1]
        self._read += len(whole)
        was = len(self.losses)
        for line in whole.splitlines():
            step = _STEP.match(line)
            if step:  # with AdaLoRA's ranks in it a line is long
                self.step = int(step[1])
            elif line.startswith((b'{"event": "evaluation"', b'{"event": "begin"')):
                self._take(json.loads(line))
        return len(self.losses) > was

    def _take(self, record: dict[str, Any]) -> None:
        if record["event"] == "begin":
            self.total_steps = record["total_steps"]
        elif isinstance(record.get("eval_loss"), float):
            self.losses[record["step"]] = record["eval_loss"]


class Pruner:
    """Compares a run under way with those of the search that have ended."""

    def __init__(self, settings: PruneSection, journal: Path) -> None:
        """
        Raises:
            SweepError: optuna is not installed.
        """
        require_optuna()
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(logging.WARNING)
        # Of a sweep that was killed while it wrote; this process alone has the folder.
        for lock in journal.parent.glob(f"{journal.name}*.lock"):
            lock.unlink()
        self._settings = settings
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="sweep",
            direction="minimize",
            load_if_exists=True,
        )
        self._known = {trial.user_attrs.get(_RUN) for trial in self._study.get_trials(deepcopy=False)}

    def knows(self, name: str) -> bool:
        """Whether the run is in the study."""
        return name in self._known

    def ended(self, name: str, arm: str, learning_rate: float, seed: int, outcome: Outcome) -> None:
        """Put a run that has ended into the study, once."""
        from optuna.trial import TrialState

        if name in self._known:
            return
        states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "diverged": TrialState.FAIL}
        losses = outcome.eval_losses
        state = states[outcome.status] if losses or outcome.status != "finished" else TrialState.FAIL
        value = losses[max(losses)] if losses and outcome.status != "diverged" else None
        attributes = {_RUN: name, "arm": arm, "learning_rate": learning_rate, "seed": seed}
        self._study.add_trial(self._trial(state, losses, value, attributes))
        self._known.add(name)

    def is_hopeless(self, losses: dict[int, float], total_steps: int) -> bool:
        """Whether a run with these losses, of `total_steps`, is behind the share of ended ones that goes on."""
        from optuna.pruners import PercentilePruner
        from optuna.trial import TrialState

        pruner = PercentilePruner(
            self._settings.percentile,
            n_startup_trials=1,
            n_warmup_steps=int(self._settings.after * total_steps),
        )
        trial = self._trial(TrialState.RUNNING, losses, None, {})
        return bool(losses) and pruner.prune(self._study, trial)

    def _trial(self, state, losses: dict[int, float], value: float | None, attributes) -> FrozenTrial:
        from optuna.trial import create_trial

        return create_trial(state=state, value=value, intermediate_values=losses, user_attrs=attributes)


def require_optuna() -> None:
    """Refuse pruning where optuna is not there.

    Raises:
        SweepError: with the command that installs it.
    """
    if find_spec("optuna") is None:
        raise SweepError(
            "sweep.prune needs optuna, which is not installed",
            hint="pip install 'qhybrid[sweep]'; or leave sweep.prune out",
        )
