"""A small sweep, and what two sweeps that are one must have in common."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from helpers import chat_rows, write_rows

from qhybrid.recipe.yaml_source import dump_yaml
from qhybrid.sweep.results import SweepResults


def sweep_recipe(folder: Path, model: Path, training: dict[str, Any] | None = None, **sweep: Any) -> Path:
    """Writes a recipe file with its data: two arms, two rates, two seeds, runs of six steps."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", chat_rows(32))
    write_rows(folder / "eval.jsonl", chat_rows(8, seed=99))
    values = {
        "model": {"path": str(model), "dtype": "float32"},
        "adapters": [{"rank": 4}],
        "data": {"sources": str(folder / "train.jsonl"), "eval_sources": str(folder / "eval.jsonl")},
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "save_strategy": "steps",
            "save_steps": 2,
            "logging_steps": 1,
            "max_length": 64,
            **(training or {}),
        },
        "sweep": {
            "rank": 4,
            "arms": ["uniform", "adalora-increasing"],
            "learning_rates": [1e-3, 5e-3],
            "seeds": [0, 1],
            **sweep,
        },
        "output_dir": str(folder / "unused"),
    }
    file = folder / "recipe.yaml"
    file.write_text(dump_yaml(values))
    return file


def figures_of(results: SweepResults) -> dict[str, Any]:
    """The results without what differs from one moment to the next: time, memory, and the front made of them."""
    content = dataclasses.asdict(results)
    for one in (*content["arms"], *content["runs"]):
        for name in ("seconds", "other_seconds", "peak_bytes", "is_on_front"):
            one.pop(name, None)
    return content
