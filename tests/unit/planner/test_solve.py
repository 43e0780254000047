"""The solvers: what they find fits, the next step up does not, and ranks are capped as the bands say."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory_plan import recipe_of, small_spec, spec_of

from qhybrid.architecture.bands import build_layout
from qhybrid.planner.advise import ways_to_fit, ways_to_spend
from qhybrid.planner.plan import Budget, Plan, make_plan
from qhybrid.planner.solve import largest, rank_caps, solve, solve_rank, with_ranks, with_training
from qhybrid.planner.workload import checkpointed_layers
from qhybrid.recipe.load import load_recipe, resolve
from qhybrid.recipe.schema import Recipe

MIB = 2**20


def planner(spec, vram: float):
    return lambda recipe: make_plan(recipe, spec, Budget(int(vram)))


def needed(recipe: Recipe, spec) -> int:
    return make_plan(recipe, spec, Budget(None)).needed


@given(st.integers(0, 300), st.integers(0, 300), st.integers(-1, 301))
def test_largest_finds_the_last_value_that_holds(low, span, last):
    found = largest(low, low + span, lambda n: n <= last)
    assert found == (min(last, low + span) if last >= low else None)


@settings(max_examples=25, deadline=None)
@given(
    quantity=st.sampled_from(["micro_batch", "max_length", "checkpointing"]),
    kind=st.sampled_from(["lora", "dora", "adalora"]),
    share=st.floats(0.05, 1.5),
    checkpointed=st.booleans(),
)
def test_the_answer_fits_and_the_next_step_up_does_not(quantity, kind, share, checkpointed):
    spec = small_spec(layers=6, max_position_embeddings=4096)
    recipe = recipe_of(kind, batch=4, length=1024, checkpointed=checkpointed)
    least = needed(recipe_of(kind, batch=1, length=64), spec)
    vram = least + share * (needed(recipe_of(kind, batch=4, length=1024, checkpointed=False), spec) - least)
    plan = planner(spec, vram)
    found = solve(quantity, recipe, spec, plan)
    if found is None:
        smallest = {"micro_batch": {"per_device_train_batch_size": 1}, "max_length": {"max_length": 64}}
        assert plan(with_training(recipe, **smallest.get(quantity, {}))).fits is False
        return
    assert plan(found).fits
    if quantity == "micro_batch":
        batch = found.training.per_device_train_batch_size
        assert not plan(with_training(found, per_device_train_batch_size=batch + 1)).fits
    elif quantity == "max_length":
        length = found.training.max_length or 0
        assert length == 4096 or not plan(with_training(found, max_length=length + 64)).fits
    else:
        count = len(checkpointed_layers(found, 6))
        if count:
            fewer = recipe.model_copy(
                update={
                    "training": recipe.training.model_copy(update={"gradient_checkpointing": count > 1}),
                    "memory": recipe.memory.model_copy(
                        update={"checkpoint_layers": f"0-{count - 2}" if count > 1 else None}
                    ),
                }
            )
            assert not plan(fewer).fits


BANDS = [
    {"band": "low", "layers": "0-1", "kind": "lora", "rank": 32},
    {"band": "mid", "layers": "2-3", "kind": "adalora", "rank": 32, "adalora": {"init_rank": 48}},
    {
        "band": "top",
        "layers": "4-5",
        "kind": "rslora",
        "rank": 64,
        "alpha": 16,
        "min_rank": 16,
        "rank_multiple": 8,
    },
]


@settings(max_examples=25, deadline=None)
@given(st.floats(0.0, 1.0), st.floats(0.5, 3.0))
def test_ranks_shrink_together_within_minimum_and_steps(share, weight):
    spec = small_spec(layers=6)
    bands = [BANDS[0], {**BANDS[1], "rank_weight": weight}, BANDS[2]]
    recipe = recipe_of(adapters=bands, training={"optim": "adamw_torch_fused"})
    smallest = with_ranks(recipe, {"low": 4, "mid": 4, "top": 16})
    low, high = needed(smallest, spec), needed(recipe, spec)
    plan = planner(spec, low + share * (high - low))
    found = solve_rank(recipe, spec, plan, no_more_than_asked=True)
    assert found is not None and plan(found).fits
    for asked, got in zip(recipe.adapters, found.adapters, strict=True):
        assert asked.smallest_rank <= got.rank <= asked.rank
        assert got.rank % asked.rank_step == 0 or got.rank in (asked.rank, asked.smallest_rank)
    caps = rank_caps(recipe, found)
    assert [cap.asked for cap in caps] == [32, 32, 64]
    # One step up for every band at once does not fit, unless all have what they asked for.
    if any(cap.got < cap.asked for cap in caps):
        up = {
            cap.band: min(cap.asked, cap.got + band.rank_step)
            for cap, band in zip(caps, recipe.adapters, strict=True)
        }
        assert not plan(with_ranks(recipe, up)).fits


def test_a_band_with_weight_0_keeps_its_rank():
    spec = small_spec(layers=6)
    bands = [{**BANDS[0], "rank_weight": 0}, BANDS[1], BANDS[2]]
    recipe = recipe_of(adapters=bands)
    smallest = with_ranks(recipe, {"mid": 4, "top": 16})
    found = solve_rank(recipe, spec, planner(spec, needed(smallest, spec)), no_more_than_asked=True)
    assert found is not None
    assert [band.rank for band in found.adapters] == [32, 4, 16]


def test_nothing_fits_below_the_minimum():
    spec = small_spec(layers=6)
    recipe = recipe_of(adapters=BANDS)
    smallest = with_ranks(recipe, {"low": 4, "mid": 4, "top": 16})
    assert solve_rank(recipe, spec, planner(spec, needed(smallest, spec) - 1), no_more_than_asked=True) is None


def test_a_lower_rank_keeps_each_bands_scaling():
    spec = small_spec(layers=6)
    recipe = resolve(recipe_of(adapters=BANDS))
    lowered = with_ranks(recipe, {"low": 8, "mid": 8, "top": 16})
    before = {row.module: row.scaling for row in build_layout(recipe, spec)}
    after = {row.module: row.scaling for row in build_layout(lowered, spec)}
    assert before.keys() == after.keys()
    assert all(math.isclose(before[module], after[module], rel_tol=1e-12) for module in before)
    assert lowered.adapters[1].init_rank == 12  # of the same ratio


def test_more_rank_stops_at_the_narrowest_module():
    spec = small_spec(layers=6)  # k_proj is 128 wide
    found = solve("rank", recipe_of(adapters=BANDS), spec, planner(spec, 10**12))
    assert found is not None
    build_layout(found, spec)
    assert max(band.init_rank for band in found.adapters) <= 128


def adviser(vram: str) -> tuple[Recipe, Any, Any]:
    spec = spec_of("llama-2-7b")
    recipe = resolve(load_recipe("llama2_7b_instruct").recipe)
    return recipe, spec, planner(spec, float(vram.removesuffix("GiB")) * 2**30)


@pytest.mark.parametrize("vram", ["6.5GiB", "5.5GiB", "5.2GiB"])
def test_what_is_advised_makes_it_fit_and_nothing_of_it_is_idle(vram):
    recipe, spec, plan = adviser(vram)
    assert plan(recipe).fits is False
    changes, enough = ways_to_fit(recipe, spec, plan)
    assert enough and changes
    assert plan(changes[-1].recipe).fits
    assert all(change.overrides and change.price for change in changes)
    whole = plan(recipe).needed - plan(changes[-1].recipe).needed
    assert sum(change.saves for change in changes) == whole


def test_the_first_advice_is_recomputation_not_rank():
    recipe, spec, plan = adviser("12GiB")
    kept = with_training(recipe, gradient_checkpointing=False)
    assert plan(kept).fits is False
    changes, enough = ways_to_fit(kept, spec, plan)
    assert enough and len(changes) == 1
    words = changes[0].overrides
    assert "training.gradient_checkpointing=true" in words
    assert any(word.startswith("memory.checkpoint_layers=0-") for word in words)  # no more layers than necessary


def test_a_loss_that_builds_the_logits_is_named_first():
    spec = spec_of("llama-3.1-8b")
    recipe = recipe_of(batch=4, length=2048, training={"label_smoothing_factor": 0.1})
    changes, enough = ways_to_fit(recipe, spec, planner(spec, 16 * 2**30))
    assert enough
    assert changes[0].overrides == ("training.label_smoothing_factor=0.0",)


def test_advice_that_does_not_suffice_says_so():
    recipe, spec, plan = adviser("3GiB")
    changes, enough = ways_to_fit(recipe, spec, plan)
    assert not enough and changes


def test_spare_memory_goes_to_speed_first():
    recipe, spec, plan = adviser("24GiB")
    changes = ways_to_spend(recipe, spec, plan)
    assert changes[0].overrides[0].startswith("memory.checkpoint_layers=")
    assert any("rank" in word for word in changes[-1].overrides)
    for change in changes:
        assert plan(change.recipe).fits and change.saves < 0


def test_a_plan_without_a_limit_has_no_verdict():
    plan: Plan = make_plan(recipe_of(), small_spec(), Budget(None))
    assert plan.fits is None
