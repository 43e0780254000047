"""Starting runs in several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import run_recipe
from safetensors.torch import load_file

from qhybrid.training.events import read_events

DRIVER = Path(__file__).parent / "driver.py"


def launch_cases(folder: Path, cases: list[dict[str, Any]], processes: int) -> dict[str, str]:
    """Run `cases` (see driver.py) in so many processes; what became of each by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, str(DRIVER), str(folder / "cases.json")]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60 + 30 * len(cases),
    )
    outcomes = folder / "outcomes.json"
    assert outcomes.is_file(), done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(outcomes.read_text())


def case(name: str, folder: Path, model_folder: Path, **sections: Any) -> dict[str, Any]:
    """One case: a recipe on the tiny model, its data in `folder`/data and its run in `folder`/`name`."""
    loaded = run_recipe(folder / "data", model_folder, output_dir=str(folder / name), **sections)
    recipe = loaded.recipe.model_dump(mode="json", exclude_defaults=True)
    return {"name": name, "recipe": recipe}


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """The last record of every step."""
    return {record["step"]: record for record in read_events(run / "events.jsonl", "step")}


def largest_difference(one: Path, other: Path) -> dict[str, float]:
    """Between two runs: of the losses and gradient norms of all steps, and of the adapters' values."""
    first, second = steps_of(one), steps_of(other)
    assert first.keys() == second.keys()
    weights = [load_file(run / "adapter" / "adapter.safetensors") for run in (one, other)]
    return {
        **{key: max(abs(first[step][key] - second[step][key]) for step in first) for key in ("loss", "grad_norm")},
        "adapter": max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]),
    }


def allocations_of(run: Path) -> list[tuple[int, str, dict[str, int]]]:
    """Every choice that AdaLoRA's allocators made."""
    return [(a["step"], a["band"], a["live_ranks"]) for a in read_events(run / "events.jsonl", "allocation")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this session lie."""
    return tmp_path_factory.mktemp("distributed")
