"""What DeepSpeed shards is preconditioned and measured as one process does it, for every kind of band."""

from __future__ import annotations

import json

import pytest
from conftest import case, largest_difference, launch_cases
from helpers import LoadedRecipe, parse_recipe
from rich.console import Console

from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft

TRAINING = {"max_steps": 5, "preconditioner": "riemannian", "max_grad_norm": 0.5, "use_cpu": True}
SETUPS = {
    "ddp": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero2_offload": {"zero_stage": 2, "offload": "optimizer"},
    "zero3_offload": {"zero_stage": 3, "offload": "all"},
}
BY_DEFAULT = ("zero2", "zero3_offload")


def recipe(name, folder, model, batch, **distributed):
    sections = {"distributed": distributed} if distributed else {}
    training = {**TRAINING, "per_device_train_batch_size": batch}
    adapter = {"path": str(model), "dtype": "float32", "adapter_dtype": "float32"}
    return case(
        name, folder, model, model=adapter, training=training, monitoring={"spectrum_steps": 2}, **sections
    )


def nearly_equal(one, other) -> bool:
    """Of spectra the norms, of importance the averages; as near as the adapters are."""
    values = [{name: m["norm"] if isinstance(m, dict) else m for name, m in each.items()} for each in (one, other)]
    return values[0] == pytest.approx(values[1], rel=1e-2, abs=1e-6)


def test_two_processes_are_one(request, folder, tiny_model_folder):
    root = folder / "preconditioner"
    names = SETUPS if request.config.getoption("--all") else BY_DEFAULT
    cases = [recipe(name, root, tiny_model_folder, 2, processes=2, **SETUPS[name]) for name in names]
    outcomes = launch_cases(root, cases, 2)
    assert outcomes == dict.fromkeys(names, "works")
    alone, _ = parse_recipe(json.dumps(recipe("alone", root, tiny_model_folder, 4)["recipe"]), "alone")
    run_sft(LoadedRecipe(alone, root / "r.yaml"), console=Console(quiet=True))
    assert all(record["grad_norm"] > 0.5 for record in read_events(root / "alone" / "events.jsonl", "step"))
    for name in outcomes:
        difference = largest_difference(root / "alone", root / name)
        assert difference["loss"] < 1e-5 and difference["grad_norm"] < 1e-3 and difference["adapter"] < 1e-4
        for event in ("spectra", "importance"):  # written once, by the first process
            one, other = (read_events(root / run / "events.jsonl", event) for run in ("alone", name))
            assert [told["step"] for told in one] == [told["step"] for told in other] == [2, 4, 5]
            assert all(nearly_equal(o["modules"], t["modules"]) for o, t in zip(one, other, strict=True))
