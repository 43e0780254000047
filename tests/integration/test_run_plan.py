"""What a run makes of its plan: capped ranks, refusals, predicted beside measured, layers that are recomputed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers import run_recipe
from rich.console import Console

from qhybrid.errors import MemoryPlanError
from qhybrid.planner.plan import Budget
from qhybrid.training import sft
from qhybrid.training.events import read_events
from qhybrid.training.planning import Hardware
from qhybrid.training.preflight import settle
from qhybrid.training.sft import run_sft


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch):
    """Pretend that this machine's memory for the run is a given number of bytes."""

    def pretend(vram: int) -> None:
        hardware = Hardware("cpu", Budget(vram, None, 0, "a small machine"), process_bytes=0)
        monkeypatch.setattr(sft, "hardware_of", lambda recipe: hardware)

    return pretend


def needed_at(loaded, ranks: dict[str, int]) -> int:
    from qhybrid.base.facts import model_facts
    from qhybrid.planner.plan import make_plan
    from qhybrid.planner.solve import with_ranks

    recipe = with_ranks(settle(loaded), ranks)
    spec = model_facts(recipe.model).spec
    return make_plan(recipe, spec, Budget(None), device="cpu", process_bytes=0).needed


WIDE = [
    {"band": "low", "layers": "bottom", "rank": 32},
    {"band": "mid", "layers": "middle", "kind": "adalora", "rank": 20, "adalora": {"init_rank": 30}},
    {"band": "high", "layers": "top", "kind": "dora", "rank": 32},
]


def test_a_run_caps_its_ranks_and_resumes_with_them(tmp_path: Path, tiny_model_folder: Path, small_gpu):
    training = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    loaded = run_recipe(tmp_path, tiny_model_folder, adapters=WIDE, training=training)
    got = {"low": 16, "mid": 8, "high": 16}
    small_gpu(needed_at(loaded, got))
    result = run_sft(loaded, console=Console(quiet=True))
    run = result.run
    layout = json.loads(run.layout_file.read_text())["rows"]
    ranks = {row["band"]: row["target_rank"] for row in layout}
    asked = {"low": 32, "mid": 20, "high": 32}
    assert all(4 <= ranks[band] < asked[band] for band in asked)
    stored = yaml.safe_load(run.recipe_file.read_text())
    assert {band["band"]: band["rank"] for band in stored["adapters"]} == ranks
    plan = json.loads(run.plan_file.read_text())
    assert {cap["band"]: (cap["asked"], cap["got"]) for cap in plan["rank_caps"]} == {
        band: (asked[band], ranks[band]) for band in asked
    }
    assert plan["fits"] is True and plan["needed_bytes"] <= plan["budget_bytes"]
    # The scaling is what was asked for: alpha is twice the rank for every band.
    assert {row["band"]: round(row["scaling"], 6) for row in layout} == {
        "low": 2.0, "mid": pytest.approx(40 / 30, rel=0.1), "high": 2.0,
    }  # fmt: skip
    # With other memory than before, a resumed run keeps the ranks that it has.
    _make_failed(run)
    small_gpu(10**12)
    again = run_sft(loaded, resume=True, console=Console(quiet=True))
    assert {
        row["band"]: row["target_rank"] for row in json.loads(again.run.layout_file.read_text())["rows"]
    } == ranks
    # A second time too; and where less memory is free than before, it says so instead of lowering them again.
    _make_failed(run)
    third = run_sft(loaded, resume=True, console=Console(quiet=True))
    assert json.loads(third.run.plan_file.read_text())["rank_caps"] == plan["rank_caps"]
    _make_failed(run)
    small_gpu(needed_at(loaded, got) // 2)
    with pytest.raises(MemoryPlanError, match="started with more memory"):
        run_sft(loaded, resume=True, console=Console(quiet=True))


def _make_failed(run) -> None:
    status = run.folder / "run.json"
    status.write_text(status.read_text().replace("finished", "failed"))


def test_a_run_that_may_not_cap_is_refused_before_anything_is_touched(
    tmp_path: Path, tiny_model_folder: Path, small_gpu
):
    loaded = run_recipe(tmp_path, tiny_model_folder, adapters=WIDE, memory={"on_exceed": "error"})
    small_gpu(needed_at(loaded, {"low": 8, "mid": 8, "high": 8}))
    with pytest.raises(MemoryPlanError, match="does not fit") as caught:
        run_sft(loaded, console=Console(quiet=True))
    assert caught.value.exit_code == 2 and "this fits: " in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_ranks_alone_do_not_always_suffice(tmp_path: Path, tiny_model_folder: Path, small_gpu):
    loaded = run_recipe(tmp_path, tiny_model_folder, adapters=WIDE)
    small_gpu(needed_at(loaded, {"low": 4, "mid": 4, "high": 4}) - 1)
    with pytest.raises(MemoryPlanError, match="even at the smallest ranks"):
        run_sft(loaded, console=Console(quiet=True))


def test_ignored_plans_are_written_down(tmp_path: Path, tiny_model_folder: Path, small_gpu):
    training = {"max_steps": 4}
    bands = [{"rank": 4}]
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=bands, training=training, memory={"on_exceed": "ignore"}
    )
    small_gpu(1)
    result = run_sft(loaded, console=Console(quiet=True))
    assert json.loads(result.run.plan_file.read_text())["fits"] is False


def test_predicted_beside_measured(finished):
    _, result = finished
    figures = result.figures
    assert figures["predicted_process_bytes"] > 0 and figures["peak_process_bytes"] > 0
    planned = read_events(result.run.events_file, "plan")
    assert planned[-1]["predicted"]["process_bytes"] == figures["predicted_process_bytes"]
    ended = read_events(result.run.events_file, "end")
    assert ended[-1]["predicted_process_bytes"] == figures["predicted_process_bytes"]
    plan = json.loads(result.run.plan_file.read_text())
    assert plan["for_this_data"]["allocated_bytes"] <= plan["allocated_bytes"]


def test_only_the_chosen_layers_are_checkpointed(tmp_path: Path, tiny_model_folder: Path, monkeypatch):
    """A checkpointed layer runs its forward twice in each step, another one once."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    counts: dict[int, int] = {}
    forward = LlamaMLP.forward

    def counted(self, x):
        if self.training:
            counts[id(self)] = counts.get(id(self), 0) + 1
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    training = {"max_steps": 3, "gradient_checkpointing": True}
    loaded = run_recipe(
        tmp_path,
        tiny_model_folder,
        training=training,
        adapters=[{"rank": 4}],
        memory={"checkpoint_layers": "1-2+5"},
    )
    run_sft(loaded, console=Console(quiet=True))
    assert list(counts.values()) == [3, 6, 6, 3, 3, 6]


def test_checkpointing_changes_no_loss(tmp_path: Path, tiny_model_folder: Path):
    losses = {}
    for name, sections in {
        "none": {"training": {"max_steps": 6}},
        "some": {
            "training": {"max_steps": 6, "gradient_checkpointing": True},
            "memory": {"checkpoint_layers": "0-2"},
        },
    }.items():
        loaded = run_recipe(tmp_path / name, tiny_model_folder, **sections)
        run = run_sft(loaded, console=Console(quiet=True)).run
        losses[name] = [record["loss"] for record in read_events(run.events_file, "step")]
    assert losses["none"] == pytest.approx(losses["some"], rel=1e-6)
