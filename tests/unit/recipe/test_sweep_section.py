"""The sweep's section of a recipe: what is refused, with its line."""

from __future__ import annotations

import pytest
from helpers import recipe_error

from qhybrid.recipe.load import parse_recipe
from qhybrid.recipe.sweep import folder_name

GOOD = """\
model: {path: org/model}
adapters: [{rank: 8}]
data: {sources: a.jsonl, eval_sources: b.jsonl}
training: {eval_strategy: steps, eval_steps: 5}
sweep:
  rank: 4
  arms:
    - uniform
    - random
    - name: mine
      adapters:
        schedule: pyramid
        bands:
          - {layers: bottom, kind: lora+}
          - {layers: top, kind: dora}
      training: {weight_decay: 0.1}
  learning_rates: [1e-4, 3e-4]
  seeds: [0, 1]
  measure: {metrics: [loss, f1], labels: [yes, no]}
  prune: {percentile: 50}
output_dir: out
"""


def test_what_is_written_is_what_is_read():
    recipe, notices = parse_recipe(GOOD, "r.yaml")
    sweep = recipe.sweep
    assert notices == [] and sweep is not None
    assert [arm.name for arm in sweep.all_arms] == ["uniform", "random", "mine"]
    mine = sweep.arms[2]
    assert mine.schedule.name == "pyramid" and [band.band for band in mine.adapters] == ["bottom", "top"]
    assert mine.adapters[0].loraplus_lr_ratio == 4
    assert sweep.measure.labels == ("yes", "no") and sweep.seeds_of_search == (0,)


def test_the_control_comes_first_and_groups_are_resolved():
    text = GOOD.replace("- uniform\n    - random", "- article\n    - maps")
    sweep = parse_recipe(text, "r.yaml")[0].sweep
    names = [arm.name for arm in sweep.all_arms]
    assert names[0] == "uniform" and names.count("uniform") == 1 and len(names) == 6 + 7 + 1


def test_an_override_reaches_into_it():
    assert parse_recipe(GOOD, "r.yaml", ["sweep.rank=2", "sweep.seeds=[5]"])[0].sweep.seeds == (5,)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("- random", "- randm", 9, "did you mean 'random'"),
        ("    - uniform\n", "", 5, "the control 'uniform' is not among the arms"),
        ("- uniform", "- {arm: increasing, name: uniform}", 5, "the control 'uniform' is not one of"),
        ("weight_decay", "weight_dekay", 16, "did you mean 'weight_decay'"),
        ("weight_decay: 0.1", "seed: 3", 10, "training.seed of an arm is set by sweep.seeds"),
        ("kind: dora}", "kind: dorra}", 15, "did you mean 'dora'"),
        ("schedule: pyramid", "schedule: pyramyd", 12, "did you mean 'pyramid'"),
        ("- random", "- {name: empty}", 9, "the arm is empty"),
        ("- random", "- {arm: random, schedule: middle}", 9, "is built in, and has adapters of its own"),
        ("- random", "- {adapters: [{rank: 4}]}", 9, "needs a name"),
        ("- random", "- {arm: maps, name: m}", 9, "which is a group of arms"),
        ("- random", "- uniform", 5, "two arms are called 'uniform'"),
        ("name: mine", "name: ../mine", 10, "should match pattern"),
        ("  rank: 4\n", "", 5, "the budget is given by rank or by parameters"),
        ("rank: 4\n", "rank: 4\n  parameters: 2M\n", 5, "give one of them"),
        ("f1]", "f2]", 19, "'f2' is not one of: loss, exact_match, accuracy, f1, macro_f1"),
        (", labels: [yes, no]", "", 19, "f1 needs labels"),
        ("loss, f1", "loss", 19, "labels have no effect"),
        ("[yes, no]", "[yes]", 19, "at least 2 items"),
        ("[yes, no]", "[yes, yes]", 19, "a label is named twice"),
        ("[yes, no]", "[yes, no], answer_after: x", 19, "answer_after has no effect"),
        ("[1e-4, 3e-4]", "[]", 17, "at least 1 item"),
        ("[1e-4, 3e-4]", "[1e-4, 1e-4]", 17, "learning_rates has a value twice"),
        ("- random", "- {arm: random, learning_rates: [1e-4, 1e-4]}", 9, "learning_rates has a value twice"),
        ("- random", "- {arm: random, learning_rates: []}", 9, "at least 1 item"),
        ("weight_decay: 0.1", "learning_rate: 1e-3", 10, "is set by learning_rates, its own or the sweep's"),
        ("[1e-4, 3e-4]", "[-1.0]", 17, "greater than 0"),
        ("[1e-4, 3e-4]", "{low: 1e-4, high: 1e-3}", 17, "{low: 1e-4, high: 3e-3, trials: 4}"),
        ("[1e-4, 3e-4]", "{low: 1e-3, high: 1e-4, trials: 3}", 17, "low is above 0 and below high"),
        ("seeds: [0, 1]", "seeds: []", 18, "at least 1 item"),
        ("seeds: [0, 1]", "seeds: [0, 0]", 5, "seeds has a value twice"),
        ("percentile: 50", "percentile: 100", 20, "less than 100"),
        ("  rank: 4", "  rnak: 4", 6, "did you mean 'rank'"),
    ],
)  # fmt: skip
def test_refusals_name_the_line(old, new, line, words):
    assert old in GOOD
    message = recipe_error(GOOD.replace(old, new, 1))
    assert words in message and f"r.yaml:{line}: " in message


@pytest.mark.parametrize(
    ("old", "words"),
    [
        (", eval_sources: b.jsonl", "needs data.eval_sources"),
        ("training: {eval_strategy: steps, eval_steps: 5}\n", "sweep.prune needs training.eval_strategy: steps"),
        ("    - random\n    - name: mine\n", ""),
    ],
)
def test_sections_must_agree(old, words):
    assert words in recipe_error(GOOD.replace(old, ""))


def test_folders_of_runs_differ():
    names = {folder_name(rate, seed) for rate in (1e-4, 1.5e-4, 1.5000001e-4, 0.1) for seed in (0, 10)}
    assert len(names) == 8 and "lr-0.00015-seed-10" in names
