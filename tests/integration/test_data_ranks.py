"""Runs whose ranks come from the data: one budget, written down, and kept when the run is resumed."""

from __future__ import annotations

import pytest
from helpers import cut_back, run_recipe
from rich.console import Console
from safetensors.torch import load_file

from qhybrid.adapters.folder import read_plain
from qhybrid.architecture.layout import Layout
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft

QUIET = Console(quiet=True)
BANDS = [{"layers": "0-2", "kind": "lora", "rank": 4}, {"layers": "3-5", "kind": "dora", "rank": 6, "alpha": 12}]


def trained(folder, model, adapters, **training):
    loaded = run_recipe(
        folder,
        model,
        adapters=adapters,
        training={"save_strategy": "steps", "save_steps": 4, "max_steps": 8, **training},
    )
    return loaded, run_sft(loaded, console=QUIET)


def cost(layout):
    return sum(row.rank * (row.in_features + row.out_features) for row in layout)


@pytest.mark.parametrize("method", ["gora", "eva"])
def test_ranks_from_data_on_nf4(tmp_path, tiny_model_folder, method):
    loaded, result = trained(
        tmp_path, tiny_model_folder, {"ranks": {"method": method, "rows": 16}, "bands": BANDS}
    )
    layout = Layout.from_json(result.run.layout_file.read_bytes())
    (event,) = read_events(result.run.events_file, "ranks")
    assert event["ranks"] == {row.module: row.rank for row in layout} and len(set(event["ranks"].values())) > 3
    budget = sum(
        (4 if row.layer < 3 else 6) * (row.in_features + row.out_features) for row in layout
    )  # what the bands' own ranks cost
    assert event["budget"] == budget and budget - 160 < cost(layout) <= budget
    assert {row.init for row in layout} == {method}
    assert all(row.scaling == (2 if row.kind == "lora" else 12 / row.rank) for row in layout)
    for module in read_plain(result.run.adapter).modules:
        assert module.a.shape[0] == event["ranks"][module.module]
    means = {name: sum(some) / len(some) for name, some in (
        ("important", [event["importance"][row.module] for row in layout if row.rank >= 6]),
        ("rest", [event["importance"][row.module] for row in layout if row.rank <= 3]),
    )}  # fmt: skip
    if method == "gora":
        assert means["important"] > means["rest"]

    again = cut_back(result.run.folder, tmp_path / "again", 4)
    recipe = loaded.recipe.model_copy(update={"output_dir": str(again)})
    resumed = run_sft(LoadedRecipe(recipe, loaded.path), resume=True, console=QUIET)
    assert len(read_events(resumed.run.events_file, "ranks")) == 1
    assert resumed.run.layout_file.read_bytes() == result.run.layout_file.read_bytes()
    one, other = (load_file(run.adapter / "adapter.safetensors") for run in (result.run, resumed.run))
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def test_without_initial_values_only_the_ranks_come_from_the_data(tmp_path, tiny_model_folder):
    """A learning rate of next to nothing shows what the adapter started with."""
    first = {}
    for initialise in (True, False):
        adapters = {"ranks": {"method": "gora", "rows": 8, "initialise": initialise, "budget": "20k"}}
        _, result = trained(tmp_path / str(initialise), tiny_model_folder, adapters, learning_rate=1e-30)
        layout = Layout.from_json(result.run.layout_file.read_bytes())
        assert 20_000 - 160 < cost(layout) <= 20_000
        first[initialise] = {module.module: module for module in read_plain(result.run.adapter).modules}
        assert all((float(m.b.abs().max()) > 1e-12) is initialise for m in first[initialise].values())
    assert {n: len(m.a) for n, m in first[True].items()} == {n: len(m.a) for n, m in first[False].items()}
