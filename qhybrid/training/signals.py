"""SIGTERM and SIGINT: they end the command, but during training they ask for a checkpoint first."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal's Ctrl-C reaches a launcher and its processes, and the launcher passes it on: one press, two signals.
_SECONDS_OF_ONE_PRESS = 3.0


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; what was trained is in a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class StopSignals:
    """What was received. `received` is the first signal's number while training, None until then."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.received: int | None = None
        self._notify = notify
        self._since = 0.0
        self._training = False

    @contextmanager
    def asking_politely(self) -> Iterator[None]:
        """While the block runs, a signal only sets `received`."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def ask(self) -> int:
        """Have all training stop as SIGTERM does, but without a word: something else ended the run.

        Returns:
            The number of the signal that it is stopped by.
        """
        self.received = self.received or signal.SIGTERM
        return self.received

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler. A second SIGINT, some seconds after the first, ends the run at once."""
        if not self._training:
            raise Interrupted(number)
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            self._notify(f"{signal.Signals(number).name}: saving after this step, then leaving")
        elif number == signal.SIGINT and time.monotonic() - self._since > _SECONDS_OF_ONE_PRESS:
            raise Interrupted(number)


@contextmanager
def stop_signals(notify: Callable[[str], None]) -> Iterator[StopSignals]:
    """Handle SIGTERM and SIGINT while the block runs.

    Args:
        notify: is told, once, that training will stop.
    """
    signals = StopSignals(notify)
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there alone
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in _SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
