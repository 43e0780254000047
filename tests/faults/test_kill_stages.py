"""Training processes that are killed around a stage: the run goes on to the very same result."""

from __future__ import annotations

import os
import signal

import pytest
from runs import assert_same, forget_repeats, moved_to, recipe_in, train
from test_kill_runs import NO_EVALUATION

from qhybrid.training.events import read_events

STAGES = [
    {"name": "grow", "at": 4, "expand": {"bands": ["low", "high"], "top": 0.5, "times": 2}},
    {"name": "still", "at": 7, "freeze": "low"},
]


@pytest.mark.parametrize(
    "moments",
    [
        ("stepped 4", "saved 4", "stepped 5"),  # exactly at the change, and right after it
        ("saving 6", "stepped 7", "saved 8"),  # before, at and after the freeze, which is between two saves
    ],
)
def test_killed_around_a_stage(tmp_path, tiny_model_folder, launcher, moments):
    loaded = recipe_in(
        tmp_path, tiny_model_folder, {"max_steps": 12, "save_steps": 2, **NO_EVALUATION}, stages=STAGES
    )
    whole = moved_to(tmp_path / "whole", loaded)
    train(whole)
    for moment in moments:
        process = launcher.start(loaded)
        process.wait_for(moment)
        os.kill(process.pid, signal.SIGKILL)
        assert process.ended() == -signal.SIGKILL
    process = launcher.start(loaded)
    assert process.ended() == 0
    run = tmp_path / "run"
    begun = [(event["stage"], event["step"]) for event in read_events(run / "events.jsonl", "stage")]
    assert set(begun) == {("grow", 4), ("still", 7)} and len(begun) > 2  # a stage begins again after a crash
    forget_repeats(run)
    assert_same(run, tmp_path / "whole")
    assert (run / "layout.json").read_bytes() == (tmp_path / "whole" / "layout.json").read_bytes()
