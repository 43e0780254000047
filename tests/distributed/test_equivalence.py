"""Two processes with micro-batches of b are one process with 2b: the same losses, masks and adapters.

In fp32, on NF4, three bands (LoRA+, AdaLoRA, DoRA), 24 steps over epochs' edges whose last batches are not full.
The setups that are left out by default (one stage or direction is much like the next) run with --all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import allocations_of, case, largest_difference, launch_cases, steps_of
from helpers import LoadedRecipe, cut_back, parse_recipe
from rich.console import Console

from qhybrid.training.sft import run_sft

LOSS, NORM, ADAPTER = 1e-5, 1e-4, 1e-4  # Adam's first steps divide by gradients near zero, so weights differ more
# In stages 1 to 3 with offload, DeepSpeed takes the norm for clipping before AdaLoRA's regulariser is added.
OFFLOADED_NORM = 5e-3
SETUPS = {
    "ddp": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero2_offload": {"zero_stage": 2, "offload": "optimizer"},
    "zero3_offload": {"zero_stage": 3, "offload": "all"},
}
TRAINING = {
    "max_steps": 24,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 8,
    "eval_strategy": "steps",
    "eval_steps": 12,
    "weight_decay": 0.1,
    "use_cpu": True,
}


def recipe(name: str, folder: Path, model: Path, batch: int = 2, accumulation: int = 2, **distributed):
    training = {**TRAINING, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    sections = {"distributed": distributed} if distributed else {}
    adapter = {"path": str(model), "dtype": "float32", "adapter_dtype": "float32"}
    return case(name, folder, model, rows=159, eval_rows=7, model=adapter, training=training, **sections)


def run_here(one: dict, *, resume: bool = False) -> Path:
    loaded = LoadedRecipe(parse_recipe(json.dumps(one["recipe"]), one["name"])[0], Path("r.yaml"))
    return run_sft(loaded, resume=resume, console=Console(quiet=True)).run.folder


@pytest.fixture(scope="module")
def alone(folder, tiny_model_folder) -> Path:
    """One process with micro-batches of 4."""
    return run_here(recipe("alone", folder, tiny_model_folder, batch=4))


@pytest.fixture(scope="module")
def pairs(request, folder, tiny_model_folder, alone) -> dict[str, str]:
    """Two processes with micro-batches of 2, in every setup; and runs of one that go on with two."""
    every = request.config.getoption("--all")
    setups = SETUPS if every else {name: SETUPS[name] for name in ("zero2", "zero3_offload")}
    cases = [recipe(name, folder, tiny_model_folder, processes=2, **setup) for name, setup in setups.items()]
    for name in ("ddp", "zero2", "zero3") if every else ("ddp",):
        resumed = recipe(f"one_to_{name}", folder, tiny_model_folder, processes=2, **SETUPS[name])
        cases.append({**resumed, "fill": str(alone), "cut": 8})
    resumed = recipe("zero2_again", folder, tiny_model_folder, processes=2, **SETUPS["zero2"])
    cases.append({**resumed, "fill": str(folder / "zero2"), "cut": 16})
    # Killed between the last checkpoint and the adapter: nothing is left to train.
    resumed = recipe("zero2_at_end", folder, tiny_model_folder, processes=2, **SETUPS["zero2"])
    cases.append({**resumed, "fill": str(folder / "zero2"), "cut": 24})
    resumed = recipe("zero3_at_end", folder, tiny_model_folder, processes=2, **SETUPS["zero3_offload"])
    cases.append({**resumed, "fill": str(folder / "zero3_offload"), "cut": 24})
    resumed = recipe("zero3_to_zero2", folder, tiny_model_folder, processes=2, **SETUPS["zero2"])
    cases.append({**resumed, "fill": str(folder / "zero3_offload"), "cut": 16})
    return launch_cases(folder / "pairs", cases, 2)


def unless_all(names, by_default):
    return [pytest.param(name, marks=[] if name in by_default else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", unless_all(SETUPS, ("zero2", "zero3_offload")))
def test_two_processes_are_one(pairs, alone, folder, name):
    assert pairs[name] == "works"  # the same adapters, scores and masks in both processes, too
    difference = largest_difference(alone, folder / name)
    assert difference["loss"] < LOSS and difference["adapter"] < ADAPTER
    assert difference["grad_norm"] < (OFFLOADED_NORM if "offload" in name else NORM)
    assert allocations_of(alone) == allocations_of(folder / name) != []
    one, two = steps_of(alone), steps_of(folder / name)
    assert all(one[step]["learning_rates"] == two[step]["learning_rates"] for step in one)
    assert all(abs(one[step]["regularizer"] - two[step]["regularizer"]) < 1e-6 for step in one)


RESUMED = (
    "one_to_ddp", "one_to_zero2", "one_to_zero3", "zero2_again", "zero3_to_zero2", "zero2_at_end", "zero3_at_end",
)  # fmt: skip


@pytest.mark.parametrize("name", unless_all(RESUMED, set(RESUMED) - {"one_to_zero2", "one_to_zero3"}))
def test_a_run_goes_on_in_two_processes(pairs, alone, folder, name):
    assert pairs[name] == "works"
    difference = largest_difference(alone, folder / name)
    assert difference["loss"] < LOSS and difference["adapter"] < ADAPTER
    assert allocations_of(alone) == allocations_of(folder / name)


def test_a_resumed_run_of_two_equals_the_uninterrupted_one(pairs, folder):
    one, other = steps_of(folder / "zero2"), steps_of(folder / "zero2_again")
    assert [r["loss"] for r in one.values()] == [r["loss"] for r in other.values()]
    name = "adapter/adapter.safetensors"
    assert (folder / "zero2" / name).read_bytes() == (folder / "zero2_again" / name).read_bytes()


@pytest.mark.parametrize("name", unless_all(("ddp", "zero1", "zero2", "zero3"), ("zero2",)))
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4)])
def test_a_run_of_two_goes_on_in_one(pairs, alone, folder, tiny_model_folder, name, batch, accumulation):
    one = recipe(f"{name}_to_one_{batch}", folder, tiny_model_folder, batch, accumulation)
    target = cut_back(folder / name, Path(one["recipe"]["output_dir"]), 8)
    assert run_here(one, resume=True) == target
    difference = largest_difference(alone, target)
    assert difference["loss"] < LOSS and difference["adapter"] < ADAPTER


@pytest.mark.slow
def test_one_process_with_zero(folder, tiny_model_folder, alone):
    """What is done on one GPU to offload the optimizer."""
    cases = [
        recipe("single_zero2", folder, tiny_model_folder, batch=4, processes=1, **SETUPS["zero2_offload"]),
        recipe("single_zero3", folder, tiny_model_folder, batch=4, processes=1, **SETUPS["zero3"]),
    ]
    outcomes = launch_cases(folder / "single", cases, 1)
    assert outcomes == {"single_zero2": "works", "single_zero3": "works"}
    for name in outcomes:
        assert largest_difference(alone, folder / name)["loss"] < LOSS
