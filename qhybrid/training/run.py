"""The run folder: what state it is in, and where everything in it lies.

run.json         status and versions            recipe.yaml   the resolved recipe
layout.json      one row for each module        audit.json    what became of every data row
events.jsonl     one line for each step         checkpoints/  to resume from
adapter/         the result                      plan.json     the memory it should take
deepspeed.json   what DeepSpeed was told         base.json     hashes of the base model's files
report.html      what qhybrid report draws       samples.json  answers before and after, for the report
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil

from qhybrid.base.fingerprint import compare, fingerprint
from qhybrid.base.locate import weight_files
from qhybrid.disk import write_atomically
from qhybrid.errors import RunFolderError
from qhybrid.recipe.load import dump_recipe
from qhybrid.recipe.schema import Recipe

STATE = "state.json"  # in a checkpoint that can be resumed
Status = Literal["running", "finished", "failed", "interrupted"]
LIBRARIES = ("qhybrid", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        resume_from: the checkpoint to go on from, or None for a fresh start.
        notes: what the user should know of other checkpoints.
        whole: of the run of one task, the folder of the run of all, which is what was claimed.
    """

    folder: Path
    resume_from: Path | None = None
    notes: tuple[str, ...] = ()
    whole: Path | None = None
    has_own_checkpoints: bool = True  # else they are those of the run of all

    recipe_file = property(lambda self: self.folder / "recipe.yaml")
    layout_file = property(lambda self: self.folder / "layout.json")
    plan_file = property(lambda self: self.folder / "plan.json")
    audit_file = property(lambda self: self.folder / "audit.json")
    base_file = property(lambda self: self.folder / "base.json")
    deepspeed_file = property(lambda self: self.folder / "deepspeed.json")
    events_file = property(lambda self: self.folder / "events.jsonl")
    checkpoints = property(
        lambda self: (self.folder if self.has_own_checkpoints else self.claimed) / "checkpoints"
    )
    adapter = property(lambda self: self.folder / "adapter")
    claimed = property(lambda self: self.whole or self.folder)
    report_file = property(lambda self: self.folder / "report.html")
    samples_file = property(lambda self: self.folder / "samples.json")

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


def is_alive(process: dict[str, Any]) -> bool:
    """Whether the process that wrote run.json still runs; the start time tells it from a reused number."""
    try:
        other = psutil.Process(process["pid"])
        if other.status() == psutil.STATUS_ZOMBIE:  # killed, and not yet collected by its parent
            return False
        return other.pid != os.getpid() and abs(other.create_time() - process["started"]) < 1
    except (psutil.Error, KeyError, TypeError):
        return False


def begin(run: Run, recipe: Recipe, data_fingerprint: str, base: Mapping[str, Any], date: str) -> None:
    """Write what is known before training; the status first, or the folder would not be known as a run's.

    Args:
        data_fingerprint: of the rows to train and to evaluate on.
        base: what `check_base` found.
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
    run.write_status("running", data_fingerprint=data_fingerprint, date=date)
    write_atomically(run.base_file, json.dumps(base, indent=2) + "\n")
    write_atomically(run.recipe_file, dump_recipe(recipe))


def check_base(run: Run, base: Path) -> Mapping[str, Any]:
    """Hash the base model's weights, for base.json; a resumed run must have the very same. Writes nothing.

    Args:
        base: the model's folder.

    Returns:
        Size and hash of each file.

    Raises:
        RunFolderError: the weights are not those that the run was started with.
        ModelError: a file is not what the hub said it was.
    """
    now = fingerprint(weight_files(base))
    if run.resume_from is not None and run.base_file.is_file():
        before = json.loads(run.base_file.read_text(encoding="utf-8"))
        difference = compare(before, now)
        if difference is not None:
            raise RunFolderError(
                f"the base model in {base} is not what the run in {run.folder} was started with: {difference}",
                hint="bring the old files back, or start a new run in another output_dir",
            )
    return now


def versions() -> dict[str, str]:
    """The installed versions of the libraries that a result depends on."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found
