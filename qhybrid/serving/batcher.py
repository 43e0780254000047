"""The thread that decodes: takes what waits, oldest first, into one batch, and tells every request what came.

Requests join and leave the batch between two tokens. While a batch has room, a request waits at most the batch's
latency target for others to be prefilled with.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Literal

import torch

from qhybrid.redaction import redacted_traceback
from qhybrid.serving.decode import Completion
from qhybrid.serving.engine import Engine
from qhybrid.serving.memory import is_out_of_memory

_log = logging.getLogger(__name__)

Fault = Literal["memory", "values", "internal"]


class QueueFullError(Exception):
    """So much waits that no more is taken."""


class DeadError(Exception):
    """The decoding thread has ended by a fault: nothing will be answered any more."""


class ClosingError(Exception):
    """The server is being stopped: what it took it finishes, and takes no more."""


@dataclass(frozen=True)
class Update:
    """What is new of an answer. The last one has a finish reason or a fault."""

    text: str = ""
    finish_reason: str | None = None
    fault: Fault | None = None


@dataclass(eq=False)
class Job:
    """One completion, and who is told about it.

    Attributes:
        tell: called from the decoding thread, in the order of the text; must not block.
        cancelled: nobody waits for it any more; set from any thread.
    """

    completion: Completion
    tell: Callable[[Update], None]
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)  # seconds


class Batcher:
    """Decodes jobs in one batch, in a thread of its own.

    Args:
        max_batch: rows that are decoded together.
        wait_seconds: the longest that a job waits for company while there is room.
        max_queue: jobs that may wait.
    """

    def __init__(self, engine: Engine, *, max_batch: int, wait_seconds: float, max_queue: int) -> None:
        self.max_queue = max_queue
        self._engine, self._max_batch, self._wait_seconds = engine, max_batch, wait_seconds
        self._most_rows = max_batch  # lower after running out of memory, until nothing is left to do
        self._waiting: deque[Job] = deque()
        self._running: dict[Completion, Job] = {}
        self._batch = engine.new_batch()
        self._closing = self._dead = False
        self._condition = Condition()
        self._thread = Thread(target=self._work, name="qhybrid-decode", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs, all or none.

        Raises:
            QueueFullError, ClosingError, DeadError: none was taken.
        """
        with self._condition:
            if self._dead:
                raise DeadError
            if self._closing:
                raise ClosingError
            if len(self._waiting) + len(jobs) > self.max_queue:
                raise QueueFullError
            self._waiting.extend(jobs)
            self._condition.notify()

    def close(self) -> None:
        """Take no more, finish what was taken, and wait for that."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    @property
    def counts(self) -> tuple[int, int]:
        """How many jobs wait, and how many are decoded."""
        return len(self._waiting), len(self._running)

    @property
    def state(self) -> Literal["ok", "closing", "failed"]:
        """Whether jobs are taken, or why not: the batcher is being closed, or its thread has ended by a fault."""
        if self._dead:
            return "failed"
        return "ok" if self._thread.is_alive() and not self._closing else "closing"

    def _work(self) -> None:
        try:
            self._decode()
        except BaseException as error:
            _log.critical("the decoding thread has ended; restart the server\n%s", redacted_traceback(error))
            with self._condition:
                self._dead = True
                jobs = [*self._running.values(), *self._waiting]
                self._running, self._waiting = {}, deque()
            for job in jobs:
                job.tell(Update(fault="internal"))

    def _decode(self) -> None:
        with self._engine.inference():
            while self._has_work():
                error: BaseException | None = None
                try:
                    self._round()
                except Exception as caught:
                    error = caught.with_traceback(None) if is_out_of_memory(caught) else caught
                if error is not None:  # outside of the handler, so that what it holds of the batch is let go
                    self._recover(error)

    def _has_work(self) -> bool:
        """Wait until there is something to do; False when there never will be."""
        with self._condition:
            while not self._running:
                if not self._waiting:
                    if self._closing:
                        return False
                    self._most_rows = self._max_batch
                    self._condition.wait()
                elif (seconds := self._seconds_to_wait()) > 0:
                    self._condition.wait(seconds)
                else:
                    break
        return True

    def _seconds_to_wait(self) -> float:
        """Until those that wait should be taken in; 0 or less for now."""
        if self._closing or len(self._waiting) >= self._most_rows - len(self._running):
            return 0
        return self._waiting[0].arrived + self._wait_seconds - time.monotonic()

    def _round(self) -> None:
        self._batch.drop([row for row, job in self._running.items() if job.cancelled])
        self._running = {row: job for row, job in self._running.items() if not job.cancelled}
        joining = self._admitted()
        if joining:
            self._running |= {job.completion: job for job in joining}
            self._batch.add([job.completion for job in joining])
        if len(self._batch):
            self._batch.step()
        self._tell()

    def _admitted(self) -> list[Job]:
        """Those that wait and are to be taken in now, the oldest first."""
        with self._condition:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            if not self._waiting or self._seconds_to_wait() > 0:
                return []
            room = min(len(self._waiting), self._most_rows - len(self._running))
            return [self._waiting.popleft() for _ in range(room)]

    def _tell(self) -> None:
        for row, job in list(self._running.items()):
            text = row.read()
            if row.finish_reason is not None:
                del self._running[row]
            if row.finish_reason == "error":
                job.tell(Update(text, fault="values"))
            elif text or row.finish_reason:
                job.tell(Update(text, row.finish_reason))

    def _recover(self, error: BaseException) -> None:
        """After a failed round: out of memory, try again with half of the rows; else say so to all of them."""
        self._tell()  # some may have got their last token
        jobs = sorted(self._running.values(), key=lambda job: job.arrived)
        self._batch = self._engine.new_batch()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._running = {}  # not before: if the GPU is lost, they are told by `_work`
        out_of_memory = is_out_of_memory(error)
        if out_of_memory and len(jobs) > 1:
            self._most_rows = max(1, len(jobs) // 2)
            _log.warning("out of memory with %d rows; going on with %d", len(jobs), self._most_rows)
            with self._condition:
                self._waiting.extendleft(reversed(jobs))
            return
        if not out_of_memory:
            _log.error("a batch failed\n%s", redacted_traceback(error))
        for job in jobs:
            job.tell(Update(fault="memory" if out_of_memory else "internal"))
