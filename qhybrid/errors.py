"""The error tree: what happened, where, what to do about it, and the exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class QhybridError(Exception):
    """Base of every error a user may see.

    `message` says what happened, `where` names the place ("recipe.yaml:12"), `hint` says what to do. `at` is the
    place in a recipe whose file is not known yet, by keys and by names: ("adapters", "top", "rank").
    Exit code 2 means that the user's input was wrong; 1 means that a run failed.
    """

    exit_code = 2
    told_elsewhere: bool | None = None  # whether another process prints it; None where it is the only one

    def __init__(
        self, message: str, *, hint: str | None = None, where: str | None = None, at: tuple[str | int, ...] = ()
    ) -> None:
        super().__init__(message)
        self.at = at
        self.message = message
        self.hint = hint
        self.where = where

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\nhint: {self.hint}" if self.hint else text


@contextlib.contextmanager
def found_at(*at: str | int) -> Iterator[None]:
    """Say of every error in the block where in the recipe it is, before what it says itself of the place."""
    try:
        yield
    except QhybridError as error:
        error.at = (*at, *error.at)
        raise


class RecipeError(QhybridError):
    """The recipe, or an override on the command line, is not valid."""


class LayoutError(QhybridError):
    """The bands do not fit the model: overlap, a pattern without a match, a layer out of range."""


class ModelError(QhybridError):
    """The base model cannot be found, read or used."""


class MemoryPlanError(QhybridError):
    """A recipe does not fit into the memory there is."""


class HardwareError(QhybridError):
    """The memory or the GPU that a plan is for is not given in a usable form."""


class AdapterError(QhybridError):
    """A saved adapter cannot be read, or does not belong to the base model."""


class ExportError(QhybridError):
    """A result cannot be written where or as the user asked."""


class ProofError(QhybridError):
    """A conversion or a merged model does not compute what it should, so it was not written."""

    exit_code = 1


class ServingError(QhybridError):
    """The server cannot be started as asked."""


class DataError(QhybridError):
    """A data file cannot be read, or too little of it is usable."""


class RunFolderError(QhybridError):
    """The output folder holds something that must not be overwritten, or nothing to resume from."""


class SweepError(QhybridError):
    """A sweep cannot be made as asked, or its folder is of another one."""


class TrainingError(QhybridError):
    """A run that started correctly had to stop."""

    exit_code = 1


class NonFiniteError(TrainingError):
    """The loss or the gradient norm became NaN or infinite; the optimizer step was not taken."""


class AllocationError(TrainingError):
    """An AdaLoRA band ended without a single allocation, so its ranks never adapted."""
