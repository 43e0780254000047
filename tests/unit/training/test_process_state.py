"""Random numbers and accelerate's state of one loop do not depend on what others did in between."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from accelerate.state import GradientState

from qhybrid.training.process_state import ProcessState


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed(number: int) -> None:
    random.seed(number), np.random.seed(number), torch.manual_seed(number)


def test_random_numbers_are_each_ones_own():
    seed(7)
    expected = [draw() for _ in range(4)]
    seed(1)
    outside = [draw() for _ in range(2)]
    seed(1)
    one, other = ProcessState(), ProcessState()
    with one.in_place():
        seed(7)
        found = [draw()]
    assert draw() == outside[0]
    for _ in range(3):
        with other.in_place():
            seed(3), draw()
        with one.in_place():
            found.append(draw())
    assert found == expected
    assert draw() == outside[1]


def test_accelerates_state_is_each_ones_own():
    state = GradientState._shared_state
    before = dict(state)
    one, other = ProcessState(), ProcessState()
    with one.in_place():
        assert not state
        mine = GradientState()
        mine._set_sync_gradients(False)
    with other.in_place():
        assert not GradientState.initialized.fget(None)
        GradientState()._set_sync_gradients(True)
    with pytest.raises(KeyError), one.in_place():
        assert mine.sync_gradients is False
        raise KeyError  # it is put back whatever happens
    assert state == before and GradientState._shared_state is state
