"""Tasks whose adapters are shaped by schedules, data and stages: as runs of their own, resumed as well."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from task_helpers import alone, at_step, sigterm, tasks_recipe

from qhybrid.architecture.layout import Layout
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft
from qhybrid.training.signals import Interrupted

QUIET = Console(quiet=True)
# Of DoRA's band one module grows after step 3, and the lowest band stands still from step 5 on.
STAGES = [
    {"name": "grow", "at": 3, "expand": {"bands": ["high"], "to": 8, "top": 1}},
    {"name": "still", "at": 5, "freeze": "low"},
]
OF_TASKS = {
    "bands": {"stages": STAGES},
    "rs": {"adapters": {"ranks": {"method": "gora", "rows": 4}, "kind": "rslora", "rank": 4}},
    "ada": {"adapters": {"schedule": "increasing", "kind": "lora", "rank": 4}},
}


def changing(folder, model, *names: str, **changes) -> LoadedRecipe:
    """Tasks with stages, with ranks from data and with a schedule."""
    return tasks_recipe(folder, model, *names, of_tasks=OF_TASKS, **changes)


def layout_of(folder) -> Layout:
    return Layout.from_json((folder / "layout.json").read_bytes(), str(folder))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_folder):
    """All three, trained together."""
    loaded = changing(tmp_path_factory.mktemp("changing"), tiny_model_folder)
    return run_sft(loaded, console=QUIET)


@pytest.mark.parametrize("name", list(OF_TASKS))
def test_each_is_a_run_of_its_own_to_the_last_bit(trained, tmp_path, name):
    task = trained.tasks[name].run.folder
    own = run_sft(alone(task, tmp_path / "alone"), console=QUIET).run.folder
    one, other = tensors_of(task), tensors_of(own)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)
    assert layout_of(task) == layout_of(own)
    for event in ("ranks", "stage", "importance", "spectra"):
        together, separate = (read_events(folder / "events.jsonl", event) for folder in (task, own))
        assert len(together) == len(separate)
        for a, b in zip(together, separate, strict=True):
            assert {k: v for k, v in a.items() if k != "time"} == {k: v for k, v in b.items() if k != "time"}


def test_the_ranks_are_what_each_asked_for(trained):
    folders = {name: result.run.folder for name, result in trained.tasks.items()}
    ranks = {name: [row.rank for row in layout_of(folder)] for name, folder in folders.items()}
    assert len(set(ranks["rs"])) > 1 and len(read_events(folders["rs"] / "events.jsonl", "ranks")) == 1
    assert ranks["ada"] == sorted(ranks["ada"]) and ranks["ada"][0] < ranks["ada"][-1]
    begun = read_events(folders["bands"] / "events.jsonl", "stage")
    assert [(stage["stage"], stage["step"], stage["frozen"]) for stage in begun] == [
        ("grow", 3, []), ("still", 5, ["low"]),
    ]  # fmt: skip
    assert 8 in {row.rank for row in layout_of(folders["bands"]).of_band("high")}


def test_a_resumed_run_has_the_ranks_of_its_checkpoint(trained, tmp_path, tiny_model_folder, monkeypatch):
    """The signal comes after ranks were decided and the first stage has begun."""
    loaded = changing(tmp_path, tiny_model_folder)
    with monkeypatch.context() as patched:
        at_step(patched, "bands", 5, sigterm)
        with pytest.raises(Interrupted):
            run_sft(loaded, console=QUIET)
    resumed = run_sft(loaded, resume=True, console=QUIET)
    for name, result in resumed.tasks.items():
        one, other = tensors_of(result.run.folder), tensors_of(trained.tasks[name].run.folder)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other), name
    events = tmp_path / "run" / "tasks" / "rs" / "events.jsonl"
    assert len(read_events(events, "ranks")) == 1  # not decided again
