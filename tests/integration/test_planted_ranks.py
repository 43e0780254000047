"""One seed of the planted ranks of docs/evidence.md: who finds them, and what wrong ones cost."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts" / "evidence"


def scripts() -> tuple[Any, Any, Any]:
    """The modules of the experiment."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return tuple(importlib.import_module(f"planted_{name}") for name in ("results", "students", "teachers"))
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def experiment():
    """Distils one plant with one arm, all from one base."""
    planted_results, planted_students, planted_teachers = scripts()
    torch.set_num_threads(1)
    sizes = planted_teachers.Sizes()
    base = planted_teachers.pretrained(sizes, 0)

    def distil(plant: str, arm: str, learning_rate: float):
        truth = planted_teachers.planted(sizes, plant, 0)
        teacher = planted_teachers.teacher_of(base, truth, sizes, 0, equal_effect=True)
        lesson = planted_teachers.Lesson(base, teacher, sizes, 0)
        student = planted_students.student_of(arm, base, teacher, truth, lesson, sizes, 0)
        end = planted_students.learn(student, base, lesson, sizes, learning_rate=learning_rate, seed=0)
        layers = planted_results.by_layer({row.module: row.rank for row in truth})
        agreed = planted_results.spearman(planted_results.by_layer(end.ranks), layers)
        return agreed, float(end.missed.mean()) / lesson.start, end.parameters, sizes.budget

    return distil


@pytest.mark.slow
@pytest.mark.parametrize("plant", ["increasing", "decreasing"])
def test_adalora_finds_along_the_depth_what_was_planted(experiment, plant):
    agreed, left, parameters, budget = experiment(plant, "adalora", 2e-2)
    assert agreed >= 0.7
    assert left < 0.5  # it has learnt more than half of it
    assert abs(parameters / budget - 1) < 0.1


@pytest.mark.slow
def test_wrong_ranks_cost(experiment):
    """At the same parameters, the map that increases loses where what is to be learnt decreases."""
    wrong, right = (experiment("decreasing", arm, 1e-2) for arm in ("increasing", "oracle"))
    assert wrong[2] == pytest.approx(right[2], rel=0.01) and wrong[1] > 1.05 * right[1]


def test_spearman():
    """Against values worked out by hand, ties at their mean places."""
    spearman = scripts()[0].spearman
    assert spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(3**0.5 / 2)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
