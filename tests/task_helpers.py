"""Recipes with tasks on the tiny model, and what each task's run must have in common with a run of its own."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import THREE_BANDS, chat_rows, write_rows

from qhybrid.recipe.load import LoadedRecipe, parse_recipe
from qhybrid.training.events import read_events
from qhybrid.training.trainer import BandedTrainer

# Three tasks that differ in data, bands, kinds, rates, schedules, batches and length. DoRA takes no dropout.
BANDS = [{**band, "dropout": 0.1} if band["kind"] != "dora" else band for band in THREE_BANDS]
TASKS = [
    {
        "name": "bands",
        "weight": 2,
        "training": {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True},
    },
    {
        "name": "rs",
        "adapters": [{"band": "all", "kind": "rslora", "rank": 4, "dropout": 0.2}],
        "training": {
            "max_steps": 5,
            "learning_rate": 1e-3,
            "seed": 3,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "cosine",
            "train_sampling_strategy": "group_by_length",
        },
    },
    {
        "name": "ada",
        "weight": 0.5,
        "adapters": [{"band": "all", "kind": "adalora", "rank": 2, "adalora": {"warmup": 1, "final": 1}}],
        "training": {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 4, "max_length": 32},
    },
]


def tasks_recipe(folder: Path, model: Path, *names: str, **changes: Any) -> LoadedRecipe:
    """Those of TASKS that are named, or all, with data of their own.

    Args:
        changes: sections of the recipe; `training` is laid over that of all, `of_tasks` has sections by task.
    """
    tasks, of_tasks = [], changes.pop("of_tasks", {})
    for index, task in enumerate(TASKS):
        if names and task["name"] not in names:
            continue
        rows = write_rows(folder / f"{task['name']}.jsonl", chat_rows(16 + 4 * index, seed=index))
        held = write_rows(folder / "held.jsonl", chat_rows(6, seed=99))
        task = {**task, "training": {**task["training"], "run_name": task["name"]}}
        data = {"data": {"sources": str(rows), "eval_sources": str(held)}}
        tasks.append({**task, **data, **of_tasks.get(task["name"], {})})
    training = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 4,
        "max_length": 64,
        "seed": 0,
        **changes.pop("training", {}),
    }
    replaced = set.intersection(*(set(task.get("training", {})) for task in tasks))  # or it would have no effect
    values = {
        "model": {"path": str(model), "dtype": "float32"},
        "adapters": None if all("adapters" in task for task in tasks) else BANDS,
        "training": {key: value for key, value in training.items() if key not in replaced},
        "output_dir": str(folder / "run"),
        "tasks": tasks,
        **changes,
    }
    return LoadedRecipe(parse_recipe(json.dumps(values), "tasks")[0], folder / "recipe.yaml")


def alone(run: Path, target: Path) -> LoadedRecipe:
    """What the run folder of a task says it was trained with, as a recipe of its own."""
    text = (run / "recipe.yaml").read_text()
    recipe, _ = parse_recipe(text.replace(f"output_dir: {run}", f"output_dir: {target}"), "alone")
    assert recipe.output_dir == str(target) and not recipe.tasks
    return LoadedRecipe(recipe, run / "recipe.yaml")


def turns_of(run: Path) -> list[tuple[str, int]]:
    """Task and step of every turn."""
    return [(record["task"], record["step"]) for record in read_events(run / "events.jsonl", "turn")]


def at_step(
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    step: int,
    happen: Callable[[BandedTrainer], None],
    method: str = "training_step",
) -> None:
    """Call `happen` where a task, which has its name as run_name, begins a micro-batch of its step; once."""
    real, calls = getattr(BandedTrainer, method), []

    def watched(self, *args, **kwargs):
        if self.args.run_name == task and self.state.global_step == step - 1 and not calls:
            calls.append(step)
            happen(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(BandedTrainer, method, watched)


def sigterm(trainer: BandedTrainer) -> None:
    """As `kill` sends it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.6)  # this is not the main thread, which sees it within 0.2 seconds


def killed(trainer: BandedTrainer) -> None:
    """As a kill: nothing is saved any more."""
    raise KeyboardInterrupt


def storages(*models: torch.nn.Module) -> dict[int, int]:
    """Bytes of every piece of memory that the tensors of some models lie in, 4-bit scales included."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    for module in (module for model in models for module in model.modules()):
        state = getattr(module, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
