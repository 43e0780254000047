"""Who may take a run folder: no foreign one, no running one; nothing is lost to a run that never began."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qhybrid.errors import RunFolderError
from qhybrid.recipe.load import parse_recipe
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.tasks import FOLDER, task_recipes
from qhybrid.redaction import redacted_values
from qhybrid.training.checkpoint import choose, remove_leftovers
from qhybrid.training.events import read_events
from qhybrid.training.run import STATE, Run, is_alive

_LEFT_BY_A_RUN = (
    "adapter", ".adapter.partial", "checkpoints", "events.jsonl", "audit.json", "layout.json", "plan.json",
    "tensorboard", "recipe.yaml", "run.json", "base.json", "deepspeed.json", "report.html", "samples.json",
    FOLDER,
)  # fmt: skip
_REPLACED = ".replaced"  # an earlier run, until its successor has taken a step


@contextmanager
def claim(recipe: Recipe, *, resume: bool, overwrite: bool) -> Iterator[Run]:
    """Take the recipe's output_dir for a run, without ever losing what lies there; no other process gets it.

    Args:
        resume: go on from the newest sealed checkpoint if there is one; start afresh in an empty folder.
        overwrite: set an earlier run of qhybrid in that folder aside. `discard_replaced` removes it once the
            new run has taken a step; until then it comes back when the new one fails.

    Raises:
        RunFolderError: as `check_claim`; or the folder cannot be written, or the checkpoint has no optimizer.
    """
    check_claim(recipe, resume=resume, overwrite=overwrite)
    run = Run(Path(recipe.output_dir))
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(run.folder, os.O_RDONLY)
    except OSError as error:
        raise RunFolderError(f"output_dir {run.folder} cannot be written: {error.strerror}") from None
    try:
        _lock(lock, run.folder)
        try:
            yield _claimed(run, recipe, resume=resume, overwrite=overwrite)
        finally:
            _bring_back(run.folder)
    finally:
        os.close(lock)


def _claimed(run: Run, recipe: Recipe, *, resume: bool, overwrite: bool) -> Run:
    _bring_back(run.folder)  # left by a run that was killed before its first step
    check_claim(recipe, resume=resume, overwrite=overwrite)
    if resume and (run.status or {}).get("status") == "finished":
        raise RunFolderError(f"output_dir {run.folder} holds a finished run", hint="there is nothing to resume")
    if overwrite:
        _set_aside(run.folder)
    if not resume or not run.checkpoints.is_dir():
        return run
    remove_leftovers(run.checkpoints)
    choice = choose(run.checkpoints)
    if choice.folder is None and choice.passed_over:
        folder, fault = choice.passed_over[0]
        raise RunFolderError(
            f"no checkpoint of {run.folder} is whole; of the newest, {folder.name}, {fault}",
            hint="bring the file back, or start again with --overwrite",
        )
    if choice.folder is not None and not (choice.folder / STATE).is_file():
        raise RunFolderError(
            f"{choice.folder} holds no optimizer state (training.save_only_model)",
            hint="it cannot be resumed exactly, only evaluated; start a new run in another output_dir",
        )
    notes = tuple(f"{folder.name} is not whole and passed over: {fault}" for folder, fault in choice.passed_over)
    return Run(run.folder, resume_from=choice.folder, notes=notes)


def _lock(descriptor: int, folder: Path) -> None:
    """Hold the folder until the descriptor is closed, or the process ends in whatever way."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _going_on(folder, "another process") from None
    except OSError:
        pass  # a file system without locks; run.json still tells of a run that is going on


def _going_on(folder: Path, who: str) -> RunFolderError:
    return RunFolderError(
        f"a run is going on in output_dir {folder} ({who})", hint="wait for it, or choose another output_dir"
    )


def _set_aside(folder: Path) -> None:
    """Move what a run leaves below `.replaced`; files of the user's own stay where they are."""
    aside = folder / _REPLACED
    aside.mkdir()
    for name in _LEFT_BY_A_RUN:
        if (folder / name).exists():
            (folder / name).rename(aside / name)


def _bring_back(folder: Path) -> None:
    """Undo `_set_aside`, unless the new run got so far that the old one was discarded."""
    aside = folder / _REPLACED
    if not aside.is_dir():
        return
    for item in aside.iterdir():
        newer = folder / item.name
        if newer.is_dir():
            shutil.rmtree(newer)
        item.replace(newer)
    aside.rmdir()


def discard_replaced(run: Run) -> None:
    """Remove the run that this one replaces, for good."""
    aside, doomed = run.claimed / _REPLACED, run.claimed / f"{_REPLACED}.old"
    if doomed.is_dir():
        shutil.rmtree(doomed)  # left by a run that was killed right here
    if aside.is_dir():
        aside.rename(doomed)  # in one step: half a run must not come back
        shutil.rmtree(doomed)


def has_replaced(run: Run) -> bool:
    """Whether an earlier run is set aside, to come back if this one takes no step."""
    return (run.claimed / _REPLACED).is_dir()


def check_claim(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output_dir that must not be touched. Changes nothing.

    A run that stopped before its first step has nothing to lose: its folder is used again, in place.

    Raises:
        RunFolderError: a foreign folder, a run that is going on, a finished or interrupted run without leave to
            touch it, or a run of another recipe to be resumed.
    """
    run = Run(Path(recipe.output_dir))
    if run.folder.exists() and not run.folder.is_dir():
        raise RunFolderError(f"output_dir {run.folder} is a file", hint="choose another output_dir")
    # Of a process that was killed before its first file had a name.
    if not run.folder.exists() or all(item.name == ".run.json.tmp" for item in run.folder.iterdir()):
        return
    if (run.folder / _REPLACED).is_dir() and run.status is None:
        return  # killed while a run was set aside or brought back; `claim` brings it back, and asks again
    status = run.status
    if status is None:
        raise RunFolderError(
            f"output_dir {run.folder} holds files that are not from a run of qhybrid",
            hint="choose another output_dir; nothing was changed",
        )
    if status["status"] == "running" and is_alive(status.get("process", {})):
        raise _going_on(run.folder, f"process {status['process']['pid']}")
    if overwrite or (status["status"] != "finished" and not _has_trained(run)):
        return
    if not resume:
        state = "a finished run" if status["status"] == "finished" else "an unfinished run"
        raise RunFolderError(
            f"output_dir {run.folder} holds {state}",
            hint="go on with --resume auto, replace it with --overwrite, or choose another output_dir",
        )
    if recipe.training.train_sampling_strategy == "batch_rebalance":
        raise RunFolderError(
            "a run with training.train_sampling_strategy: batch_rebalance cannot be resumed in the same order",
            hint="start a new run in another output_dir",
        )
    _same_recipe(run, recipe)


def _has_trained(run: Run) -> bool:
    """Whether the run took a step."""
    if run.adapter.exists() or (run.checkpoints.is_dir() and any(run.checkpoints.glob("checkpoint-*"))):
        return True
    if any(_has_trained(Run(folder)) for folder in (run.folder / FOLDER).glob("*")):
        return True
    return run.events_file.is_file() and bool(read_events(run.events_file, "step"))


# What may differ between a run and its resumption: it changes neither the data nor the mathematics.
_MAY_DIFFER = (
    "training.logging_steps", "training.report_to", "training.run_name", "training.save_total_limit",
    "training.gradient_checkpointing", "training.per_device_eval_batch_size", "memory.vram",
    "memory.on_exceed", "memory.checkpoint_layers", "training.activation_checkpointing", "distributed.offload",
    "distributed.zero_stage", "monitoring", "sweep",
    "output_dir",  # it is where the run was found, by whatever path
)  # fmt: skip
# They may differ as long as an optimizer step takes as many rows: the same ones then.
_SPLIT = (
    "training.per_device_train_batch_size", "training.gradient_accumulation_steps", "distributed.processes",
)  # fmt: skip


# Where a data file lies may differ as well: the fingerprint of the rows says whether they are the same.
_DATA_PATH = re.compile(r"data\.((eval_)?sources\.\d+\.path|chat_template)")


def _same_recipe(run: Run, recipe: Recipe) -> None:
    if not run.recipe_file.is_file():
        return
    old, _ = parse_recipe(run.recipe_file.read_text(encoding="utf-8"), str(run.recipe_file))
    changed = changes_between(old, recipe)
    if changed:
        raise RunFolderError(
            f"the run in {run.folder} was started with another recipe ({'; '.join(changed[:5])})",
            hint=f"resume with the recipe it was started with ({run.recipe_file} shows it), or choose another "
            "output_dir",
        )


def changes_between(old: Recipe, recipe: Recipe, may_differ: tuple[str, ...] = _MAY_DIFFER) -> list[str]:
    """What differs between the recipe of a run and the one it is to go on with, as "key: before → now".

    Args:
        old: as it was written: without secrets, and with the home folder as "~".
        may_differ: how the keys begin that change neither the data nor the mathematics.
    """
    if old.tasks or recipe.tasks:
        return _changes_of_tasks(old, recipe)
    before, now = (_flat(redacted_values(r.model_dump(mode="json"))) for r in (old, recipe))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changed = [key for key in changed if not key.startswith(may_differ) and not _DATA_PATH.fullmatch(key)]
    rows_before, rows_now = (r.rows_per_step for r in (old, recipe))
    # Rows that do not fill a batch are dropped with dataloader_drop_last: other ones with another split.
    if rows_before == rows_now and not recipe.training.dataloader_drop_last:
        changed = [key for key in changed if key not in _SPLIT]
    elif rows_before != rows_now:
        changed = ["rows of a step", *changed]
        before["rows of a step"], now["rows of a step"] = rows_before, rows_now
    return [f"{key}: {before.get(key)} → {now.get(key)}" for key in changed]


def _changes_of_tasks(old: Recipe, new: Recipe) -> list[str]:
    before, now = ([task.name for task in recipe.tasks] for recipe in (old, new))
    if before != now:
        return [f"tasks: {', '.join(before) or 'none'} → {', '.join(now) or 'none'}"]
    changed = []
    if old.shared or new.shared:  # then their order is part of the result
        weights = ([task.weight for task in recipe.tasks] for recipe in (old, new))
        pairs = {"shared": (old.shared, new.shared), "weights": tuple(weights)}
        changed = [f"{key}: {a} → {b}" for key, (a, b) in pairs.items() if a != b]
    parts = zip(task_recipes(old).items(), task_recipes(new).values(), strict=True)
    return changed + [f"{name}: {change}" for (name, a), b in parts for change in changes_between(a, b)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
