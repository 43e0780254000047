"""A sweep that is killed or asked to stop: the same command goes on, to the very same figures. And pruned runs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import run_cli
from sweep_helpers import figures_of, sweep_recipe

from qhybrid.sweep.outcome import read_outcome
from qhybrid.sweep.results import read_results
from qhybrid.training.events import read_events

_SECONDS = 240  # for whatever is waited for


def start(recipe: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qhybrid.cli.main", "ranks", "sweep", str(recipe), "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for_step(output: Path, run: str, step: int, process: subprocess.Popen[bytes]) -> None:
    """Until that run has logged the step."""
    events, deadline = output / "runs" / run / "run" / "events.jsonl", time.monotonic() + _SECONDS
    while not (events.is_file() and any(e["step"] >= step for e in read_events(events, "step"))):
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline, "the run does not come"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_folder):
    """The recipe, and its sweep that nothing happened to."""
    # Long enough that a run whose sweep was killed at step 4 has not ended before it sees it.
    steps = {"max_steps": 40, "save_steps": 2}
    recipe = sweep_recipe(tmp_path_factory.mktemp("whole"), tiny_model_folder, steps, learning_rates=[5e-3])
    done = run_cli("ranks", "sweep", recipe, "--output", recipe.parent / "sweep")
    assert done.returncode == 0, done.stderr + done.stdout
    return recipe, recipe.parent / "sweep"


def same_rows(one: Path, other: Path) -> None:
    """Every run has the very same figures for every held-out row."""
    for run in read_results(one).runs:
        rows = [read_outcome(folder / "runs" / run.name).rows for folder in (one, other)]
        assert rows[0] == rows[1], run.name


def test_killed_twice_and_started_again(whole, tmp_path):
    """Killed in the second run and, later, in the last one; the first is kept as it is."""
    recipe, expected = whole
    output = tmp_path / "sweep"
    chance = random.Random(0)
    names = [run.name for run in read_results(expected).runs]
    for name, step in ((names[1], 3), (names[-1], 4)):
        process = start(recipe, output)
        wait_for_step(output, name, step, process)
        time.sleep(chance.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)  # its processes see that it is gone, save and leave
        process.wait()
        assert not (output / "results.json").exists()
    kept = (output / "runs" / names[0] / "outcome.json").read_bytes()
    done = run_cli("ranks", "sweep", recipe, "--output", output)
    assert done.returncode == 0, done.stderr + done.stdout
    assert (output / "runs" / names[0] / "outcome.json").read_bytes() == kept
    assert figures_of(read_results(output)) == figures_of(read_results(expected))
    same_rows(output, expected)
    begun = [event["step"] for event in read_events(output / "runs" / names[1] / "run" / "events.jsonl", "begin")]
    assert len(begun) == 2 and begun[0] == 0 and begun[1] >= 2, "it did not go on from its checkpoint"


def test_sigterm_saves_and_leaves(whole, tmp_path):
    recipe, expected = whole
    output = tmp_path / "sweep"
    process = start(recipe, output)
    name = read_results(expected).runs[0].name
    wait_for_step(output, name, 3, process)
    other = run_cli("ranks", "sweep", recipe, "--output", output)
    assert other.returncode == 2 and "a sweep is going on in" in other.stderr
    process.terminate()
    said = process.communicate(timeout=_SECONDS)[0].decode()
    assert process.returncode == 128 + signal.SIGTERM and "interrupted" in said, said
    assert list((output / "runs" / name / "run" / "checkpoints").glob("checkpoint-*"))
    done = run_cli("ranks", "sweep", recipe, "--output", output)
    assert done.returncode == 0, done.stderr
    same_rows(output, expected)


def test_a_run_that_fails_stops_the_sweep_with_its_reason(whole, tmp_path, tiny_model_folder):
    """The optimizer of an arm needs a library that is not there; the control's run is kept."""
    arms = ["uniform", {"arm": "random", "name": "odd", "training": {"optim": "adamw_anyprecision"}}]
    recipe = sweep_recipe(tmp_path, tiny_model_folder, arms=arms, learning_rates=[1e-3])
    done = run_cli("ranks", "sweep", recipe, "--output", tmp_path / "sweep")
    assert done.returncode == 1 and "the run odd/lr-0.001-seed-0 failed: training.optim adamw_any" in done.stderr
    assert "output.log" in done.stderr and (tmp_path / "sweep/runs/uniform/lr-0.001-seed-0/outcome.json").is_file()


def test_pruned_runs_are_recorded(tmp_path, tiny_model_folder):
    """An arm that does not learn falls behind the control; it is given up, told of, and not in the means."""
    training = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2}
    recipe = sweep_recipe(
        tmp_path,
        tiny_model_folder,
        training,
        arms=["uniform", {"arm": "dora-uniform", "name": "idle", "training": {"optim": "sgd"}}],
        learning_rates=[5e-3, 1e-2],
        prune={"percentile": 50, "after": 0.4},
    )
    output = tmp_path / "sweep"
    done = run_cli("ranks", "sweep", recipe, "--output", output)
    assert done.returncode == 0, done.stderr + done.stdout
    results = read_results(output)
    idle = results.runs_of("idle")
    assert [run.status for run in idle] == ["pruned", "pruned"] and {run.phase for run in idle} == {"search"}
    assert all(run.step == 4 and not run.metrics and "not among the best 50%" in run.note for run in idle)
    assert {run.status for run in results.runs_of("uniform")} == {"finished"}
    assert results.arm("idle").status == "pruned" and not results.arm("idle").metrics
    assert any("given up in the search: 2 of" in note for note in results.notes)
    assert "pruned" in (output / "results.md").read_text()

    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(output / "optuna.journal")))
    trials = optuna.load_study(study_name="sweep", storage=storage).get_trials()
    states = {trial.user_attrs["run"]: trial.state.name for trial in trials}
    assert states == {
        run.name: "PRUNED" if run in idle else "COMPLETE" for run in results.runs if run.phase == "search"
    }
    assert all(set(trial.intermediate_values) == {2, 4} for trial in trials if trial.state.name == "PRUNED")

    # Once more from the files alone: nothing runs again, and the same are pruned.
    (output / "results.json").unlink()
    assert run_cli("ranks", "sweep", recipe, "--output", output).returncode == 0
    assert figures_of(read_results(output)) == figures_of(results)


def test_a_rate_that_diverges_is_listed_and_the_next_best_taken(tmp_path, tiny_model_folder):
    recipe = sweep_recipe(
        tmp_path, tiny_model_folder, learning_rates=[5e-3, 1e38], arms=["uniform", "random"], seeds=[0]
    )
    output = tmp_path / "sweep"
    done = run_cli("ranks", "sweep", recipe, "--output", output)
    assert done.returncode == 0, done.stderr + done.stdout
    results = read_results(output)
    assert {run.status for run in results.runs if run.learning_rate > 1} == {"diverged"}
    assert all(arm.best_learning_rate == 5e-3 for arm in results.arms)
    assert any("diverged (NaN): 2 of 4 runs" in note for note in results.notes)
