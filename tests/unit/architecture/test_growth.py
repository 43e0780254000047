"""Layouts that stages make: the bound that the memory is planned with, and what the modules cannot take."""

from __future__ import annotations

import random

import pytest
from helpers import TINY, make_recipe, tiny_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.architecture.growth import (
    candidates,
    check_growth,
    grown,
    largest_layout,
    largest_ranks,
    rank_cost,
)
from qhybrid.architecture.spec import spec_from_config
from qhybrid.errors import LayoutError
from qhybrid.planner.memory import predict, predict_largest
from qhybrid.planner.solve import with_training

BANDS = [
    {"band": "low", "layers": "bottom", "rank": 4, "target_modules": "attention"},
    {"band": "mid", "layers": "middle", "kind": "rslora", "rank": 6, "alpha": 9},
    {"band": "high", "layers": "top", "kind": "dora", "rank": 2},
    {"band": "ada", "layers": "bottom", "kind": "adalora", "rank": 2, "target_modules": "mlp"},
]
LAYOUT = tiny_layout(BANDS)


def recipe_with(*stages):
    return make_recipe(adapters=BANDS, stages=list(stages))


@pytest.mark.parametrize(
    ("band", "alpha"), [("low", 8 * 10 / 4), ("mid", 9 * (10 / 6) ** 0.5), ("high", 4 * 10 / 2)]
)
def test_alpha_grows_so_that_the_scaling_stays(band, alpha):
    before = LAYOUT.of_band(band)[0]
    after = grown(LAYOUT, {before.module: 10}).of_band(band)[0]
    assert after.scaling == before.scaling and after.rank == after.target_rank == 10
    assert after.alpha == pytest.approx(alpha, rel=1e-15)
    power = 0.5 if after.kind == "rslora" else 1
    assert after.alpha / after.rank**power == pytest.approx(after.scaling, rel=1e-12)
    others = [row for row in LAYOUT if row.module != before.module]
    assert [row for row in grown(LAYOUT, {before.module: 10}) if row.module != before.module] == others


expansions = st.fixed_dictionaries(
    {},
    optional={
        "bands": st.lists(st.sampled_from(["low", "mid", "high"]), min_size=1, max_size=3, unique=True),
        "top": st.one_of(st.integers(1, 20), st.floats(0.05, 0.95)),
        "budget": st.integers(300, 20_000),
        "to": st.integers(7, 24),
    },
)
amounts = st.one_of(
    st.fixed_dictionaries({"by": st.integers(1, 4)}), st.fixed_dictionaries({"times": st.integers(2, 3)})
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(expansions, amounts), min_size=1, max_size=3), st.integers(0, 2**32))
def test_no_outcome_has_more_parameters_than_the_plan(chosen, seed):
    """Whatever modules the stages choose, and in whatever order a budget is spent."""
    recipe = recipe_with(*({"at": n + 1, "expand": {**e, **a}} for n, (e, a) in enumerate(chosen)))
    bound = largest_layout(recipe, LAYOUT)
    highest = largest_ranks(recipe.stages, LAYOUT)
    assert all(row.rank <= highest[row.module] for row in bound)
    chance = random.Random(seed)
    for _ in range(5):
        layout = LAYOUT
        for stage in recipe.stages:
            rows = [
                row for row in candidates(stage.expand, layout) if stage.expand.rank_after(row.rank) > row.rank
            ]
            chance.shuffle(rows)
            left = stage.expand.budget or 10**9
            ranks = {}
            for row in rows[: stage.expand.how_many(len(rows))]:
                rank = min(stage.expand.rank_after(row.rank), row.in_features, row.out_features)
                cost = (rank - row.rank) * rank_cost(row)
                if cost <= left:
                    left -= cost
                    ranks[row.module] = rank
            layout = grown(layout, ranks)
        assert layout.num_parameters <= bound.num_parameters
        assert sum(row.rank for row in layout) <= sum(row.rank for row in bound)


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("expand", [{"top": 7, "times": 8}, {"top": 7, "times": 8, "budget": 5000}])
def test_all_that_a_stage_chooses_may_lie_in_one_layer(checkpointed, expand):
    """Where activations are computed again, one layer's are there at a time: its own largest ranks count."""
    recipe = recipe_with({"at": 1, "expand": expand})
    training = {"gradient_checkpointing": checkpointed, "max_length": 1024, "per_device_train_batch_size": 4}
    recipe = with_training(recipe, **training)
    spec = spec_from_config(TINY)
    planned, prediction = predict_largest(recipe, spec, LAYOUT)
    for layer in range(spec.num_layers):
        ranks, left = {}, expand.get("budget", 10**9)
        for row in LAYOUT:
            more = min(8 * row.rank, row.in_features, row.out_features) - row.rank
            if row.layer == layer and row.kind != "adalora" and more * rank_cost(row) <= left:
                ranks[row.module] = row.rank + more
                left -= more * rank_cost(row)
        assert ranks and predict(recipe, spec, grown(LAYOUT, ranks)).peak <= prediction.peak
    assert planned.num_parameters >= largest_layout(recipe, LAYOUT).num_parameters - max(map(rank_cost, LAYOUT))


def test_the_bound_is_no_larger_than_the_budget_asks_for():
    recipe = recipe_with({"at": 1, "expand": {"times": 4, "budget": 5000}})
    more = largest_layout(recipe, LAYOUT).num_parameters - LAYOUT.num_parameters
    assert 5000 <= more < 5000 + max(map(rank_cost, LAYOUT))
    rule = recipe_with({"when": "spectrum", "expand": {"bands": "high", "by": 1, "to": 5}})
    expected = 3 * sum(rank_cost(row) for row in LAYOUT.of_band("high"))
    assert largest_layout(rule, LAYOUT).num_parameters - LAYOUT.num_parameters == expected
    assert largest_layout(recipe_with(), LAYOUT) == LAYOUT


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"times": 32, "bands": "low"},
            r"may expand k_proj of band 'low' to rank 128; .* 32 .32 x 64.*\n.*at most 32",
        ),
        ({"to": 2}, "expand.to 2 has no effect"),
        ({"by": 1, "top": 99}, "more than the 36 modules"),
        ({"by": 1, "budget": 50}, r"expand.budget 50 is below 96 parameters"),
    ],
)
def test_what_the_modules_cannot_take_is_refused(stage, message):
    with pytest.raises(LayoutError, match=f"(?s)stage 'stage0'.*{message}") as caught:
        check_growth(recipe_with({"at": 1, "expand": stage}), LAYOUT)
    assert caught.value.exit_code == 2 and caught.value.hint


def test_expansions_add_up_to_the_smaller_side():
    check_growth(recipe_with({"at": 1, "expand": {"to": 32}}), LAYOUT)
    with pytest.raises(LayoutError, match="stage 'stage1' may expand k_proj"):
        check_growth(recipe_with({"at": 1, "expand": {"to": 32}}, {"at": 2, "expand": {"by": 1}}), LAYOUT)
