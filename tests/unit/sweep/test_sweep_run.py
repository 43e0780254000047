"""What the one process that makes all runs of a sweep decides, with made-up runs and optuna's own pruner."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import make_recipe
from rich.console import Console

from qhybrid.errors import SweepError
from qhybrid.recipe.sweep import PruneSection
from qhybrid.sweep.folder import Started, SweepFolder
from qhybrid.sweep.outcome import Outcome, RowFigures, write_outcome
from qhybrid.sweep.pool import Ended
from qhybrid.sweep.run import _Runs
from qhybrid.sweep.setup import RunKey

SEARCH = CONTROL, SLOW, QUICK = tuple(RunKey(name, 1e-3, 0) for name in ("uniform", "slow", "quick"))
STARTED = Started("2026-01-01", "data", threads=1)
ROWS = RowFigures("rows", losses=(1.0,), tokens=(1,))


def outcome(losses: dict[int, float]) -> Outcome:
    return Outcome("finished", 40, 40, 1.0, 1.0, 1, losses, rows=ROWS)


class MadeUpTail:
    """A run's log, as far as it is there."""

    total_steps, step = 40, 20

    def __init__(self, losses: dict[int, float]) -> None:
        self.losses = losses

    def refresh(self) -> bool:
        return True


@pytest.fixture
def runs(tmp_path):
    """The runs of three arms, of which the control has ended; and the names that were stopped."""
    sweep = SimpleNamespace(
        prune=PruneSection(percentile=50, after=0.25),
        control="uniform",
        measure=SimpleNamespace(metrics=("loss",), labels=None),
    )
    stopped: list[str] = []
    pool = SimpleNamespace(stop=stopped.append)
    setup = SimpleNamespace(sweep=sweep, search=SEARCH)
    found = _Runs(setup, SweepFolder(tmp_path), pool, lambda: None, Console(quiet=True))
    found._keys = {key.name: key for key in SEARCH}
    found._began = dict.fromkeys(found._keys, 0.0)
    found._note(CONTROL, outcome({10: 1.0, 20: 0.95, 30: 0.95, 40: 0.95}), True)
    return found, stopped


def test_a_run_that_was_stopped_is_pruned_whatever_others_show_meanwhile(runs, tmp_path):
    """The one beside it rises late and ends first, so that what was hopeless would be so no more."""
    found, stopped = runs
    late = {10: 0.94, 20: 1.5, 30: 1.6, 40: 1.7}
    found._tails = {SLOW.name: MadeUpTail({10: 0.96, 20: 0.96}), QUICK.name: MadeUpTail(late)}
    for _ in range(2):
        found._watch((SLOW.name, QUICK.name), True)
    assert stopped == [SLOW.name]
    folder = tmp_path / "runs" / QUICK.name
    folder.mkdir(parents=True)
    write_outcome(outcome(late), folder)
    found._end(Ended(QUICK.name, 0), True)
    assert found._hopeless_at(SLOW, {10: 0.96, 20: 0.96}, 40) is None
    saved = tmp_path / "runs" / SLOW.name / "run" / "checkpoints" / "checkpoint-20"
    saved.mkdir(parents=True)  # at SIGTERM
    found._end(Ended(SLOW.name, 143), True)
    assert found.outcomes[SLOW].status == "pruned" and "at step 20" in found.outcomes[SLOW].note
    assert not saved.parent.exists()


def test_held_out_rows_that_changed_between_two_runs_are_refused(runs):
    found, _ = runs
    other = replace(outcome({40: 1.0}), rows=replace(ROWS, fingerprint="edited"))
    with pytest.raises(SweepError, match=r"held-out rows of slow/.* are not those of uniform/"):
        found._note(SLOW, other, False)
    found._note(replace(SLOW, seed=1), other, False)  # rows may be held out by the seed


def sweep_of(**changes):
    """A recipe with a weight decay, and a sweep of one arm beside the control."""
    sweep = {"rank": 4, "arms": ["uniform", "random"], "learning_rates": [1e-3], **changes}
    return make_recipe(data={"sources": "a", "eval_sources": "b"}, training={"weight_decay": 0.1}, sweep=sweep)


def test_growing_is_looked_at_before_anything_is_written(tmp_path):
    folder = SweepFolder(tmp_path)
    folder.begin(sweep_of(), STARTED)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert folder.is_grown(sweep_of(arms=["uniform", "random", "increasing"])) and not folder.is_grown(sweep_of())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_setting_at_its_default_is_not_one_that_is_left_out(tmp_path):
    """The arm's 0.0 replaces the recipe's 0.1; left out, it would be 0.1 from then on."""
    folder = SweepFolder(tmp_path)
    old = {"arm": "random", "training": {"weight_decay": 0.0}}
    folder.begin(sweep_of(arms=["uniform", old]), STARTED)
    new = {"arm": "random", "training": {"max_grad_norm": 1.0}}
    with pytest.raises(SweepError, match="another recipe"):
        folder.is_grown(sweep_of(arms=["uniform", new, "increasing"]))


def test_a_recipe_of_the_users_own_is_not_replaced(tmp_path):
    folder = SweepFolder(tmp_path)
    folder.recipe_file.write_text("# mine\n")
    with pytest.raises(SweepError, match="not from a sweep of this recipe"):
        folder.begin(sweep_of(), STARTED)
    assert folder.recipe_file.read_text() == "# mine\n" and not folder.started_file.exists()
