"""`qhybrid ranks sweep` on a tiny model: the whole way, what is refused, and what a fake memory lets in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import chat_rows, run_cli, write_rows
from sweep_helpers import figures_of, sweep_recipe

from qhybrid.recipe.load import load_recipe
from qhybrid.sweep import setup as settling
from qhybrid.sweep.outcome import read_outcome
from qhybrid.sweep.results import read_results
from qhybrid.training.events import read_events


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_folder):
    """A recipe, and its sweep: two arms with two rates each, the second with its own; two seeds."""
    arms = ["uniform", {"arm": "adalora-increasing", "learning_rates": [2e-3, 1e-2]}]
    recipe = sweep_recipe(tmp_path_factory.mktemp("sweep"), tiny_model_folder, arms=arms)
    done = run_cli("ranks", "sweep", recipe, "--output", recipe.parent / "sweep")
    assert done.returncode == 0, done.stderr + done.stdout
    return recipe, recipe.parent / "sweep", done.stdout


def test_every_run_is_made_and_told(finished):
    _, folder, said = finished
    results = read_results(folder)
    assert [arm.name for arm in results.arms] == ["uniform", "adalora-increasing"]
    assert len(results.runs) == 4 + 2  # two rates for each arm, and the second seed at the better one
    assert {run.status for run in results.runs} == {"finished"}
    assert [run.phase for run in results.runs] == ["search"] * 4 + ["final"] * 2
    assert {run.learning_rate for run in results.runs_of("uniform")} == {1e-3, 5e-3}
    assert {run.learning_rate for run in results.runs_of("adalora-increasing")} == {2e-3, 1e-2}
    for arm in results.arms:
        best = min(
            (run for run in results.runs_of(arm.name) if run.seed == 0), key=lambda run: run.metrics["loss"]
        )
        assert arm.best_learning_rate == best.learning_rate and arm.seeds == (0, 1)
        counted = [run for run in results.runs_of(arm.name) if run.counts]
        assert {run.learning_rate for run in counted} == {best.learning_rate} and len(counted) == 2
        own = arm.metrics["loss"]
        assert own.low <= own.mean <= own.high
        assert own.mean == pytest.approx(sum(run.metrics["loss"] for run in counted) / 2)
        assert arm.seconds and arm.peak_bytes and arm.peak_bytes > 10**8
    uniform, other = results.arms
    difference = other.differences["loss"]
    assert not uniform.differences
    assert difference.mean == pytest.approx(other.metrics["loss"].mean - uniform.metrics["loss"].mean)
    assert uniform.parameters == results.parameters and uniform.is_control
    assert "2 arms of 22,272 parameters; control: uniform" in said and "[4/4]" in said
    assert any("lowest or highest" in note for note in results.notes)
    assert (folder / "results.md").read_text().startswith("# Sweep of recipe.yaml")


def test_adalora_says_what_it_has_left(finished):
    arm = read_results(finished[1]).arm("adalora-increasing")
    assert arm.trained_parameters > arm.parameters and {row.kind for row in arm.ranks} == {"adalora"}
    counted = [
        read_outcome(finished[1] / "runs" / run.name)
        for run in read_results(finished[1]).runs_of(arm.name)
        if run.counts
    ]
    assert arm.parameters == round(sum(outcome.parameters for outcome in counted) / 2)
    last = read_events(finished[1] / "runs" / run_name(finished[1]) / "run" / "events.jsonl", "step")[-1]
    assert sum(row.rank for row in arm.ranks) == sum(last["live_ranks"].values())


def run_name(folder: Path) -> str:
    """The run of AdaLoRA from the first seed at the best rate."""
    return next(run.name for run in read_results(folder).runs_of("adalora-increasing") if run.counts)


def test_the_figures_are_those_of_eval(finished):
    """What `qhybrid eval` says of the same adapter and rows."""
    recipe, folder, _ = finished
    name = run_name(folder)
    rows, run = recipe.parent / "eval.jsonl", folder / "runs" / name / "run"
    done = run_cli("eval", rows, "--adapter", run, "--no-generation", "--json")
    expected = next(run for run in read_results(folder).runs if run.name == name).metrics["loss"]
    assert json.loads(done.stdout)["loss"] == pytest.approx(expected, rel=1e-9)


def test_finished_runs_leave_an_adapter_and_no_checkpoints(finished):
    for run in (finished[1] / "runs").glob("*/*"):
        assert (run / "run" / "adapter" / "adapter.json").is_file() and not (run / "run" / "checkpoints").exists()
        assert "step 6/6" in (run / "output.log").read_text()


def test_the_same_command_again_only_shows(finished):
    recipe, folder, _ = finished
    before = (folder / "results.json").read_bytes()
    done = run_cli("ranks", "sweep", recipe, "--output", folder)
    assert (
        done.returncode == 0 and "holds the finished sweep" in done.stdout and "adalora-increasing" in done.stdout
    )
    assert (folder / "results.json").read_bytes() == before


def test_results_that_were_lost_are_made_from_the_runs(finished):
    recipe, folder, _ = finished
    before = figures_of(read_results(folder))
    (folder / "results.json").unlink()
    done = run_cli("ranks", "sweep", recipe, "--output", folder)
    assert done.returncode == 0 and "4 runs, 4 of them are there" in done.stdout
    assert figures_of(read_results(folder)) == before


def test_a_finished_sweep_grows(finished, tmp_path):
    """Another arm: only its runs are made, and the others' figures stay. To go back is another sweep."""
    recipe, folder, _ = finished
    grown = Path(shutil.copytree(folder, tmp_path / "sweep"))
    arms = ["uniform", {"arm": "adalora-increasing", "learning_rates": [2e-3, 1e-2]}]
    more = json.dumps([*arms, {"arm": "random", "learning_rates": [1e-3]}])
    done = run_cli("ranks", "sweep", recipe, f"sweep.arms={more}", "--output", grown)
    assert done.returncode == 0, done.stderr
    assert "5 runs, 4 of them are there" in done.stdout and "6 runs, 5 of them are there" in done.stdout
    before, after = read_results(folder), read_results(grown)
    assert [run for run in after.runs if run.arm != "random"] == list(before.runs)
    assert after.arm("random").seeds == (0, 1) and after.arm("random").differences
    assert after.arm("adalora-increasing").differences == before.arm("adalora-increasing").differences
    done = run_cli("ranks", "sweep", recipe, "--output", grown)
    assert done.returncode == 2 and "sweep.arms.2" in done.stderr and (grown / "results.json").is_file()


def test_growth_that_cannot_be_loses_nothing(finished, tmp_path):
    """An arm without ranks at the budget: refused, and the finished sweep is there as before."""
    recipe, folder, _ = finished
    grown = Path(shutil.copytree(folder, tmp_path / "sweep"))
    arms = ["uniform", {"arm": "adalora-increasing", "learning_rates": [2e-3, 1e-2]}]
    more = json.dumps([*arms, {"name": "big", "adapters": {"schedule": {"name": "increasing", "budget": "90k"}}}])
    done = run_cli("ranks", "sweep", recipe, f"sweep.arms={more}", "--output", grown)
    assert done.returncode == 2 and "the arm big has" in done.stderr
    for name in ("results.json", "recipe.yaml"):
        assert (grown / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.seeds=[1,0]", "sweep.seeds.0: 0 → 1"),
        ("sweep.learning_rates=[1e-3]", "sweep.learning_rates.1: 0.005 → None"),
        ("sweep.arms=[uniform,random]", "sweep.arms.1.arm: adalora-increasing → random"),
        ("training.max_steps=7", "training.max_steps: 6 → 7"),
        ("model.dtype=bfloat16", "model.dtype: float32 → bfloat16"),
    ],
)
def test_another_recipe_is_refused_by_what_changed(finished, override, words):
    recipe, folder, _ = finished
    done = run_cli("ranks", "sweep", recipe, override, "--output", folder)
    assert done.returncode == 2 and words in done.stderr and "was started with another recipe" in done.stderr


def test_other_data_is_refused(finished):
    recipe, folder, _ = finished
    rows = recipe.parent / "eval.jsonl"
    before = rows.read_text()
    (folder / "results.json").rename(folder / "kept.json")
    try:
        write_rows(rows, chat_rows(9, seed=3))
        done = run_cli("ranks", "sweep", recipe, "--output", folder)
    finally:
        rows.write_text(before)
        (folder / "kept.json").rename(folder / "results.json")
    assert done.returncode == 2 and "the data has changed" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sweep.arms=[random,increasing]"], "the control 'uniform' is not among the arms"),
        (["sweep.measure.metrics=[bleu]"], "'bleu' is not one of"),
        (['sweep.measure={metrics: [accuracy], labels: ["1", "2"]}'], "is not one of the labels 1, 2"),
        (
            ["sweep.measure={metrics: [exact_match], answer_after: '####'}"],
            "eval.jsonl:1: the answer has no '####'",
        ),
        (["sweep.rank=500"], "rank 500 is above"),
        (["sweep.rank=1", "sweep.arms=[uniform,dora-uniform]"], "the arm dora-uniform: a budget of"),
        (
            ["sweep.arms=[uniform,{name: late,adapters: {kind: adalora,rank: 4,adalora: {warmup: 9}}}]"],
            "the arm late: band 'all': AdaLoRA has no step to allocate in",
        ),
        (["sweep={}"], "is missing"),
        (["sweep=null"], "has no section sweep"),
        (["distributed.processes=2"], "every run in one process"),
        (["stages=[{at: 2,expand: {times: 2}}]"], "the stage 'stage0' expands modules"),
        (["data.eval_sources=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input(tmp_path, tiny_model_folder, overrides, words):
    recipe = sweep_recipe(tmp_path, tiny_model_folder)
    done = run_cli("ranks", "sweep", recipe, *overrides, "--output", tmp_path / "sweep")
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert not (tmp_path / "sweep" / "runs").exists()


def test_a_foreign_folder_is_left_alone(tmp_path, tiny_model_folder):
    recipe = sweep_recipe(tmp_path, tiny_model_folder)
    done = run_cli("ranks", "sweep", recipe, "--output", tmp_path)
    assert done.returncode == 2 and "not from a sweep" in done.stderr and not (tmp_path / "sweep.json").exists()


def test_a_recipe_of_ones_own_is_left_alone(tmp_path, tiny_model_folder):
    recipe = sweep_recipe(tmp_path / "data", tiny_model_folder)
    mine = tmp_path / "mine" / "recipe.yaml"
    mine.parent.mkdir()
    mine.write_text(recipe.read_text() + "# a comment\n")
    done = run_cli("ranks", "sweep", mine, "--output", mine.parent)
    assert done.returncode == 2 and "is not from a sweep of this recipe" in done.stderr, done.stderr
    assert mine.read_text().endswith("# a comment\n") and [mine] == list(mine.parent.iterdir())


def test_a_dry_run_writes_nothing(tmp_path, tiny_model_folder):
    recipe = sweep_recipe(tmp_path, tiny_model_folder)
    one_rate = "sweep.arms=[uniform,{arm: random,learning_rates: [1e-3]}]"
    done = run_cli("ranks", "sweep", recipe, one_rate, "--output", tmp_path / "sweep", "--dry-run")
    assert done.returncode == 0 and "3 runs to search 1 to 2 learning rates with 1 seed; then 2" in done.stdout
    assert "uniform  lora, uniform" in done.stdout and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("runs_of_memory", "jobs", "expected"), [(2.5, 8, 2), (0.5, 8, 1), (100, 3, 3), (100, 8, 4)]
)
def test_as_many_at_a_time_as_the_plans_fit(
    tmp_path, tiny_model_folder, monkeypatch, runs_of_memory, jobs, expected
):
    """The memory is made up; the plans are real."""
    loaded = settling.settled(load_recipe(str(sweep_recipe(tmp_path, tiny_model_folder))))
    probed = settling._probed
    needed: list[int] = []

    def probe(*arguments):
        found = probed(*arguments)
        return replace(found, free_bytes=int(runs_of_memory * needed[0]) if needed else found.free_bytes)

    def set_up():
        from qhybrid.sweep.pool import context

        return settling.set_up(
            loaded, context(settling.PRELOAD), jobs=jobs, date="2026-01-01", started=None, prepare=print
        )

    monkeypatch.setattr(settling, "_probed", probe)
    needed.append(max(set_up().needed_bytes.values()))
    assert needed[0] > 10**8 and set_up().at_once == expected
