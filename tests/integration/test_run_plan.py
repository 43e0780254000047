"""What a run makes of its plan: capped ranks, refusals, predicted beside measured, layers that are recomputed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from helpers import run_recipe
from rich.console import Console

from qhybrid.errors import MemoryPlanError
from qhybrid.planner.plan import Budget
from qhybrid.recipe.load import parse_recipe
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


GROWING = [{"name": "grow", "at": 2, "expand": {"times": 4}}]


def test_stages_that_would_outgrow_the_memory_are_refused(tmp_path: Path, tiny_model_folder: Path, small_gpu):
    """The beginning of the run fits, its end would not; the hint names a budget with which it does."""
    bands = [{"band": "all", "rank": 8}]
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=bands, memory={"on_exceed": "error"}, stages=GROWING,
        model={"path": str(tiny_model_folder), "dtype": "bfloat16"},  # so that nothing cheaper is left to change
        training={"max_steps": 3, "per_device_train_batch_size": 1, "gradient_checkpointing": True},
    )  # fmt: skip
    small_gpu(needed_at(loaded, {"all": 4}) - 1)  # with rank 16 at the end
    with pytest.raises(MemoryPlanError, match="does not fit") as caught:
        run_sft(loaded, console=Console(quiet=True))
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()
    budget = re.search(r"this fits: .*stages\.0\.expand\.budget=(\d+)", str(caught.value))
    assert budget, str(caught.value)
    stages = [{**GROWING[0], "expand": {"times": 4, "budget": int(budget[1])}}]
    recipe = parse_recipe(
        json.dumps({**loaded.recipe.model_dump(mode="json", exclude={"tasks"}), "stages": stages}), "again"
    )[0]
    result = run_sft(type(loaded)(recipe, loaded.path), console=Console(quiet=True))
    plan = json.loads(result.run.plan_file.read_text())
    before, after = plan["num_trained_parameters"], result.figures["num_trained_parameters"]
    assert plan["fits"] and before < after <= plan["num_trained_parameters_at_most"]
    assert after - before <= int(budget[1])


def test_ranks_are_capped_so_that_the_stages_fit_too(tmp_path: Path, tiny_model_folder: Path, small_gpu):
    bands = [{"band": "all", "rank": 16}]
    training = {"max_steps": 3}
    loaded = run_recipe(tmp_path, tiny_model_folder, adapters=bands, stages=[{"at": 2, "expand": {"times": 2}}],
                        training=training)  # fmt: skip
    small_gpu(needed_at(loaded, {"all": 8}))
    result = run_sft(loaded, console=Console(quiet=True))
    rows = json.loads(result.run.layout_file.read_text())["rows"]
    assert {(row["rank"], row["alpha"], row["scaling"]) for row in rows} == {(16, 32.0, 2.0)}  # 8 at first
    (change,) = read_events(result.run.events_file, "stage")
    assert {growth["before"] for growth in change["expanded"].values()} == {8}


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
