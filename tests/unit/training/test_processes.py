"""What the environment says about processes, and what a recipe makes of it."""

from __future__ import annotations

import pytest
from helpers import make_recipe

from qhybrid.errors import RecipeError
from qhybrid.training.processes import Place, _first_host, is_launched, place, with_processes

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NTASKS": "8",
}  # fmt: skip


def test_who_this_process_is():
    assert place({}) == Place() and place({}).is_main and not is_launched({})
    assert place(TORCHRUN) == Place(3, 4, 1, 2) and is_launched(TORCHRUN)
    assert place(SLURM) == Place(5, 8, 1, 4) and is_launched(SLURM)
    # torchrun inside of a Slurm step: torchrun knows better.
    assert place({**SLURM, **TORCHRUN}) == Place(3, 4, 1, 2)


def test_a_batch_script_is_one_process():
    """Slurm sets SLURM_PROCID and SLURM_NTASKS outside of srun as well."""
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert place(script) == Place() and not is_launched(script)


@pytest.mark.parametrize(
    "wrong", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}]
)
def test_contradictions_are_refused(wrong):
    with pytest.raises(RecipeError, match="launcher"):
        place(wrong)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,9],big1", "gpu03"),
        ("gpu7", "gpu7"),
        ("a1,a2", "a1"),
        ("n-[1,3]", "n-1"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert _first_host(nodes) == first


def test_the_launchers_number_counts():
    recipe = make_recipe()
    assert with_processes(recipe, {}) == recipe
    assert with_processes(recipe, TORCHRUN).distributed.processes == 4
    four = make_recipe(distributed={"processes": 4})
    assert with_processes(four, TORCHRUN) == four
    # Another number than the recipe's would be another batch.
    with pytest.raises(RecipeError, match="launcher started 4") as caught:
        with_processes(make_recipe(distributed={"processes": 2}), TORCHRUN)
    assert "distributed.processes=4" in caught.value.hint
