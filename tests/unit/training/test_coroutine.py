"""A function that runs in turns: never at once with its caller, and ended from either side."""

from __future__ import annotations

import threading

import pytest
import torch

from qhybrid.training.coroutine import Closed, Coroutine


def test_caller_and_function_take_turns():
    seen: list[str] = []

    def work():
        for number in range(3):
            seen.append(f"inside {number}")
            loop.pause()

    loop = Coroutine(work)
    for number in range(3):
        seen.append(f"outside {number}")
        loop.advance()
        assert not loop.has_ended
    loop.advance()
    assert loop.has_ended and not loop.was_closed
    assert seen == ["outside 0", "inside 0", "outside 1", "inside 1", "outside 2", "inside 2"]


def test_what_it_raises_is_raised_outside():
    def work():
        loop.pause()
        raise KeyError("inside")

    loop = Coroutine(work)
    loop.advance()
    with pytest.raises(KeyError, match="inside"):
        loop.advance()
    assert loop.has_ended


def test_closing_ends_it_at_its_pause_and_runs_what_must_run():
    seen: list[str] = []

    def work():
        try:
            loop.pause()
            seen.append("never")
        except Exception:
            seen.append("never")
        finally:
            seen.append("finally")

    loop = Coroutine(work)
    loop.advance()
    loop.close()
    assert loop.has_ended and loop.was_closed and seen == ["finally"]
    unborn = Coroutine(work)
    unborn.close()
    assert unborn.has_ended and seen == ["finally"]


def test_closing_waits_for_what_is_running():
    """As after a signal whose handler raised outside while the function was at work."""
    entered, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def work():
        entered.set()
        go_on.wait()
        try:
            loop.check()
        except Closed:
            seen.append("closed")
            raise

    loop = Coroutine(work)
    caller = threading.Thread(target=loop.advance)
    caller.start()
    entered.wait()
    closer = threading.Thread(target=loop.close)
    closer.start()
    go_on.set()
    closer.join(10)
    assert loop.has_ended and seen in (["closed"], [])
    loop._has_paused.release()  # one of the two took the other's
    caller.join(10)
    assert not caller.is_alive()


def test_gradients_are_recorded_though_the_caller_does_not():
    found: list[bool] = []

    def work():
        found.append(torch.is_grad_enabled())
        with torch.no_grad():
            loop.pause()
        found.append(torch.is_grad_enabled())

    loop = Coroutine(work)
    with torch.no_grad():
        loop.advance()
        assert not torch.is_grad_enabled()
        loop.advance()
    assert found == [True, True]


def test_its_clock_stands_still_in_pauses():
    times: list[float] = []

    def work():
        times.append(loop.seconds())
        loop.pause()
        times.append(loop.seconds())

    loop = Coroutine(work)
    loop.advance()
    threading.Event().wait(0.3)
    loop.advance()
    assert times[1] - times[0] < 0.2
