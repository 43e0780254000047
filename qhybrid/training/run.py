"""The run folder: what state it is in, and where everything in it lies.

run.json         status and versions            recipe.yaml   the resolved recipe
layout.json      one row for each module        audit.json    what became of every data row
events.jsonl     one line for each step         checkpoints/  to resume from
adapter/         the result                      plan.json     the memory it should take
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil

from qhybrid.errors import RunFolderError
from qhybrid.recipe.load import dump_recipe
from qhybrid.recipe.schema import Recipe

Status = Literal["running", "finished", "failed", "interrupted"]
LIBRARIES = ("qhybrid", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class Run:
    """One run folder. `resume_from` is the checkpoint to go on from, or None for a fresh start."""

    folder: Path
    resume_from: Path | None = None

    recipe_file = property(lambda self: self.folder / "recipe.yaml")
    layout_file = property(lambda self: self.folder / "layout.json")
    plan_file = property(lambda self: self.folder / "plan.json")
    audit_file = property(lambda self: self.folder / "audit.json")
    events_file = property(lambda self: self.folder / "events.jsonl")
    checkpoints = property(lambda self: self.folder / "checkpoints")
    adapter = property(lambda self: self.folder / "adapter")

    def write_status(self, status: Status, **facts: Any) -> None:
        """Record the run's state in run.json, in one step."""
        process = psutil.Process()
        before = self.status or {}
        content = {
            "format_version": 1,
            "status": status,
            "versions": versions(),
            "process": {"pid": process.pid, "started": process.create_time()},
            "date": before.get("date"),
            "data_fingerprint": before.get("data_fingerprint"),
            **facts,
        }
        write_atomically(self.folder / "run.json", json.dumps(content, indent=2) + "\n")

    @property
    def status(self) -> dict[str, Any] | None:
        """The content of run.json, or None where there is none of qhybrid's."""
        try:
            content = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or not isinstance(content.get("versions"), dict):
            return None
        return content if "status" in content and "qhybrid" in content["versions"] else None


def begin(run: Run, recipe: Recipe, data_fingerprint: str, date: str) -> None:
    """Write what is known before training.

    Args:
        data_fingerprint: of the rows to train and to evaluate on.
        date: what chat templates that write the date were told (ISO 8601).

    Raises:
        RunFolderError: the run that is to be resumed was trained on other rows.
    """
    before = (run.status or {}).get("data_fingerprint")
    if run.resume_from is not None and before not in (None, data_fingerprint):
        raise RunFolderError(
            f"the data of the run in {run.folder} has changed since it was started",
            hint="bring the old data files back, or start a new run in another output_dir; a chat template that "
            "reckons with the date makes other rows each day",
        )
    write_atomically(run.recipe_file, dump_recipe(recipe))
    run.write_status("running", data_fingerprint=data_fingerprint, date=date)


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
