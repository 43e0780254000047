"""Follows the storages of meta tensors: what is alive at each moment, and the peak."""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA_ROUNDING = (
    512  # bytes: the CUDA caching allocator's smallest unit (c10/cuda/CUDACachingAllocator, kMinBlockSize)
)

aten = torch.ops.aten

# Files whose frames lie between the caller of an operation and what is done about it here.
_BETWEEN = (__file__, "torch/_compile.py", "torch/_dynamo/eval_frame.py")


@dataclass
class Allocation:
    """One storage: its rounded size in bytes, what made it, and in which phase."""

    num_bytes: int
    phase: str
    origin: str
    shape: tuple[int, ...] = ()


@dataclass
class Timeline:
    """Every allocation and release in order: (number of the allocation, change in bytes)."""

    allocations: list[Allocation] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)

    def peak(self, start: int = 0) -> tuple[int, int]:
        """The most bytes alive after event `start`, and the event at which they are."""
        alive = best = 0
        at = start
        for index, (_, change) in enumerate(self.events):
            alive += change
            if index >= start and alive > best:
                best, at = alive, index
        return best, at

    def alive_at(self, event: int) -> list[int]:
        """The numbers of the allocations that are alive after `event`."""
        alive: dict[int, None] = {}
        for number, change in self.events[: event + 1]:
            if change > 0:
                alive[number] = None
            else:
                alive.pop(number, None)
        return list(alive)

    def alive_bytes(self) -> int:
        """What is alive now, in bytes."""
        return sum(change for _, change in self.events)


# What an operation allocates inside and frees again, given its arguments: (args, kwargs) -> bytes.
Scratch = dict[Any, Callable[..., int]]
# Operations whose result depends on values that meta tensors do not have: (args, kwargs) -> result.
Answers = dict[Any, Callable[..., Any]]


class StorageTracker(TorchDispatchMode):
    """While active, records every new meta storage and its end.

    Args:
        rounding: sizes are rounded up to a multiple of this many bytes.
        scratch: see `Scratch`.
        answers: see `Answers`; a function may return NotImplemented to let the operation run.
    """

    def __init__(self, *, rounding: int, scratch: Scratch, answers: Answers) -> None:
        super().__init__()
        self.timeline = Timeline()
        self.phase = "load"
        self._rounding = rounding
        self._scratch = scratch
        self._answers = answers
        self._followed: dict[int, tuple[weakref.ref, int]] = {}
        self._counting = True
        self._sole_owner: tuple[int, int, int] | None = None
        self._learn_sole_owner()

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of the allocation that holds `tensor`, or None if it is not followed."""
        found = self._followed.get(id(tensor.untyped_storage()))
        return found[1] if found else None

    def follow(self, tensor: Tensor, origin: str) -> None:
        """Record the storage of `tensor`, unless it is known."""
        storage = tensor.untyped_storage()
        identity = id(storage)
        if identity in self._followed or not self._counting:
            return
        number = self._record(storage.nbytes(), origin, tuple(tensor.shape))
        num_bytes = self.timeline.allocations[number].num_bytes

        def gone(_: object) -> None:
            self.timeline.events.append((number, -num_bytes))
            del self._followed[identity]

        self._followed[identity] = (weakref.ref(storage, gone), number)

    def _record(self, num_bytes: int, origin: str, shape: tuple[int, ...]) -> int:
        rounded = math.ceil(num_bytes / self._rounding) * self._rounding
        self.timeline.allocations.append(Allocation(rounded, self.phase, origin, shape))
        number = len(self.timeline.allocations) - 1
        self.timeline.events.append((number, rounded))
        return number

    @contextlib.contextmanager
    def not_counting(self) -> Iterator[None]:
        """Storages made inside the block are not of the device's allocator."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = NotImplemented
        if func in self._answers:
            result = self._answers[func](*args, **kwargs)
        elif func is aten.add.Tensor and self._adds_in_place(args[0], args[1]):
            result = args[0]
        elif func is aten.scatter_add.default and _called_by_the_engine():
            result = args[0]  # gather's gradient is scattered in place where no mode is active
        if result is NotImplemented:
            result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_meta:
                self.follow(value, str(func))
        if func in self._scratch:
            inside = self._scratch[func](*args, **kwargs)
            if inside:
                number = self._record(inside, f"inside {func}", ())
                self.timeline.events.append((number, -self.timeline.allocations[number].num_bytes))
        return result

    def _adds_in_place(self, buffer: Any, gradient: Any) -> bool:
        """Whether the autograd engine would add `gradient` into `buffer`, a gradient that nobody else holds.

        Under a dispatch mode it makes a new tensor instead (torch/csrc/autograd/input_buffer.cpp,
        can_accumulate_inplace), which a real run does not do.
        """
        if not isinstance(gradient, Tensor) or gradient.shape != buffer.shape or gradient.dtype != buffer.dtype:
            return False
        owners = self._owners(buffer)
        if not _called_by_the_engine():
            return False
        if self._sole_owner is None:
            self._sole_owner = owners
        return owners == self._sole_owner

    @staticmethod
    def _owners(tensor: Tensor) -> tuple[int, int, int]:
        storage = tensor.untyped_storage()
        return tensor._use_count(), torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(tensor)

    def _learn_sole_owner(self) -> None:
        """How many references a gradient has that only the engine holds: it differs between versions of torch."""
        with self.not_counting(), self:
            x = torch.empty(2, 2, device="meta", requires_grad=True)
            y = x * 2
            (y @ x.detach() + y @ x.detach()).sum().backward()
        assert self._sole_owner is not None, "the engine added no gradients"


def _called_by_the_engine() -> bool:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.endswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"
