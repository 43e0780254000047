"""The run folder: who owns it, what state it is in, and where everything in it lies.

run.json         status and versions            recipe.yaml   the resolved recipe
layout.json      one row for each module        audit.json    what became of every data row
events.jsonl     one line for each step         checkpoints/  to resume from
adapter/         the result
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from qhybrid.errors import RunFolderError
from qhybrid.recipe.load import dump_recipe, parse_recipe
from qhybrid.recipe.schema import Recipe
from qhybrid.training.checkpoint import newest_sealed
from qhybrid.training.events import read_events

Status = Literal["running", "finished", "failed"]
LIBRARIES = ("qhybrid", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class Run:
    """One run folder. `resume_from` is the checkpoint to go on from, or None for a fresh start."""

    folder: Path
    resume_from: Path | None = None

    recipe_file = property(lambda self: self.folder / "recipe.yaml")
    layout_file = property(lambda self: self.folder / "layout.json")
    audit_file = property(lambda self: self.folder / "audit.json")
    events_file = property(lambda self: self.folder / "events.jsonl")
    checkpoints = property(lambda self: self.folder / "checkpoints")
    adapter = property(lambda self: self.folder / "adapter")

    def write_status(self, status: Status, **facts: Any) -> None:
        """Record the run's state in run.json, in one step."""
        content = {"format_version": 1, "status": status, "versions": versions(), **facts}
        write_atomically(self.folder / "run.json", json.dumps(content, indent=2) + "\n")

    @property
    def status(self) -> dict[str, Any] | None:
        """The content of run.json, or None where there is none."""
        try:
            content = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None


def claim(recipe: Recipe, *, resume: bool, overwrite: bool) -> Run:
    """Take the recipe's output_dir for a run, without ever losing what lies there.

    Args:
        resume: go on from the newest sealed checkpoint if there is one; start afresh in an empty folder.
        overwrite: remove an earlier run of qhybrid in that folder first.

    Raises:
        RunFolderError: as `check_claim`.
    """
    must_go = check_claim(recipe, resume=resume, overwrite=overwrite)
    run = Run(Path(recipe.output_dir))
    try:
        if must_go:
            shutil.rmtree(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"output_dir {run.folder} cannot be written: {error.strerror}") from None
    return Run(run.folder, resume_from=newest_sealed(run.checkpoints) if resume else None)


def check_claim(recipe: Recipe, *, resume: bool, overwrite: bool) -> bool:
    """Whether what lies in output_dir has to go before a run can begin there. Changes nothing.

    Raises:
        RunFolderError: a foreign folder, a finished or interrupted run without leave to touch it, or a run
            of another recipe to be resumed.
    """
    run = Run(Path(recipe.output_dir))
    if run.folder.exists() and not run.folder.is_dir():
        raise RunFolderError(f"output_dir {run.folder} is a file", hint="choose another output_dir")
    if not run.folder.exists() or not any(run.folder.iterdir()):
        return False
    status = run.status
    if status is None:
        raise RunFolderError(
            f"output_dir {run.folder} holds files that are not from a run of qhybrid",
            hint="choose another output_dir; nothing was changed",
        )
    if overwrite or (status["status"] != "finished" and not _has_trained(run)):
        return True
    if not resume:
        state = "a finished run" if status["status"] == "finished" else "an unfinished run"
        raise RunFolderError(
            f"output_dir {run.folder} holds {state}",
            hint="go on with --resume auto, replace it with --overwrite, or choose another output_dir",
        )
    _same_recipe(run, recipe)
    return False


def _has_trained(run: Run) -> bool:
    """Whether the run took a step: one that stopped before has nothing to lose."""
    if run.adapter.exists() or (run.checkpoints.is_dir() and any(run.checkpoints.iterdir())):
        return True
    return run.events_file.is_file() and bool(read_events(run.events_file, "step"))


# What may differ between a run and its resumption: it changes neither the data nor the mathematics.
_MAY_DIFFER = {
    "training.logging_steps", "training.report_to", "training.run_name", "training.save_total_limit",
    "memory.vram",
}  # fmt: skip


def _same_recipe(run: Run, recipe: Recipe) -> None:
    if not run.recipe_file.is_file():
        return
    old, _ = parse_recipe(run.recipe_file.read_text(encoding="utf-8"), str(run.recipe_file))
    before, now = (_flat(r.model_dump(mode="json")) for r in (old, recipe))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changed = [key for key in changed if key not in _MAY_DIFFER]
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)} → {now.get(key)}" for key in changed[:5])
        raise RunFolderError(
            f"the run in {run.folder} was started with another recipe ({shown})",
            hint=f"resume with its own recipe, {run.recipe_file}, or choose another output_dir",
        )


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


def begin(run: Run, recipe: Recipe) -> None:
    """Write what is known before training; the recipe first, so that an interrupted start can be resumed."""
    write_atomically(run.recipe_file, dump_recipe(recipe))
    run.write_status("running")


def versions() -> dict[str, str]:
    """The installed versions of the libraries that a result depends on."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def write_atomically(file: Path, text: str) -> None:
    """Write `text` so that a reader sees the old content or the new, never a part."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
