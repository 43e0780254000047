"""One training loop after the other in one process: whose step is next, and what becomes of all when one stops."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from qhybrid.base.share import share_weights
from qhybrid.errors import QhybridError
from qhybrid.recipe.tasks import named
from qhybrid.training.callbacks.turns import TakeTurns
from qhybrid.training.coroutine import Coroutine
from qhybrid.training.events import EventLog
from qhybrid.training.memory import give_back_freed_memory
from qhybrid.training.process_state import ProcessState
from qhybrid.training.session import Session, SftResult
from qhybrid.training.signals import Interrupted, StopSignals
from qhybrid.training.trainer import BandedTrainer


class Task:
    """A session that goes on in turns."""

    session: Session

    def __init__(self, name: str, weight: float) -> None:
        self.name, self.weight = name, weight
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.loop = Coroutine(lambda: self._train(device))
        self._state = ProcessState()
        self._has_stepped = False

    @property
    def step(self) -> int:
        """Optimizer steps taken, in earlier processes too."""
        return self.trainer.state.global_step

    @property
    def is_done(self) -> bool:
        """Whether it was trained to its end."""
        return self.loop.has_ended and not self.loop.was_closed and not self.trainer.was_stopped

    @property
    def trainer(self) -> BandedTrainer:
        """Once it is built."""
        return self.session.trainer

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Its random numbers, and what else the process has once, while the block runs."""
        with self._state.in_place():
            yield

    def build(self, model: PreTrainedModel) -> None:
        """Make the trainer, on the weights of `model`."""
        with self.in_place():
            own = share_weights(model)
            self.session.rank_by_data(own)
            self.session.build(own, TakeTurns(self.loop))

    def advance(self) -> bool:
        """Begin; or take a step, after what follows from the one before. Whether one was taken."""
        before = self.step
        with self.in_place():
            self.loop.advance()
        if self.trainer.args.device.type == "cpu":  # where activations are; or each thread would keep its own
            give_back_freed_memory()
        self._has_stepped |= self.step > before
        return self.step > before

    def stop(self) -> None:
        """Once asked to stop: save. Before the first step of this process there is nothing to save."""
        if not self._has_stepped:
            self.close()
        while not self.loop.has_ended:
            self.advance()

    def close(self) -> None:
        """End it as it is, unless it has ended."""
        if not self.loop.has_ended:
            with self.in_place():
                self.loop.close()

    def finish(self) -> SftResult:
        """Save the adapter."""
        with self.in_place():
            figures = self.session.finish()
        self.session.run.write_status("finished", figures=figures)
        return SftResult(self.session.run, figures)

    def _train(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own
        self.session.train()


def due(steps: int, weight: float) -> float:
    """When a task's next step is due: its middle, at `weight` steps in a unit of time. The earliest goes first.

    That is Webster's method of apportionment. It follows from the steps taken alone, so that the order after a
    resume is what it would have been.
    """
    return (steps + 0.5) / weight


def take_turns(
    tasks: Sequence[Task], signals: StopSignals, events: EventLog, *, is_common: bool
) -> dict[str, SftResult]:
    """By turns a step of each task, until all are done, one fails, or a signal comes.

    Args:
        is_common: they share an adapter. Then none is finished before all are, and when one fails, the others go
            back to their last common checkpoint with it.

    Raises:
        Interrupted: a signal came; every task has saved what it has.
        BaseException: what a task raised, with its name. The others have saved what they have.
    """
    going, results = list(tasks), {}

    def settle(task: Task) -> None:
        if task.loop.has_ended:
            going.remove(task)
        if task.is_done and not is_common:
            results[task.name] = task.finish()

    at = tasks[0]
    try:
        for at in tasks:  # to where the first step begins; all are there before any takes it
            at.advance()
            settle(at)
        while going and signals.received is None:
            at = min(going, key=lambda task: due(task.step, task.weight))
            if at.advance():
                events.write("turn", task=at.name, step=at.step)
            settle(at)
        for at in list(going):  # a signal came
            at.stop()
            settle(at)
        if is_common and all(task.is_done for task in tasks):
            for at in tasks:
                results[at.name] = at.finish()
    except BaseException as error:
        told = at.session.stopped(error)
        if isinstance(told, QhybridError):
            named(told, at.name)
        # The second signal ends all at once.
        may_save = not is_common and not isinstance(error, KeyboardInterrupt)
        others = [task for task in tasks if task is not at and task.name not in results]
        stop_others(others, signals, may_save=may_save)
        if told is error:
            raise
        raise told from None
    finally:
        for task in tasks:
            task.close()
    if len(results) < len(tasks):
        assert signals.received is not None
        for task in tasks:
            if task.name not in results:
                task.session.stopped(Interrupted(signals.received))
        raise Interrupted(signals.received)
    return results


def stop_others(tasks: Sequence[Task], signals: StopSignals, *, may_save: bool) -> None:
    """End what others go on with, because of one that failed."""
    number = signals.ask()
    for task in tasks:
        with contextlib.suppress(Exception):  # of several errors the first is told
            if may_save and not task.loop.has_ended:
                task.stop()
            if may_save and task.is_done:
                task.finish()
                continue
        task.session.stopped(Interrupted(number))
