"""What a training loop takes to be its own, but the libraries keep once for the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from qhybrid.training.state import assign_random_state, random_state

# Every Accelerator of a process has the very same three dictionaries as its state, and making the arguments of
# another Trainer empties them. tests/integration/test_contracts.py holds that.
_KEPT_BY_ACCELERATE = (PartialState, AcceleratorState, GradientState)


class ProcessState:
    """Random numbers and accelerate's state of one of several loops in a process, in place while it runs."""

    def __init__(self) -> None:
        self._random: dict[str, Tensor] | None = None  # none of its own until it has run
        self._accelerate: list[dict[str, Any]] = [{} for _ in _KEPT_BY_ACCELERATE]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run the block with this state; what was there before is put back."""
        outside = ProcessState()
        outside._take()
        self._put()
        try:
            yield
        finally:
            self._take()
            outside._put()

    def _take(self) -> None:
        self._random = random_state()
        self._accelerate = [dict(kept._shared_state) for kept in _KEPT_BY_ACCELERATE]

    def _put(self) -> None:
        if self._random is not None:
            assign_random_state(self._random)
        for kept, own in zip(_KEPT_BY_ACCELERATE, self._accelerate, strict=True):
            kept._shared_state.clear()  # in place: they are the __dict__ of every instance
            kept._shared_state.update(own)
