"""Runs of the tiny model that the tests of faults share, and what one must have in common with another."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from helpers import THREE_BANDS, run_recipe
from rich.console import Console

from qhybrid.recipe.load import LoadedRecipe
from qhybrid.training.checkpoint import step_of, verify
from qhybrid.training.events import read_events
from qhybrid.training.sft import SftResult, run_sft

QUIET = Console(quiet=True)
# DoRA takes no dropout.
WITH_DROPOUT = [{**band, "dropout": 0.1} if band["kind"] != "dora" else band for band in THREE_BANDS]
EXACT = ("loss", "grad_norm", "learning_rates", "tokens", "regularizer", "live_ranks")
# Five steps in an epoch. At every second step an evaluation of four batches, and then a checkpoint.
EVALUATING = {
    "max_steps": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For small tensors the threads of torch cost more than they gain, most of all where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(loaded: LoadedRecipe, *, console: Console = QUIET, **options: Any) -> SftResult:
    """`run_sft`, in one thread."""
    with one_thread():
        return run_sft(loaded, console=console, **options)


def recipe_in(folder: Path, model: Path, training: dict[str, Any] | None = None, **others: Any) -> LoadedRecipe:
    """Three bands with dropout, trained as `EVALUATING` says but for what `training` changes."""
    settings = {"rows": 20, "adapters": WITH_DROPOUT, **others}
    given = {**EVALUATING, **(training or {})}
    given = {key: value for key, value in given.items() if value is not None}
    return run_recipe(folder, model, training=given, **settings)


def moved_to(folder: Path, loaded: LoadedRecipe, run: Path | None = None) -> LoadedRecipe:
    """The recipe with `folder` as its output, which becomes a copy of `run` if that is given."""
    if run is not None:
        shutil.copytree(run, folder)
        for name in ("recipe.yaml", "run.json"):
            file = folder / name
            file.write_text(file.read_text().replace(str(run), str(folder)))
    recipe = loaded.recipe.model_copy(update={"output_dir": str(folder)})
    return LoadedRecipe(recipe, loaded.path)


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """What was logged of every step, which was logged once."""
    steps = read_events(run / "events.jsonl", "step")
    numbers = [record["step"] for record in steps]
    assert len(set(numbers)) == len(numbers), f"steps were taken twice: {numbers}"
    return {record["step"]: record for record in steps}


def forget_repeats(run: Path) -> None:
    """Leave out of the log what was logged again after a crash, which must have been the same."""
    first: dict[tuple[str, int], dict[str, Any]] = {}
    kept = []
    for line in (run / "events.jsonl").read_text().splitlines():
        record = json.loads(line)
        key = (record["event"], record.get("step", 0))
        if key[0] in ("step", "allocation", "evaluation") and key in first:
            assert all(record.get(name) == first[key].get(name) for name in (*EXACT, "eval_loss")), key
            continue
        first[key] = record
        kept.append(line)
    (run / "events.jsonl").write_text("\n".join(kept) + "\n")


def evaluations_of(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every evaluation, in the order they were made."""
    return [(record["step"], record["eval_loss"]) for record in read_events(run / "events.jsonl", "evaluation")]


def allocations_of(run: Path) -> list[tuple[int, dict[str, int]]]:
    return [(record["step"], record["live_ranks"]) for record in read_events(run / "events.jsonl", "allocation")]


def status_of(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["status"]


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def checkpoints_of(run: Path) -> list[Path]:
    """All checkpoints, which must be whole, from the oldest to the newest; nothing else may lie beside them."""
    found = sorted((run / "checkpoints").iterdir(), key=step_of) if (run / "checkpoints").is_dir() else []
    for folder in found:
        assert step_of(folder) > 0, f"{folder.name} was left"
        assert verify(folder) is None
    return found


def assert_same(run: Path, whole: Path) -> None:
    """A run that was interrupted and went on is the uninterrupted one, to the last bit."""
    steps, expected = steps_of(run), steps_of(whole)
    assert list(steps) == list(expected)
    for number, record in expected.items():
        for key in EXACT:
            assert steps[number].get(key) == record.get(key), (number, key)
    assert evaluations_of(run) == evaluations_of(whole)
    assert allocations_of(run) == allocations_of(whole)
    assert status_of(run) == status_of(whole) == "finished"
    for name in ("adapter.safetensors", "peft/lora/adapter_model.safetensors"):
        assert (run / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    one, other = (json.loads((folder / "run.json").read_text())["figures"] for folder in (run, whole))
    for name in ("optimizer_steps", "first_loss", "eval_loss", "adapter_of_step", "live_ranks"):
        assert one.get(name) == other.get(name), name
