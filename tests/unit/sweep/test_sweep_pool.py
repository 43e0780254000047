"""Processes of a sweep: no more at a time than the memory takes, and all gone when one fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from qhybrid.sweep.pool import Ended, Job, Pool, num_at_once

GIB = 2**30


@pytest.mark.parametrize(
    ("needed", "free", "cores", "asked", "expected"),
    [
        ([4, 4, 4, 4], 9, 64, None, 2),  # memory decides
        ([4, 4, 4, 4], 100, 8, None, 2),  # cores decide: one run for four
        ([4, 4, 4, 4], 100, 2, None, 1),
        ([4, 4, 4, 4], 100, 2, 3, 3),  # the user decides, below what the memory takes
        ([4, 4, 4, 4], 9, 2, 3, 2),
        ([4, 4], 100, 64, 8, 2),  # no more than there are
        ([40], 9, 64, 8, 1),  # one is always let in: its own plan refuses it
        ([9, 1, 1, 9], 3, 64, 8, 2),  # the two small ones fit together
    ],
)
def test_how_many_at_once(needed, free, cores, asked, expected):
    assert num_at_once([size * GIB for size in needed], free * GIB, cores, asked) == expected


def nap(seconds: float, code: int = 0) -> None:
    time.sleep(seconds)
    os._exit(code)


def run_all(pool: Pool, sizes: dict[str, int], *, seconds: float = 0.15, watch=lambda names: None):
    together: list[set[str]] = []
    running: set[str] = set()
    ended: list[Ended] = []

    def end(one: Ended) -> None:
        running.discard(one.name)
        ended.append(one)

    def start(job: Job) -> None:
        running.add(job.name)
        together.append(set(running))

    jobs = [Job(name, size, nap, lambda: (seconds,)) for name, size in sizes.items()]
    pool.run(jobs, started=start, ended=end, watch=watch)
    return together, ended


def test_runs_go_on_together_only_as_far_as_their_plans_fit():
    """Of 10 bytes two runs of 4 fit; beside one of 7 nothing does, and nothing overtakes it."""
    sizes = {"a": 4, "b": 4, "big": 7, "c": 4}
    together, ended = run_all(Pool(multiprocessing.get_context("fork"), 4, 10), sizes)
    assert all(sum(sizes[name] for name in names) <= 10 for names in together)
    assert {"a", "b"} in together and [set(names) for names in together if "big" in names] == [{"big"}]
    assert [one.exit_code for one in ended] == [0] * 4


def test_one_that_does_not_fit_runs_alone():
    together, ended = run_all(Pool(multiprocessing.get_context("fork"), 4, 10), {"a": 99, "b": 99})
    assert together == [{"a"}, {"b"}] and len(ended) == 2


def test_jobs_are_a_limit_too():
    together, _ = run_all(Pool(multiprocessing.get_context("fork"), 2, 10**9), dict.fromkeys("abcde", 1))
    assert max(map(len, together)) == 2


def test_a_run_that_is_stopped_ends_by_sigterm():
    pool = Pool(multiprocessing.get_context("fork"), 1, 10)
    _, ended = run_all(
        pool, {"a": 1}, seconds=30, watch=lambda names: [pool.stop(name) for name in names] and None
    )
    assert ended == [Ended("a", -signal.SIGTERM)]


def test_an_error_leaves_no_process_behind():
    pool, begun = Pool(multiprocessing.get_context("fork"), 2, 10), time.monotonic()

    def fail(names: tuple[str, ...]) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_all(pool, {"a": 1, "b": 1}, seconds=60, watch=fail)
    assert time.monotonic() - begun < 30 and not multiprocessing.active_children()
