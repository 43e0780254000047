"""Schedules of ranks: shapes, one budget for all of them, and what is refused."""

from __future__ import annotations

import math

import pytest
from helpers import TINY, make_recipe
from hypothesis import given
from hypothesis import strategies as st

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.schedules import Place, scheduled_ranks, spread
from qhybrid.architecture.spec import spec_from_config
from qhybrid.errors import LayoutError, RecipeError
from qhybrid.planner.plan import Budget, make_plan
from qhybrid.planner.solve import asked_ranks, rank_caps, solve_rank, with_ranks
from qhybrid.recipe.load import dump_recipe, parse_recipe, resolve
from qhybrid.recipe.ranks import ScheduleSection

LLAMA_2_7B = spec_from_config(
    {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000,
    }
)  # fmt: skip
SMALL = spec_from_config(TINY)
DEPTH = ["increasing", "decreasing", "middle", "pyramid"]


def layout_of(adapters, spec=LLAMA_2_7B):
    return build_layout(make_recipe(adapters=adapters), spec)


def ranks(layout, target="q_proj"):
    return [row.rank for row in layout if row.target == target]


def cost(layout):
    return sum(row.target_rank * (row.in_features + row.out_features) for row in layout)


@pytest.mark.parametrize("name", ["uniform", *DEPTH, "random"])
def test_every_schedule_spends_the_budget_of_llama_2_7b(name):
    """Rank 16 on all linears of Llama-2-7B is 39,976,960 parameters."""
    layout = layout_of({"schedule": {"name": name, "budget": 39_976_960}})
    assert 0 <= 39_976_960 - layout.num_parameters < 4096 + 11008
    if name == "uniform":
        assert {row.rank for row in layout} == {16}


def test_shapes():
    """With 31 steps and a ratio of 4, layer i of "increasing" wishes for c·(1 + 3i/31)."""
    found = {name: ranks(layout_of({"schedule": {"name": name, "budget": "39_976_960"}})) for name in DEPTH}
    wished = [1 + 3 * i / 31 for i in range(32)]
    factor = 16 * 32 / sum(wished)
    assert all(abs(r - factor * w) < 1 for r, w in zip(found["increasing"], wished, strict=True))
    assert found["increasing"] == sorted(found["increasing"]) and found["increasing"][-1] >= 25
    assert all(abs(a - b) <= 1 for a, b in zip(found["decreasing"], reversed(found["increasing"]), strict=True))
    # layers 11 to 20 are the middle third; 16·32 = 22·c + 10·4c
    assert all(abs(r - (4 if 11 <= i < 21 else 1) * 512 / 62) < 1 for i, r in enumerate(found["middle"]))
    peak = max(found["pyramid"])
    assert found["pyramid"][15] == found["pyramid"][16] == peak and found["pyramid"][0] < peak / 3


def test_by_module_and_custom_follow_their_weights():
    layout = layout_of({"schedule": {"name": "by_module", "weights": {"v_proj": 4, "q_proj": 0.5}}, "rank": 16})
    v, q, up = (ranks(layout, name)[0] for name in ("v_proj", "q_proj", "up_proj"))
    assert v / up == pytest.approx(4, rel=0.1) and q / up == pytest.approx(0.5, rel=0.1)
    peaked = ranks(layout_of({"schedule": {"name": "custom", "weights": [1, 1, 9]}, "rank": 16}))
    assert max(peaked[:16]) <= min(peaked[:16]) + 1 and peaked[-1] == pytest.approx(9 * peaked[0], rel=0.15)


def test_random_is_a_seeded_control():
    first, again, other = (
        layout_of({"schedule": {"name": "random", "seed": seed}, "rank": 8}) for seed in (0, 0, 1)
    )
    assert first == again and first != other
    assert len({row.rank for row in first}) > 5


def test_bands_keep_their_kinds_under_a_schedule_over_all():
    bands = [
        {"layers": "bottom", "kind": "lora", "rank": 4},
        {"layers": "middle", "kind": "adalora", "rank": 4, "alpha": 8},
        {"layers": "top", "kind": "dora", "rank": 4, "alpha": 8},
    ]
    plain, increasing = layout_of(bands, SMALL), layout_of({"schedule": "increasing", "bands": bands}, SMALL)
    assert cost(plain) - 160 < cost(increasing) <= cost(plain)
    assert [row.kind for row in plain] == [row.kind for row in increasing]
    assert ranks(increasing)[0] < ranks(increasing)[-1]
    for row in increasing:  # alpha left out is twice the module's rank; given, it is alpha
        assert row.alpha == (2 * row.rank if row.kind == "lora" else 8)
        assert row.scaling == row.alpha / row.rank
        if row.kind == "adalora":
            assert row.rank == max(row.target_rank + 1, row.target_rank * 6 // 4)


def test_a_bands_own_schedule_leaves_the_others_alone():
    bands = [
        {"layers": "0-2", "rank": 6, "schedule": {"name": "decreasing", "ratio": 3}},
        {"layers": "3-5", "rank": 5},
    ]
    found = ranks(layout_of(bands, SMALL))
    assert found[3:] == [5, 5, 5] and found[0] > found[1] > found[2]
    assert sum(found[:3]) == pytest.approx(18, abs=1)


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=40),
    costs=st.lists(st.integers(1, 500), min_size=40, max_size=40),
    highest=st.lists(st.integers(1, 60), min_size=40, max_size=40),
    share=st.floats(0, 1.2),
)
def test_spread_spends_what_it_may_and_no_more(weights, costs, highest, share):
    places = [Place(i, "x", costs[i], 1, highest[i]) for i in range(len(weights))]
    least, most = sum(p.cost for p in places), sum(p.cost * p.highest for p in places)
    budget = least + int(share * (most - least))
    found = spread(weights, places, budget)
    spent = sum(r * p.cost for r, p in zip(found, places, strict=True))
    assert all(1 <= r <= p.highest for r, p in zip(found, places, strict=True))
    assert spent <= budget
    free = [p.cost for r, p in zip(found, places, strict=True) if r < p.highest]
    assert not free or budget - spent < max(costs)
    for i, a in enumerate(places):  # at one cost and one limit, a larger wish never gets less
        for j, b in enumerate(places):
            if a.cost == b.cost and a.highest == b.highest and weights[i] >= weights[j] * (1 + 1e-6):
                assert found[i] >= found[j]


def test_what_a_schedule_refuses():
    with pytest.raises(LayoutError, match=r"budget of 1,000 parameters is below what one rank .* 42 modules"):
        layout_of({"schedule": {"name": "uniform", "budget": 1000}}, SMALL)
    with pytest.raises(LayoutError, match="a single layer"):
        layout_of([{"layers": "3", "schedule": "increasing"}], SMALL)
    with pytest.raises(LayoutError, match="'query' is not adapted"):
        layout_of({"schedule": {"name": "by_module", "weights": {"query": 2}}}, SMALL)
    with pytest.raises(LayoutError, match="min_rank 40 is above 32"):
        layout_of({"schedule": {"name": "uniform", "min_rank": 40}}, SMALL)
    assert scheduled_ranks(ScheduleSection(name="increasing"), [Place(i, "x", 1, 1, 9) for i in (0, 1)], 5)


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        ({"schedule": {"name": "rising"}}, "'rising' is not one of"),
        ({"schedule": {"name": "increasing", "budget": "20X"}}, "is not a count"),
        ({"schedule": {"name": "increasing", "budget": "20M"}, "rank": 4}, "schedule.budget and the rank of"),
        ({"schedule": "increasing", "ranks": "gora"}, "both decide the ranks"),
        ({"schedule": "increasing", "bands": [{"schedule": "uniform"}]}, "a schedule of its own"),
        ({"schedule": "increasing", "bands": [{}], "rank": 4}, "adapters has bands, and rank beside them"),
        ([{"schedule": {"name": "uniform", "budget": 9000}}], "the budget of a band's schedule is its rank"),
        ({"schedule": {"name": "uniform", "ratio": 2}}, "ratio has no effect"),
        ({"schedule": {"name": "by_module"}}, "needs weights"),
        ({"ranks": "gora", "kind": "adalora"}, "finds its own"),
        ({"ranks": "gora", "init": "gaussian"}, "initialises too"),
        ({"ranks": {"method": "eva", "gamma": 1}}, "gamma has no effect"),
    ],
)
def test_what_a_recipe_refuses(adapters, words):
    with pytest.raises(RecipeError, match=words):
        make_recipe(adapters=adapters)


def test_a_budget_that_no_layout_can_spend_is_refused():
    """All linears of SMALL at rank 2 cost twice what they cost at rank 1."""
    most = 2 * sum(row.in_features + row.out_features for row in layout_of([{"rank": 1}], SMALL))
    schedule = {"name": "uniform", "max_rank": 2, "budget": most}
    assert cost(layout_of({"schedule": schedule}, SMALL)) == most
    with pytest.raises(LayoutError, match=f"above what the largest ranks cost: {most:,}") as caught:
        layout_of({"schedule": schedule | {"budget": 2 * most}}, SMALL)
    assert "max_rank" in str(caught.value.hint)


def test_the_layout_tells_what_a_budget_counts():
    adapters = {"schedule": {"name": "increasing", "budget": 9000}, "bands": [{"kind": "adalora"}]}
    layout = layout_of(adapters, SMALL)
    assert layout.num_budgeted == cost(layout) <= 9000 < layout.num_parameters
    assert layout.to_text().endswith(f"as budgets count (A and B, final ranks): {cost(layout):,} parameters")


def test_errors_name_the_line_inside_adapters():
    text = (
        "model: {path: tiny}\nadapters:\n  schedule:\n    name: increasing\n    budget: none\n"
        "  kind: lora\n  rnk: 4\ndata: {sources: rows.jsonl}\noutput_dir: out\n"
    )
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert "r.yaml:5: schedule.budget" in str(caught.value) and "r.yaml:7" in str(caught.value)


def test_resolved_recipes_and_overrides_are_read_back():
    text = '{"model": {"path": "t"}, "data": {"sources": "r"}, "output_dir": "o", "adapters": %s}'
    for adapters in (
        '{"schedule": {"name": "middle", "budget": "9k"}, "kind": "adalora"}',
        '{"ranks": "gora", "bands": [{"layers": "bottom"}, {"layers": "top", "rank": 4}]}',
        '[{"layers": "bottom", "schedule": "pyramid"}]',
    ):
        recipe = parse_recipe(text % adapters, "r")[0]
        again = parse_recipe(dump_recipe(resolve(recipe)), "again")[0]
        assert build_layout(again, SMALL) == build_layout(recipe, SMALL)
    overridden = parse_recipe(
        text % adapters, "r", ["adapters.schedule=increasing", "adapters.bottom.schedule=null"]
    )
    assert overridden[0].schedule == ScheduleSection(name="increasing")
    changed = parse_recipe(
        text % '{"schedule": "uniform", "kind": "dora"}', "r", ["adapters={kind: lora, rank: 2}"]
    )
    assert changed[0].schedule is None and changed[0].adapters[0].rank == 2


def test_the_planner_lowers_a_shared_budget():
    recipe = make_recipe(adapters={"schedule": {"name": "increasing", "budget": "400M"}})
    limit = Budget(vram=14 * 2**30)

    def plan(tried):
        return make_plan(tried, LLAMA_2_7B, limit)

    assert plan(recipe).fits is False
    capped = solve_rank(recipe, LLAMA_2_7B, plan, no_more_than_asked=True)
    assert capped is not None and plan(capped).fits
    (cap,) = rank_caps(recipe, capped)
    assert cap.asked == 400_000_000 > cap.got and "instead of 400,000,000" in cap.told
    assert with_ranks(recipe, {cap.band: cap.got}) == capped and asked_ranks(capped) == {cap.band: cap.got}
    step = 400_000_000 // 64
    assert plan(with_ranks(recipe, {cap.band: cap.got + step})).fits is False
    assert math.isclose(build_layout(capped, LLAMA_2_7B).num_parameters, cap.got, rel_tol=1e-3)
