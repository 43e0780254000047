"""Gradients that DeepSpeed shards are preconditioned as one process does it, for every kind of band."""

from __future__ import annotations

import json

import pytest
from conftest import case, largest_difference, launch_cases
from helpers import LoadedRecipe, parse_recipe
from rich.console import Console

from qhybrid.training.sft import run_sft

TRAINING = {"max_steps": 5, "preconditioner": "riemannian", "use_cpu": True}


def recipe(name, folder, model, batch, **distributed):
    sections = {"distributed": distributed} if distributed else {}
    training = {**TRAINING, "per_device_train_batch_size": batch}
    adapter = {"path": str(model), "dtype": "float32", "adapter_dtype": "float32"}
    return case(name, folder, model, model=adapter, training=training, **sections)


@pytest.mark.parametrize("stages", [(2, 3), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_two_processes_are_one(folder, tiny_model_folder, stages):
    root = folder / f"preconditioner-{stages[0]}"
    cases = [recipe(f"zero{stage}", root, tiny_model_folder, 2, processes=2, zero_stage=stage) for stage in stages]
    outcomes = launch_cases(root, cases, 2)
    assert set(outcomes.values()) == {"works"}
    alone = recipe("alone", root, tiny_model_folder, 4)
    run_sft(
        LoadedRecipe(parse_recipe(json.dumps(alone["recipe"]), "r")[0], root / "r.yaml"),
        console=Console(quiet=True),
    )
    for name in outcomes:
        difference = largest_difference(root / "alone", root / name)
        assert difference["loss"] < 1e-5 and difference["grad_norm"] < 1e-3 and difference["adapter"] < 1e-4
