"""A loop that is not ours as a coroutine: it runs in its own thread, but only while its caller waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Python hands signals to the main thread while it waits, but not one that came just before it began to.
_LONGEST_WAIT = 0.2  # seconds


class Closed(BaseException):
    """Ends a loop from inside: its caller wants no more of it. No `except Exception` holds it."""


class Coroutine:
    """Runs a function in turns: `advance`, called outside, lets it go on to its next `pause`, called inside.

    Never two of them run at once, so they need no locks. What Python and torch keep for each thread (whether
    gradients are recorded, autocast, the current device) is each one's own; what they keep for the process is not.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._may_run, self._has_paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)  # or it would keep a dying process alive
        self._error: BaseException | None = None
        self.was_closed = False
        self._paused_seconds = 0.0
        self.has_ended = False

    def advance(self) -> None:
        """Let the function run to its next pause, or to its end.

        Raises:
            BaseException: what the function raised; or what a signal's handler raised while this waited, in which
                case the function still runs, and is to be closed.
        """
        assert not self.has_ended
        if self._thread.ident is None:
            self._thread.start()
        self._let_run()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the function at its next pause, with `Closed` raised there; what it raises instead is lost."""
        self.was_closed = True
        if self._thread.ident is None:
            self.has_ended = True
        while not self.has_ended:
            self._let_run()

    def _let_run(self) -> None:
        self._may_run.release()
        while not self._has_paused.acquire(timeout=_LONGEST_WAIT):
            pass

    def pause(self) -> None:
        """Inside: let the caller go on, until it calls `advance` again.

        Raises:
            Closed: it called `close`.
        """
        self.check()
        began = time.perf_counter()
        self._has_paused.release()
        self._may_run.acquire()
        self._paused_seconds += time.perf_counter() - began
        self.check()

    def check(self) -> None:
        """Inside, where a pause is not due.

        Raises:
            Closed: the caller wants no more.
        """
        if self.was_closed:
            raise Closed

    def seconds(self) -> float:
        """A clock that stands still in pauses."""
        return time.perf_counter() - self._paused_seconds

    def _run(self) -> None:
        self._may_run.acquire()
        try:
            self.check()
            self._function()
        except Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.has_ended = True
            self._has_paused.release()
