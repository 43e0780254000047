"""The processes of a sweep: as many at a time as their plans say that the memory takes, in order. No torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil

_POLL_SECONDS = 0.5
_SECONDS_TO_SAVE = 120  # after SIGTERM: for the step under way and a checkpoint
_CORES_PER_RUN = 4
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


@dataclass(frozen=True)
class Job:
    """One process: what it takes of the memory, by its plan, and what it does."""

    name: str
    needed_bytes: int
    target: Callable[..., None]
    arguments: Callable[[], tuple[Any, ...]]  # when it starts


@dataclass(frozen=True)
class Ended:
    """A process that is gone."""

    name: str
    exit_code: int  # -n: signal n


def context(preload: str) -> BaseContext:
    """How processes are made: forked from one that begins to import the module `preload` now.

    With a GPU each is a new one instead: the import asks CUDA for the GPU's kind, and what is forked after that
    cannot use it.
    """
    if any(Path(device).exists() for device in _GPU_DEVICES):
        return multiprocessing.get_context("spawn")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([preload])
    with _silent():
        forkserver.ensure_running()
    return forks


@contextmanager
def _silent() -> Iterator[None]:
    """What is started within has no output: libraries say what they miss when they are imported."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    before = os.dup(1), os.dup(2)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before[0], 1)
        os.dup2(before[1], 2)
        for descriptor in (nowhere, *before):
            os.close(descriptor)


def num_at_once(needed: Sequence[int], free_bytes: int, cores: int, asked: int | None) -> int:
    """How many runs go on at a time: `asked`, or one for four cores; but no more than the memory takes.

    One is always let in: where it does not fit, its own plan says so.
    """
    room, count = free_bytes, 0
    for size in sorted(needed):  # the most that could ever be in memory together
        room -= size
        if room < 0:
            break
        count += 1
    return max(1, min(count, len(needed), asked or max(1, cores // _CORES_PER_RUN)))


def num_cores() -> int:
    """The cores that this process may use; hyper-threads do not count."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def num_threads(cores: int, at_once: int) -> int:
    """The threads of each run: its share of the cores, or fewer where OMP_NUM_THREADS says so."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, cores // at_once)
    return min(share, max(1, int(asked))) if asked.isdecimal() else share


class Pool:
    """Runs jobs in the order they are given, never more than fit; on any exception it stops those under way."""

    def __init__(self, how: BaseContext, at_once: int, free_bytes: int) -> None:
        self._how, self._at_once, self._free = how, at_once, free_bytes
        self._running: dict[str, tuple[Job, Any]] = {}

    def run(
        self,
        jobs: Sequence[Job],
        *,
        started: Callable[[Job], None],
        ended: Callable[[Ended], None],
        watch: Callable[[tuple[str, ...]], None] = lambda names: None,
    ) -> None:
        """Run all jobs to their end.

        Args:
            started, ended: told of every job, in the thread of the caller.
            watch: is given the names of what runs, every half second; it may call `stop`.
        """
        waiting = list(jobs)
        try:
            while waiting or self._running:
                while waiting and self._has_room(waiting[0]):
                    job = waiting.pop(0)
                    started(job)
                    process = self._how.Process(target=job.target, args=job.arguments(), name=job.name)
                    process.start()
                    self._running[job.name] = (job, process)
                wait([process.sentinel for _, process in self._running.values()], timeout=_POLL_SECONDS)
                for name, (_, process) in list(self._running.items()):
                    if not process.is_alive():
                        process.join()
                        del self._running[name]
                        ended(Ended(name, process.exitcode or 0))
                watch(tuple(self._running))
        finally:
            self.leave()

    def stop(self, name: str) -> None:
        """End one job as SIGTERM does; `ended` is told as ever."""
        self._running[name][1].terminate()

    def leave(self) -> None:
        """Let all that runs save and end."""
        processes = [process for _, process in self._running.values()]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _SECONDS_TO_SAVE
        for process in processes:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._running.clear()

    def _has_room(self, job: Job) -> bool:
        if not self._running:
            return True
        taken = sum(other.needed_bytes for other, _ in self._running.values())
        return len(self._running) < self._at_once and taken + job.needed_bytes <= self._free
