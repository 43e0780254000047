"""What may differ between a run and the recipe that it goes on with."""

from __future__ import annotations

from helpers import make_recipe

from qhybrid.training.claim import changes_between


def test_a_run_may_be_named_by_another_path():
    """A sweep that is gone on with from another folder, or was moved, names its runs by other paths."""
    old, new = make_recipe(output_dir="sweep/runs/a/run"), make_recipe(output_dir="/home/me/sweep/runs/a/run")
    assert changes_between(old, new) == []
    tasks = [{"name": "one"}, {"name": "two"}]
    old, new = make_recipe(output_dir="runs", tasks=tasks), make_recipe(output_dir="elsewhere", tasks=tasks)
    assert changes_between(old, new) == []


def test_what_changes_the_result_is_named():
    old, new = make_recipe(), make_recipe(training={"learning_rate": 1e-3}, monitoring={"spectrum_steps": 3})
    assert changes_between(old, new) == ["training.learning_rate: 0.0002 → 0.001"]
