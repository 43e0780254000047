"""Training processes that are killed: the next one goes on from a whole checkpoint, to the very same losses."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from helpers import record_figure
from runs import EXACT, recipe_in

from qhybrid.training.checkpoint import newest_sealed, recover, step_of, verify
from qhybrid.training.events import read_events

SAVE_STEPS = 3
SECONDS = 0.25  # of a step and a save, about: the kill comes within them
NO_EVALUATION = dict.fromkeys(
    ("eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
)


@pytest.fixture
def loaded(tmp_path, tiny_model_folder):
    """A run that takes longer than any test; accumulation 2, dropout."""
    changes = {"max_steps": 5000, "save_steps": SAVE_STEPS, "save_total_limit": 2, **NO_EVALUATION}
    return recipe_in(tmp_path, tiny_model_folder, changes)


def begun_at(events) -> list[int]:
    return [event["step"] for event in read_events(events, "begin")]


def test_killed_at_random_moments(tmp_path, loaded, launcher, everything):
    chance = random.Random(0)
    num_kills = 50 if everything else 6
    checkpoints, events = tmp_path / "run" / "checkpoints", tmp_path / "run" / "events.jsonl"
    newest, most_lost, cut_short, reported = 0, 0, 0, 0
    for kill in range(num_kills):
        process = launcher.start(loaded)
        # Around a save: from the end of the step before it, or from its beginning.
        due = (newest // SAVE_STEPS + chance.randint(1, 2)) * SAVE_STEPS
        process.wait_for(f"saving {due}" if kill % 2 else f"stepped {due - 1}")
        time.sleep(chance.uniform(0, SECONDS / 4 if kill % 2 else SECONDS))
        os.kill(process.pid, signal.SIGKILL)
        assert process.ended() == -signal.SIGKILL
        assert begun_at(events)[kill] == newest, "it did not go on from the newest whole checkpoint"

        reported = max(reported, process.last("saved"))
        cut_short += any(item.name.startswith(".") for item in checkpoints.iterdir())
        sealed = newest_sealed(checkpoints)
        assert sealed is not None or not reported
        recover(checkpoints)  # nor is another one found when what was cut short is put right
        assert newest_sealed(checkpoints) == sealed
        newest = 0 if sealed is None else step_of(sealed)
        assert newest >= reported, "a checkpoint that was reported is gone"
        assert all(verify(item) is None for item in checkpoints.glob("checkpoint-*"))
        most_lost = max(most_lost, process.last("stepped") - newest)
        assert most_lost <= SAVE_STEPS

    steps = read_events(events, "step")
    first: dict[int, dict] = {}
    for record in steps:
        expected = first.setdefault(record["step"], record)
        assert all(record[key] == expected[key] for key in EXACT), record["step"]
    taken_twice = len(steps) - len(first)
    assert sorted(first) == list(range(1, max(first) + 1))
    assert taken_twice > 0 and (cut_short > 0 or not everything), "the kills came at no interesting moment"

    # Nor does any step differ from what a run that nobody kills does.
    whole = type(loaded)(loaded.recipe.model_copy(update={"output_dir": str(tmp_path / "whole")}), loaded.path)
    process = launcher.start(whole)
    process.wait_for(f"stepped {max(first)}")
    os.kill(process.pid, signal.SIGKILL)
    process.ended()
    for record in read_events(tmp_path / "whole" / "events.jsonl", "step"):
        for key in EXACT:
            assert record["step"] not in first or record[key] == first[record["step"]][key], record["step"]
    record_figure(
        1, "SIGKILL of a run at random moments",
        f"{num_kills}/{num_kills} went on from a whole checkpoint, {cut_short} of them killed inside a save; at "
        f"most {most_lost} steps lost of {SAVE_STEPS} allowed; {taken_twice} steps taken again, difference 0.0",
    )  # fmt: skip


def test_killed_before_the_first_save(tmp_path, loaded, launcher):
    """Nothing is there to go on from, and nothing is in the way."""
    for moment in ("stepped 2", "saving 3"):
        process = launcher.start(loaded)
        process.wait_for(moment)
        os.kill(process.pid, signal.SIGKILL)
        process.ended()
        if newest_sealed(tmp_path / "run" / "checkpoints") is not None:
            break  # the save was quicker
    process = launcher.start(loaded)
    process.wait_for("saved 3")
    os.kill(process.pid, signal.SIGKILL)
    process.ended()
    assert begun_at(tmp_path / "run" / "events.jsonl")[:2] == [0, 0]
    losses = [e["loss"] for e in read_events(tmp_path / "run" / "events.jsonl", "step") if e["step"] == 1]
    assert len(losses) >= 2 and len(set(losses)) == 1
