"""Stages in a recipe: what they mean, what is refused, with the line and what to do."""

from __future__ import annotations

import pytest
from helpers import recipe_error
from pydantic import ValidationError

from qhybrid.recipe.load import dump_recipe, parse_recipe, resolve
from qhybrid.recipe.stage_checks import StageError, begin_steps
from qhybrid.recipe.stages import ExpandSection, PlateauSection, SpectrumSection, StageSection

HEAD = """\
model: {path: org/model}
adapters:
  - {band: low, layers: bottom, rank: 4}
  - {band: mid, layers: middle, kind: adalora, rank: 4}
  - {band: high, layers: top, kind: dora, rank: 4}
data: {sources: rows.jsonl, eval_sources: rows.jsonl}
training: {max_steps: 100}
output_dir: out
stages:
"""


def stages_of(text: str, *overrides: str):
    return parse_recipe(HEAD + text, "r.yaml", overrides)[0].stages


def test_the_resolved_recipe_says_everything():
    text = """\
  - at: 0.4
    expand: {top: 0.25, times: 2, budget: 2M}
  - {name: rule, when: spectrum, expand: {bands: low, by: 2, to: 16}}
  - {name: flat, at: 90, freeze: low}
"""
    recipe, _ = parse_recipe(HEAD + text, "r.yaml")
    settled = resolve(recipe)
    assert parse_recipe(dump_recipe(settled), "again")[0] == settled
    first, rule, flat = settled.stages
    assert first.name == "stage0" and first.expand == ExpandSection(
        bands=("low", "high"), top=0.25, times=2, budget=2_000_000
    )
    assert rule.spectrum == SpectrumSection() and rule.expand and rule.expand.bands == ("low",)
    assert flat.freeze == ("low",) and flat.plateau is None


def test_ranks_from_data_are_not_expanded():
    """Their map is not known when the memory is planned; freezing changes nothing in it."""
    text = "model: {path: m}\ndata: {sources: r.jsonl}\noutput_dir: out\ntraining: {max_steps: 9}\n"
    bands = "adapters:\n  ranks: gora\n"
    bands += "  bands: [{band: low, layers: bottom, rank: 4}, {band: top, layers: top, rank: 4}]\n"
    parse_recipe(text + bands + "stages: [{at: 5, freeze: low}]\n", "r.yaml")
    error = recipe_error(text + bands + "stages: [{at: 5, expand: {by: 2}}]\n")
    assert "gora chooses from data" in error and "r.yaml:8" in error


def test_a_plateau_is_resolved_by_its_metric():
    text = "  - {when: plateau, plateau: {metric: train_loss}, freeze: low}\n"
    assert resolve(parse_recipe(HEAD + text, "r.yaml")[0]).stages[0].plateau == PlateauSection(
        metric="train_loss", window=20
    )


def test_overrides_name_stages():
    text = "  - {name: grow, at: 5, expand: {by: 2}}\n"
    changed = stages_of(text, "stages.grow.at=0.5", "stages.0.expand.top=3", "stages.grow.expand.budget=5k")
    assert changed[0].at == 0.5 and changed[0].expand == ExpandSection(by=2, top=3, budget=5000)


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({"by": 3}, {1: 4, 8: 11}),
        ({"times": 3}, {1: 3, 8: 24}),
        ({"to": 8}, {1: 8, 8: 8, 9: 9}),  # no rank falls
        ({"by": 3, "to": 8}, {1: 4, 6: 8, 8: 8, 20: 20}),
        ({"times": 2, "to": 8}, {3: 6, 6: 8, 20: 20}),
    ],
)
def test_the_rank_after_an_expansion(settings, ranks):
    assert {rank: ExpandSection(**settings).rank_after(rank) for rank in ranks} == ranks


def test_how_many_modules_are_the_top():
    counts = [ExpandSection(by=1, top=top).how_many(10) for top in (None, 3, 50, 0.25, 0.01, 0.99)]
    assert counts == [10, 3, 10, 2, 1, 10]


def test_a_whole_number_is_a_step_and_a_fraction_a_part_of_the_run():
    stages = [StageSection(name=str(at), at=at, freeze=("low",)) for at in (10, 0.29, 50)]
    assert begin_steps(stages, 100) == (10, 29, 50)
    with pytest.raises(StageError, match="after step 50, and the run ends with step 40"):
        begin_steps(stages, 40)
    with pytest.raises(StageError, match=r"'0.29' would begin after step 12, but the stage before it .* step 20"):
        begin_steps([StageSection(name="20", at=20, freeze=("low",)), stages[1]], 41)


REFUSED = {
    "{at: 100, freeze: low}": "would begin after step 100, and the run ends with step 100",
    "{at: 0.001, freeze: low}": "would begin after step 0, but the stage before it begins after step 1",
    "{at: 1.0, freeze: low}": "not 1.0",
    "{at: 0, freeze: low}": "greater than 0",
    "{at: true, freeze: low}": "valid integer",
    "{freeze: low}": "a stage begins at a step",
    "{at: 5, when: plateau, freeze: low}": "give at or when",
    "{at: 5}": "a stage does something",
    "{at: 5, freeze: lwo}": "there is no band 'lwo'\nhint: the bands are: low, mid, high",
    "{at: 5, unfreeze: low}": "unfreeze has no effect: 'low' is not frozen",
    "{at: 5, freeze: low, unfreeze: low}": "frozen and unfrozen at once",
    "{at: 5, freeze: [low, mid, high]}": "may leave nothing to train",
    "{at: 5, expand: {bands: mid, by: 2}}": "'mid' is adalora, whose allocator decides its ranks\nhint: raise",
    "{at: 5, expand: {bands: lwo, by: 2}}": "there is no band 'lwo'",
    "{at: 5, expand: {}}": "give by",
    "{at: 5, expand: {by: 2, times: 2}}": "give one of them",
    "{at: 5, expand: {by: 2, top: 1.5}}": "a share below 1 or a whole number",
    "{at: 5, expand: {by: 0}}": "greater than or equal to 1",
    "{at: 5, expand: {by: 2, budget: few}}": "'few' is not a count",
    "{at: 5, expand: {by: 2}, plateau: {}}": "plateau has no effect without when: plateau",
    "{when: plateau, freeze: low}": "nothing is evaluated\nhint: set training.eval_strategy",
    "{when: plateau, plateau: {window: 5}, freeze: low}": "window has no effect on eval_loss",
    "{when: platau, freeze: low}": "'platau' is not one of: plateau, spectrum\nhint: did you mean 'plateau'?",
    "{when: spectrum, freeze: low}": "it takes expand, and neither freeze nor unfreeze",
    "{when: spectrum, expand: {by: 2}}": "needs expand.to",
    "{when: spectrum, expand: {by: 2, to: 9, top: 3}}": "top has no effect",
    "{when: spectrum, spectrum: {release: 0.9}, expand: {by: 2, to: 9}}": "must be below threshold 0.9",
    "{at: 5, frezee: low}": "unknown key\nhint: did you mean 'freeze'?",
    "5": "must be a mapping",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused_with_its_line(text):
    message = recipe_error(f"{HEAD}  - {{name: before, at: 1, expand: {{by: 1}}}}\n  - {text}\n")
    assert message.startswith("r.yaml:11: stages.1") and REFUSED[text] in message


def test_stages_that_contradict_each_other_are_refused():
    freeze = "  - {at: 5, freeze: [low, mid]}\n"
    assert "'low' is frozen already" in recipe_error(HEAD + freeze + "  - {at: 6, freeze: low}\n")
    assert "every band would be frozen" in recipe_error(HEAD + freeze + "  - {at: 6, freeze: high}\n")
    assert "new ranks would not be trained" in recipe_error(
        HEAD + freeze + "  - {at: 6, expand: {bands: low, by: 1}}\n"
    )
    assert "in the order" in recipe_error(HEAD + freeze + "  - {at: 5, unfreeze: low}\n")
    twice = "  - {name: a, at: 5, freeze: low}\n  - {name: a, at: 6, freeze: mid}\n"
    assert recipe_error(HEAD + twice).startswith("r.yaml:11: stages.1.name: two stages are called 'a'")
    assert stages_of(freeze + "  - {at: 6, expand: {by: 1}}\n")  # the high band is not frozen


def test_a_plateau_may_never_come():
    """So what it would do is not counted on: the low band may be frozen, and may not be."""
    maybe = "  - {when: plateau, plateau: {metric: train_loss}, freeze: [low, mid]}\n"
    assert stages_of(maybe + "  - {at: 50, freeze: low}\n")
    assert stages_of(maybe + "  - {at: 50, unfreeze: low, freeze: high}\n")
    assert "may leave nothing to train" in recipe_error(HEAD + maybe + "  - {at: 50, freeze: high}\n")


def test_several_processes_are_refused():
    text = HEAD + "  - {at: 5, freeze: low}\n"
    for override in ("distributed.processes=2", "distributed.zero_stage=2"):
        message = recipe_error(text, [override])
        assert (
            message.startswith("r.yaml:9: stages: stages need one process") and "hint: set distributed" in message
        )


def test_a_stage_is_told_in_a_line():
    grow, rule, flat = stages_of(
        "  - {name: grow, at: 0.25, expand: {bands: low, top: 0.1, times: 2, budget: 2M}}\n"
        "  - {name: rule, at: 50, when: spectrum, expand: {by: 2, to: 16}}\n"
        "  - {name: flat, when: plateau, plateau: {metric: train_loss}, freeze: low}\n"
    )
    assert grow.told() == (
        "grow: after 0.25 of all steps, expand the 10% most important of low: 2 times the rank, "
        "2,000,000 parameters at most"
    )
    assert rule.told() == (
        "rule: where a rank is nearly used up, after step 50, expand those of all bands: 2 more in rank, up to 16"
    )
    assert flat.told() == "flat: when train_loss stops falling, freeze low"


def test_the_number_of_stages_is_bounded():
    with pytest.raises(ValidationError):
        StageSection(name="a" * 65, at=5, freeze=("low",))
    assert "at most 100 items" in recipe_error(HEAD + "  - {at: 5, freeze: low}\n" * 101)
