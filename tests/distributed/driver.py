"""Runs several recipes one after another in the processes that torchrun started: imports are paid for once.

Usage: torchrun … driver.py CASES.json       a list of {"name", "recipe"}, and for a resumed run {"fill", "cut"}

outcomes.json beside it tells what became of each: "works", "refused: …" or "failed: …", and whether all processes
held the same adapters and masks at the end. "fill" is an earlier run's folder, copied as a crash after step "cut"
would have left it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from helpers import cut_back
from rich.console import Console

from qhybrid.adapters.folder import trained_tensors
from qhybrid.cli.main import quiet_libraries
from qhybrid.errors import QhybridError
from qhybrid.recipe.load import LoadedRecipe, parse_recipe
from qhybrid.training import session, sft
from qhybrid.training.processes import gather, place

_trainers: list[Any] = []


class _KeptTrainer(session.BandedTrainer):
    """Can be looked at after the run."""

    def train(self, *args, **kwargs):
        _trainers[:] = [self]
        return super().train(*args, **kwargs)


def _state_of_this_process() -> list[float]:
    """Sums that tell one set of adapters and masks from another."""
    (trainer,) = _trainers
    values = [float(p.detach().double().sum()) for p in trained_tensors(trainer.model, trainer.layout).values()]
    scores = [float(v.double().sum()) for a in trainer.allocators for v in a.state_dict().values()]
    return values + scores


def _run(case: dict[str, Any], file: Path) -> str:
    recipe, _ = parse_recipe(json.dumps(case["recipe"]), case["name"])
    if "fill" in case and place().is_main:
        cut_back(Path(case["fill"]), Path(recipe.output_dir), case["cut"])
    gather(None)
    try:
        sft.run_sft(LoadedRecipe(recipe, file), resume="fill" in case, console=Console(quiet=True))
    except QhybridError as error:
        return f"refused: {error.message}"
    states = gather(_state_of_this_process())
    return "works" if all(state == states[0] for state in states) else "failed: the processes differ at the end"


def main() -> None:
    torch.set_num_threads(1)
    quiet_libraries()
    session.BandedTrainer = _KeptTrainer
    file = Path(sys.argv[1])
    cases = json.loads(file.read_text())
    torch.distributed.init_process_group("gloo")  # kept from case to case
    outcomes = {}
    for case in cases:
        try:
            outcomes[case["name"]] = _run(case, file)
        except Exception:
            outcomes[case["name"]] = f"failed: {traceback.format_exc()}"
            break  # the processes may no longer be at the same place
    if place().is_main:
        file.with_name("outcomes.json").write_text(json.dumps(outcomes))
    os._exit(0)  # without tearing down what a failed case left


if __name__ == "__main__":
    main()
