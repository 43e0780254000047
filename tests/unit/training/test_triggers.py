"""Triggers: a loss that no longer falls, and ranks that are used up, with hysteresis and a pause."""

from __future__ import annotations

import json

import pytest

from qhybrid.recipe.stages import PlateauSection, SpectrumSection
from qhybrid.training.triggers import Plateau, Saturation


def reached_at(settings: PlateauSection, losses: list[float], *, steps: bool = False) -> int | None:
    """After how many losses the plateau is reached; saved and restored after each of them."""
    plateau = Plateau(settings)
    for count, loss in enumerate(losses, 1):
        (plateau.take_step if steps else plateau.take_evaluation)(loss)
        if plateau.is_reached:
            return count
        restored = Plateau(settings)
        restored.load(json.loads(json.dumps(plateau.state())))
        plateau = restored
    return None


@pytest.mark.parametrize(
    ("settings", "losses", "count"),
    [
        ({"patience": 2, "threshold": 0.01}, [2.0, 1.5, 1.49, 1.489], 4),
        ({"patience": 2, "threshold": 0.01}, [2.0, 1.5, 1.49, 1.48, 1.47, 1.47], 6),  # 1.48 is 1% below 1.5
        ({"patience": 2, "threshold": 0.0}, [2.0, 1.5, 1.49, 1.48, 1.48, 1.48], 6),
        ({"patience": 1, "threshold": 0.0}, [2.0, 2.0], 2),
        ({"patience": 2, "threshold": 0.1}, [-1.0, -1.05, -1.2, -1.2, -1.2], 5),
        ({"patience": 2}, [float("nan"), 1.0, float("nan"), 0.9, float("nan"), float("nan")], 6),
        ({"patience": 3}, [1.0, 1.0, 1.0], None),
    ],
)
def test_a_plateau_of_evaluations(settings, losses, count):
    assert reached_at(PlateauSection(**settings), losses) == count


def test_a_plateau_of_the_training_loss_is_one_of_its_windows():
    settings = PlateauSection(metric="train_loss", window=4, patience=1, threshold=0.1)
    noisy = [2.0, 1.0, 2.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]  # 1.5, 0.5 and 0.5 on average
    assert reached_at(settings, noisy, steps=True) == 12
    assert reached_at(settings, noisy) is None  # evaluations are not looked at


RULE = SpectrumSection(threshold=0.9, release=0.6, every=5, interval=20)


def test_a_module_is_expanded_once_until_it_was_released():
    saturation = Saturation()
    assert saturation.choose(5, {"a": 0.95, "b": 0.89, "c": 0.99}, RULE) == ["c", "a"]  # the fullest first
    for module in ("a", "c"):
        saturation.expanded(5, module)
    # Between release and threshold, and even above it again, nothing happens: it did not fall far enough.
    assert saturation.choose(30, {"a": 0.7, "b": 0.5, "c": 0.55}, RULE) == []
    assert saturation.choose(35, {"a": 0.95, "b": 0.5, "c": 0.92}, RULE) == ["c"]
    # a is at the release, b at the threshold.
    assert saturation.choose(40, {"a": 0.6, "b": 0.9, "c": 0.92}, RULE) == ["c", "b"]
    assert saturation.choose(45, {"a": 0.9, "b": 0.1, "c": 0.1}, RULE) == ["a"]


def test_noise_around_the_threshold_is_no_reason():
    saturation, changes = Saturation(), []
    for step in range(5, 205, 5):
        chosen = saturation.choose(step, {"a": 0.9 + (0.02 if step % 10 else -0.02)}, RULE)
        for module in chosen:
            saturation.expanded(step, module)
            changes.append(step)
    assert changes == [5]


def test_a_module_rests_between_two_changes():
    saturation, changes = Saturation(), []
    for step in range(5, 105, 5):
        for module in saturation.choose(step, {"a": 0.95 if step % 10 else 0.3}, RULE):
            saturation.expanded(step, module)
            changes.append(step)
    assert changes == [5, 25, 45, 65, 85]


def test_what_did_not_fit_the_budget_is_asked_for_again():
    saturation = Saturation()
    assert saturation.choose(5, {"a": 0.95}, RULE) == ["a"] == saturation.choose(10, {"a": 0.95}, RULE)


def test_the_state_of_a_rule_is_restored():
    one = Saturation()
    one.choose(5, {"a": 0.95}, RULE), one.expanded(5, "a")
    other = Saturation()
    other.load(json.loads(json.dumps(one.state())))
    for step, share in ((10, 0.95), (15, 0.5), (20, 0.95), (25, 0.95)):
        assert one.choose(step, {"a": share}, RULE) == other.choose(step, {"a": share}, RULE)
    assert other.choose(30, {"a": 0.95}, RULE) == ["a"]


def test_rules_know_of_what_other_stages_changed():
    """A module rests after any change; but what no rule has expanded need not have been seen less full before."""
    saturation = Saturation()
    saturation.expanded(10, "a", by_rule=False), saturation.expanded(10, "b")
    share = {"a": 0.95, "b": 0.95, "c": 0.95}
    assert saturation.choose(25, share, RULE) == ["c"]
    assert saturation.choose(30, share, RULE) == ["a", "c"]
