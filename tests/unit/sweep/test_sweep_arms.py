"""Arms at one budget: as many parameters in each, in the proportions that were asked for; or a clear refusal."""

from __future__ import annotations

import json

import pytest
from helpers import TINY, make_recipe

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.catalog import find_model
from qhybrid.architecture.spec import spec_from_config
from qhybrid.errors import SweepError
from qhybrid.recipe.load import dump_recipe, parse_recipe, resolve
from qhybrid.recipe.sweep import BUILT_IN_ARMS
from qhybrid.sweep.arms import build_arms
from qhybrid.sweep.budget import parameters_at_end, rounding

TINY_SPEC = spec_from_config({**TINY, "num_hidden_layers": 12})
PER_RANK = sum(linear.in_features + linear.out_features for linear in TINY_SPEC.linears) * 12


def arms_of(*arms: object, spec=TINY_SPEC, **sweep: object):
    recipe = make_recipe(
        adapters=[{"band": "low", "layers": "bottom", "rank": 2}, {"layers": "middle", "rank": 6, "alpha": 3}],
        data={"sources": "a", "eval_sources": "b"},
        sweep={"rank": 4, "arms": ["uniform", *arms], "learning_rates": [1e-3], **sweep},
    )
    return build_arms(recipe, spec)


def refusal_of(*arms: object, **sweep: object) -> str:
    with pytest.raises(SweepError) as caught:
        arms_of(*arms, **sweep)
    return str(caught.value)


@pytest.mark.parametrize(("model", "rank"), [("tiny", 2), ("tiny", 3), ("smollm2-135m", 4)])
def test_all_built_in_arms_have_equal_parameters(model, rank):
    entry = find_model(model) if model != "tiny" else None
    spec = spec_from_config(entry.config, model) if entry else TINY_SPEC
    names = [name for name in BUILT_IN_ARMS if name != "uniform"]
    arms = arms_of(*names, spec=spec, rank=rank)
    assert [arm.name for arm in arms] == ["uniform", *names]
    budget = arms[0].parameters
    assert budget == rank * spec.num_layers * sum(one.in_features + one.out_features for one in spec.linears)
    for arm in arms:
        # By hand: the bands' final ranks, and a magnitude for each output of a DoRA module.
        counted = sum(row.target_rank * (row.in_features + row.out_features) for row in arm.layout)
        counted += sum(row.out_features for row in arm.layout if row.kind == "dora")
        assert arm.parameters == counted and abs(counted - budget) <= rounding(arm.layout), arm.name
        assert min(row.target_rank for row in arm.layout) >= 1
    assert len({arm.description for arm in arms}) == len(arms)


def test_a_budget_in_numbers():
    arms = arms_of("increasing", rank=None, parameters="30k")
    assert all(abs(arm.parameters - 30_000) <= rounding(arm.layout) for arm in arms)


def test_the_article_keeps_its_proportions():
    """decreasing: ranks 64, 16→8 and 4 over 5, 4 and 3 of 12 layers."""
    arm = arms_of("article-decreasing", rank=8)[1]
    kinds = {layer: {row.kind for row in arm.layout if row.layer == layer} for layer in range(12)}
    assert all(kinds[layer] == {"adalora" if 5 <= layer < 9 else "lora"} for layer in range(12))
    ranks = [next(row for row in arm.layout if row.layer == layer) for layer in (0, 6, 11)]
    assert ranks[0].target_rank / ranks[1].target_rank == pytest.approx(64 / 8, rel=0.3)
    assert ranks[1].rank == 2 * ranks[1].target_rank and ranks[2].target_rank == 1
    low = arms_of("article-low", rank=8)[1]  # there the article starts at its target
    assert {(row.rank, row.target_rank) for row in low.layout if row.kind == "adalora"} <= {
        (rank, rank) for rank in range(1, 20)
    }


def test_random_maps_are_drawn_for_each_seed_at_the_same_budget():
    arm = arms_of("random")[1]
    layouts = [build_layout(arm.recipe(1e-3, seed, "o"), TINY_SPEC) for seed in range(5)]
    assert len({tuple(row.target_rank for row in layout) for layout in layouts}) == 5
    assert all(abs(parameters_at_end(one) - 4 * PER_RANK) <= rounding(one) for one in layouts)
    assert layouts[0] == arm.layout


def test_own_bands_are_scaled_in_their_proportions_and_keep_their_scaling():
    own = [{"layers": "0-5", "rank": 2, "alpha": 1}, {"layers": "6-11", "kind": "adalora", "rank": 8}]
    arm = arms_of({"name": "mine", "adapters": own}, rank=10)[1]
    assert arm.parameters == 10 * PER_RANK and "times 2" in arm.note
    assert {row.target_rank for row in arm.layout if row.layer < 6} == {4}
    assert {(row.rank, row.target_rank) for row in arm.layout if row.layer > 5} == {(24, 16)}
    assert {row.scaling for row in arm.layout if row.layer < 6} == {0.5}


def test_rslora_keeps_its_scaling_too():
    """alpha/√r: of four times the rank is twice the alpha."""
    own = [{"layers": "all", "kind": "rslora", "rank": 2, "alpha": 3}]
    arm = arms_of({"name": "mine", "adapters": own}, rank=8)[1]
    assert {row.rank for row in arm.layout} == {8}
    assert all(row.scaling == pytest.approx(3 / 2**0.5) for row in arm.layout)


def test_an_arm_over_a_single_layer():
    arm = arms_of({"name": "one", "adapters": [{"layers": "3", "rank": 2}]}, rank=None, parameters=PER_RANK)[1]
    assert {(row.layer, row.rank) for row in arm.layout} == {(3, 12)}


def test_stages_that_freeze_a_band_need_arms_that_have_it():
    recipe = make_recipe(
        adapters=[{"band": "low", "layers": "bottom", "rank": 2}, {"band": "high", "layers": "top", "rank": 2}],
        data={"sources": "a", "eval_sources": "b"},
        stages=[{"at": 2, "freeze": "low"}],
        sweep={"rank": 4, "arms": ["uniform", "recipe"], "learning_rates": [1e-3]},
    )
    with pytest.raises(SweepError, match=r"the arm uniform: .*low"):
        build_arms(recipe, TINY_SPEC)


def test_own_ranks_that_make_the_budget_stay_as_they_are():
    own = [{"layers": "0-5", "rank": 2}, {"layers": "6-11", "rank": 6}]
    arm = arms_of({"name": "mine", "adapters": own})[1]
    assert arm.note == "" and {row.rank for row in arm.layout if row.layer < 6} == {2}


def test_the_recipes_own_adapters_are_an_arm():
    arm = arms_of("recipe")[1]
    ranks = {row.layer: row.rank for row in arm.layout}
    assert ranks[0] * 3 == pytest.approx(ranks[5], abs=2) and set(ranks) == set(range(8))


def test_a_schedule_without_a_budget_gets_the_sweeps():
    arm = arms_of({"name": "mine", "adapters": {"schedule": {"name": "middle", "ratio": 8}, "kind": "rslora"}})[1]
    assert abs(arm.parameters - 4 * PER_RANK) <= rounding(arm.layout)


def test_arms_change_training_and_nothing_else():
    arm = arms_of({"arm": "dora-uniform", "name": "calm", "training": {"weight_decay": 0.5}})[1]
    recipe = arm.recipe(0.25, 7, "there")
    assert recipe.training.weight_decay == 0.5 and recipe.sweep is None
    assert (recipe.training.learning_rate, recipe.training.seed, recipe.output_dir) == (0.25, 7, "there")
    assert recipe.memory.on_exceed == "error"  # or a rank would be lowered, and the parameters with it
    assert parse_recipe(dump_recipe(resolve(recipe)), "again")[0] == resolve(recipe)


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"name": "big", "adapters": {"schedule": {"name": "increasing", "budget": "30k"}}}, "the arm big has"),
        (
            {"name": "mixed", "adapters": [{"rank": 2, "target_modules": "mlp"},
                                           {"band": "a", "rank": 3, "target_modules": "attention"}]},
            "modules of several ranks",
        ),
        (
            {"name": "own", "adapters": [{"layers": "bottom", "rank": 2, "schedule": "increasing"}]},
            "a band a schedule of its own",
        ),
        ({"name": "far", "adapters": [{"layers": "0-50"}]}, "the arm far: band 'band0': layer 50 is out of range"),
        ({"name": "odd", "adapters": [{"target_modules": "qproj"}]}, "did you mean 'q_proj'"),
        ({"name": "full", "adapters": {"schedule": {"name": "uniform", "max_rank": 2}}}, "above what the"),
        ({"arm": "dora-uniform", "name": "steps", "training": {"eval_steps": 3}}, "eval_steps has no effect"),
    ],
)  # fmt: skip
def test_refusals(arm, words):
    assert words in refusal_of(arm)


def test_a_budget_below_one_rank_for_each_module():
    assert "the arm dora-uniform: a budget of" in refusal_of("dora-uniform", rank=1)
    assert "below what one rank for each module costs" in refusal_of("increasing", rank=None, parameters=500)


@pytest.mark.parametrize(
    ("change", "key"), [({"rank": 500}, "rank"), ({"target_modules": "qproj"}, "target_modules")]
)
def test_a_budget_that_the_model_cannot_have_is_told_at_its_own_key(change, key):
    with pytest.raises(SweepError, match="the budget of the sweep") as caught:
        arms_of("random", **change)
    assert caught.value.at == ("sweep", key)


def test_too_few_layers_for_the_article():
    spec = spec_from_config({**TINY, "num_hidden_layers": 1})
    with pytest.raises(SweepError, match="a layer for each of three bands"):
        arms_of("article", spec=spec)


def test_the_sweep_reads_back_equal():
    own = {"schedule": "pyramid", "kind": "dora"}
    values = {
        "model": {"path": "x"},
        "adapters": [{"rank": 4}],
        "data": {"sources": "a", "eval_sources": "b"},
        "sweep": {
            "parameters": "20k",
            "arms": [
                "uniform",
                "article",
                {"name": "mine", "adapters": own, "training": {"max_steps": 3}, "learning_rates": [1e-5]},
            ],
            "learning_rates": {"low": 1e-4, "high": 1e-2, "trials": 3},
            "measure": {"metrics": ["f1", "loss"], "labels": ["yes", "no"]},
        },
        "output_dir": "o",
    }
    recipe, _ = parse_recipe(json.dumps(values), "r")
    assert recipe.sweep is not None and recipe.sweep.learning_rates == (1e-4, 1e-3, 1e-2)
    assert recipe.sweep.rates_of("mine") == (1e-5,)
    assert recipe.sweep.rates_of("article-low") == recipe.sweep.rates_of("uniform") == (1e-4, 1e-3, 1e-2)
    again, notices = parse_recipe(dump_recipe(recipe), "again")
    assert again == recipe and notices == []
    assert again.sweep is not None and again.sweep.arms[2].training.model_fields_set == {"max_steps"}
