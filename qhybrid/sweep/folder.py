"""The folder of a sweep: where everything in it lies, who may use it, and what it was started with.

sweep.json      date, data, threads: what must not change        recipe.yaml   the recipe, with its sweep
runs/ARM/RUN/   one folder for each run                           results.json  the table (also as results.md)
optuna.journal  the runs that ended, for optuna's pruner

A run's folder holds run/ (the run folder of `qhybrid sft`), output.log, and outcome.json once it has ended.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qhybrid.disk import write_atomically
from qhybrid.errors import SweepError
from qhybrid.recipe.load import dump_recipe, parse_recipe
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.sweep import ArmSection
from qhybrid.sweep.results import RESULTS
from qhybrid.training.claim import changes_between

FORMAT_VERSION = 1
_MAY_DIFFER = (
    "output_dir", "training.logging_steps", "training.report_to", "training.run_name", "training.save_total_limit",
    "memory.vram",
)  # fmt: skip


@dataclass(frozen=True)
class Started:
    """What a sweep was started with, beside its recipe."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    date: str  # of the start (ISO 8601): what chat templates that write the date are told in every run
    data_fingerprint: str  # of the rows to train on and those held out
    threads: int  # of every run: sums of floats depend on it


_STARTED = TypeAdapter(Started)


@dataclass(frozen=True)
class SweepFolder:
    """The folder of a sweep."""

    path: Path

    recipe_file = property(lambda self: self.path / "recipe.yaml")
    started_file = property(lambda self: self.path / "sweep.json")
    journal = property(lambda self: self.path / "optuna.journal")
    results_file = property(lambda self: self.path / RESULTS)
    table_file = property(lambda self: self.path / "results.md")

    def run(self, name: str) -> Path:
        """The folder of the run of that name."""
        return self.path / "runs" / name

    @property
    def started(self) -> Started | None:
        """What the sweep here was started with; None where none was.

        Raises:
            SweepError: sweep.json is damaged, or of another version.
        """
        if not self.started_file.exists():
            return None
        try:
            content = json.loads(self.started_file.read_text(encoding="utf-8"))
            version = content.pop("format_version")
            if version == FORMAT_VERSION:
                return _STARTED.validate_python(content)
            fault = f"format version {version} is not {FORMAT_VERSION}"
        except (OSError, ValueError, KeyError, AttributeError, ValidationError) as error:
            fault = str(error).splitlines()[0]
        raise SweepError(f"not what a sweep writes: {fault}", where=str(self.started_file))

    def begin(self, recipe: Recipe, started: Started) -> None:
        """Write what the sweep is started with; sweep.json last, so that it says that all is there.

        Raises:
            SweepError: there is another recipe.yaml, which would be lost.
        """
        text = dump_recipe(recipe)
        if self.recipe_file.exists() and self.recipe_file.read_text(encoding="utf-8") != text:
            raise SweepError(
                f"{self.recipe_file} is not from a sweep of this recipe",
                hint="choose another --output; nothing was changed",
            )
        write_atomically(self.recipe_file, text)
        content = {"format_version": FORMAT_VERSION, **asdict(started)}
        write_atomically(self.started_file, json.dumps(content, indent=2) + "\n")

    def is_grown(self, recipe: Recipe) -> bool:
        """Whether the recipe that the sweep is started with again asks for more runs. Changes nothing.

        Raises:
            SweepError: it asks for other runs in the place of some; what has changed is named.
        """
        old, _ = parse_recipe(self.recipe_file.read_text(encoding="utf-8"), str(self.recipe_file))
        grown = _grown(old, recipe)
        changed = changes_between(grown, recipe, _MAY_DIFFER)
        if changed:
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise SweepError(
                f"the sweep in {self.path} was started with another recipe ({'; '.join(changed[:5])}{more})",
                hint=f"go on with the recipe it was started with ({self.recipe_file} shows it), to which arms, "
                "rates and seeds may be added, or choose another --output",
            )
        return grown is not old

    def grow(self, recipe: Recipe) -> None:
        """Take a recipe that `is_grown`, once it is known that its sweep can be made."""
        self.results_file.unlink(missing_ok=True)  # before the recipe, which it would not be the results of
        write_atomically(self.recipe_file, dump_recipe(recipe))


def _grown(old: Recipe, new: Recipe) -> Recipe:
    """`old` with the arms, rates and seeds of `new`, where all of its own runs are among those; else `old`."""
    assert old.sweep is not None and new.sweep is not None
    arms = {arm.name: _without_rates(arm) for arm in new.sweep.all_arms}
    for arm in old.sweep.all_arms:
        if arms.get(arm.name) != _without_rates(arm):
            return old
        if not set(old.sweep.rates_of(arm.name)) <= set(new.sweep.rates_of(arm.name)):
            return old
    if new.sweep.seeds[: len(old.sweep.seeds)] != old.sweep.seeds or old.sweep == new.sweep:
        return old
    more = {name: getattr(new.sweep, name) for name in ("arms", "learning_rates", "seeds")}
    return old.model_copy(update={"sweep": old.sweep.model_copy(update=more)})


def _without_rates(arm: ArmSection) -> dict[str, Any]:
    """What the arm trains, as values: models are equal also where one leaves out what the other sets."""
    return arm.model_dump(mode="json", exclude={"learning_rates"})


@contextmanager
def claimed(path: Path) -> Iterator[SweepFolder]:
    """The folder for a sweep, new or begun, that no other process gets meanwhile.

    Raises:
        SweepError: it is a file, holds something else, cannot be written, or a sweep is going on in it.
    """
    folder = SweepFolder(path)
    if path.exists() and not path.is_dir():
        raise SweepError(f"{path} is a file", hint="choose another --output")
    if path.is_dir() and not folder.started_file.exists():
        foreign = sorted({item.name for item in path.iterdir()} - {"recipe.yaml"})
        if [name for name in foreign if not name.startswith((".sweep.json", ".recipe.yaml"))]:
            raise SweepError(
                f"{path} holds files that are not from a sweep ({foreign[0]})",
                hint="choose another --output; nothing was changed",
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise SweepError(f"{path} cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SweepError(
                f"a sweep is going on in {path}", hint="wait for it, or choose another --output"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield folder
    finally:
        os.close(descriptor)
