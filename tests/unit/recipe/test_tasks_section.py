"""The sections tasks and shared: what a task takes from the recipe, and what is refused where."""

from __future__ import annotations

import json

import pytest
from helpers import recipe_error

from qhybrid.recipe.load import dump_recipe, parse_recipe, resolve
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.tasks import adapter_recipes, task_recipes, with_adapter_recipes

TWO = """\
model: {path: org/model}
adapters:
  - {layers: bottom, rank: 8}
  - {layers: top, rank: 4, kind: dora}
training:
  learning_rate: 2e-4
  max_steps: 10
output_dir: out
tasks:
  - name: math
    weight: 2
    data: {sources: math.jsonl}
    training: {learning_rate: 1e-4}
  - name: para
    data: {sources: [{path: para.jsonl, type: alpaca}]}
    adapters: {name: all, rank: 4}
"""
PLAIN = TWO.replace(", kind: dora", "")
ONE = PLAIN.split("  - name: para")[0].replace("learning_rate: 1e-4", "seed: 3")


def test_a_task_takes_what_it_leaves_out():
    recipe, notices = parse_recipe(TWO, "r.yaml")
    math, para = recipe.tasks
    assert (math.name, math.weight, para.weight) == ("math", 2, 1)
    assert [band.band for band in math.adapters] == ["bottom", "top"] and para.adapters[0].band == "all"
    assert (math.training.learning_rate, math.training.max_steps) == (1e-4, 10)
    assert (para.training.learning_rate, para.training.max_steps) == (2e-4, 10)
    assert para.data.sources[0].format == "alpaca"
    assert [notice.split(":")[1] for notice in notices] == ["16", "15"]  # `name` of a band, `type` of a source


def test_sections_for_all_may_lack_what_each_task_has():
    text = TWO.replace("output_dir: out", "data: {chat_template: chatml, eval_fraction: 0.1}\noutput_dir: out")
    recipe, _ = parse_recipe(
        text.replace("{sources: math.jsonl}", "{sources: math.jsonl, eval_fraction: 0.2}"), "r"
    )
    assert [task.data.chat_template for task in recipe.tasks] == ["chatml", "chatml"]
    assert [task.data.eval_fraction for task in recipe.tasks] == [0.2, 0.1]


def test_each_task_as_a_recipe_of_its_own():
    recipe = resolve(parse_recipe(TWO, "r.yaml")[0])
    own = task_recipes(recipe)
    assert list(own) == ["math", "para"] and own["math"].output_dir == "out/tasks/math"
    for alone in own.values():
        assert not alone.tasks and parse_recipe(dump_recipe(alone), "own")[0] == alone
    assert with_adapter_recipes(recipe, adapter_recipes(recipe)) == recipe


@pytest.mark.parametrize("more", ["", "shared: {rank: 2}\n"])
def test_the_resolved_recipe_reads_back_equal(more):
    resolved = resolve(parse_recipe(PLAIN + more, "r.yaml")[0])
    text = dump_recipe(resolved)
    again, notices = parse_recipe(text, "resolved.yaml")
    assert again == resolved and notices == [] and resolve(again) == again
    assert ("shared:" in text) == bool(more) and "adapters" not in text.split("tasks:")[0]
    if more:
        assert (resolved.shared.band, resolved.shared.alpha, resolved.shared.init) == ("shared", 4, "kaiming")


def test_a_recipe_of_one_adapter_says_nothing_of_tasks():
    text = dump_recipe(task_recipes(parse_recipe(TWO, "r.yaml")[0])["para"])
    assert "tasks:" not in text and "shared:" not in text


def test_overrides_for_all_and_for_one():
    words = [
        "training.max_steps=5",
        "tasks.math.training.learning_rate=3e-4",
        "tasks.para.adapters.all.rank=2",
        "tasks.1.weight=0.5",
        "tasks.math.adapters.top.rank=16",  # which it has from the recipe
        "tasks.para.training.warmup_ratio=0.1",
    ]
    recipe, _ = parse_recipe(TWO, "r.yaml", words)
    math, para = recipe.tasks
    assert (math.training.max_steps, para.training.max_steps) == (5, 5)
    assert math.training.learning_rate == 3e-4 and para.adapters[0].rank == 2 and para.weight == 0.5
    assert [(band.rank, band.kind) for band in math.adapters] == [(8, "lora"), (16, "dora")]
    assert para.training.warmup_steps == 0.1
    # What all replace is of no effect in a file, but not on the command line.
    both, _ = parse_recipe(TWO, "r.yaml", ["tasks.math.training.max_steps=3", "tasks.para.training.max_steps=4"])
    assert [task.training.max_steps for task in both.tasks] == [3, 4]


def test_ranks_and_stages_of_tasks():
    ranked = TWO.replace("output_dir", "schedule: increasing\nstages: [{at: 5, freeze: bottom}]\noutput_dir")
    ranked = ranked.replace(
        "{name: all, rank: 4}", "{ranks: {method: eva, budget: 2M}, bands: [{name: all}]}\n    stages: []"
    )
    recipe = resolve(parse_recipe(ranked, "r.yaml")[0])
    math, para = task_recipes(recipe).values()
    assert math.schedule.name == "increasing" and math.stages[0].name == "stage0"
    # Adapters of its own come with ranks of their own.
    assert (
        para.schedule is None and (para.ranks.method, para.rank_budget) == ("eva", 2_000_000) and not para.stages
    )
    text = dump_recipe(recipe)
    assert parse_recipe(text, "resolved.yaml")[0] == recipe and "schedule" not in text.split("tasks:")[0]
    assert with_adapter_recipes(recipe, adapter_recipes(recipe)) == recipe
    words = [
        "tasks.para.adapters.ranks.budget=3M",
        "tasks.para.adapters.bands.all.kind=rslora",
        "tasks.math.adapters.top.rank=16",  # its own adapters now, which keep the schedule
        "tasks.math.stages.0.at=6",
    ]
    changed, _ = parse_recipe(ranked, "r.yaml", words)
    math, para = task_recipes(changed).values()
    assert para.rank_budget == 3_000_000 and para.adapters[0].kind == "rslora"
    assert math.adapters[1].rank == 16 and math.schedule.name == "increasing" and math.stages[0].at == 6
    whole, _ = parse_recipe(ranked, "r.yaml", ["tasks.math.adapters=[{rank: 2}]", "tasks.math.stages=[]"])
    assert whole.tasks[0].schedule is None and whole.schedule is None and whole.adapters[0].rank == 2


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        (("name: para", "name: math"), "r.yaml:14: tasks.1.name", "two tasks are called 'math'"),
        (("name: para", "name: a/b"), "r.yaml:14: tasks.1.name", "should match"),
        (("name: para", "nam: para"), "r.yaml:14: tasks.1.nam", "did you mean 'name'"),
        (("weight: 2", "weight: 0"), "r.yaml:11: tasks.0.weight", "greater than 0"),
        (("weight: 2", "weight: -1"), "r.yaml:11: tasks.0.weight", "greater than 0"),
        (("    data: {sources: math.jsonl}\n", ""), "r.yaml:10: tasks.0.data", "is missing"),
        (("{sources: math.jsonl}", "{eval_fraction: 0.1}"), "tasks.0.data.sources", "is missing"),
        (("learning_rate: 1e-4", "learning_rat: 1e-4"), "r.yaml:13: tasks.0.training.learning_rat", "unknown key"),
        (("max_steps: 10", "max_stepz: 10"), "r.yaml:7: training.max_stepz", "unknown key"),
        (("max_steps: 10", "max_steps: x"), "r.yaml:7: training.max_steps", "valid integer"),
        (("rank: 8", "rank: 0"), "r.yaml:3: adapters.0.rank", "greater than or equal to 1"),
        (("learning_rate: 1e-4", "use_cpu: true"), "r.yaml:14: tasks.1.training.use_cpu", "the whole process"),
        (("learning_rate: 1e-4", "eval_strategy: steps"), "r.yaml:10: tasks.0", "eval_strategy needs data"),
        (("learning_rate: 1e-4", "report_to: wandb"), "tasks.0.training.report_to", "tensorboard alone"),
        (("max_steps: 10", "max_steps: 10\n  report_to: [mlflow]"), "r.yaml:8: training.report_to", "tensorboard"),
        (("output_dir", "distributed: {processes: 2}\noutput_dir"), "r.yaml:8: distributed", "in one process"),
        (("output_dir", "distributed: {zero_stage: 2}\noutput_dir"), "r.yaml:8: distributed", "without ZeRO"),
        (("output_dir", "data: {sources: x.jsonl}\noutput_dir"), "r.yaml:8: data.sources", "has no effect"),
        (("    adapters: {", "    training: {learning_rate: 1}\n    adapters: {"), "r.yaml:6: training.learning",
         "no effect"),
        (("output_dir", "stages: [{at: 5, freeze: bottom}]\noutput_dir"), "r.yaml:8: task para: stages.0.freeze",
         "no band 'bottom'"),
        (("output_dir", "stages: [{at: 50, freeze: top}]\noutput_dir"), "r.yaml:8: stages.0.at", "with step 10"),
        (("{name: all, rank: 4}", "{rank: 4, init: pissa}"), "r.yaml:16: tasks.1.adapters.0.init", "same ones"),
        (("rank: 8}", "rank: 8, init: pissa}"), "r.yaml:3: adapters.0.init", "pissa takes a part"),
        (("{name: all, rank: 4}", "{schedule: {name: random, ratio: 0}}"), "tasks.1.schedule.ratio", "greater"),
        (("{name: all, rank: 4}", "{ranks: gora, kind: adalora}"), "r.yaml:14: tasks.1", "finds its own"),
        (("output_dir", "sweep: {arms: [uniform, random], rank: 4, learning_rates: [1]}\noutput_dir"), "r.yaml:8",
         "of one task"),
    ],
)  # fmt: skip
def test_what_is_refused_says_where(change, place, words):
    assert change[0] in TWO
    message = recipe_error(TWO.replace(*change))
    assert message.startswith("r.yaml:") and place in message and words in message, message
    assert len(message.splitlines()) <= 2, message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TWO + "shared: {rank: 8}\n", "adapters.1.kind: dora makes no sum"),
        (PLAIN + "shared: {rank: 8, kind: adalora}\n", "r.yaml:17: shared.kind: adalora makes no sum"),
        (PLAIN + "shared: {rank: 0}\n", "r.yaml:17: shared.rank"),
        (PLAIN + "shared: {rnk: 8}\n", "did you mean 'rank'"),
        (PLAIN.replace("para", "shared") + "shared: {rank: 8}\n", "tasks.1.name: beside shared"),
        (PLAIN.replace("{learning_rate: 1e-4}", "{optim: adamw_8bit}") + "shared: {rank: 8}\n", "one for all"),
        (PLAIN.replace("max_steps: 10", "optim: schedule_free_adamw") + "shared: {rank: 8}\n", "share its states"),
        (
            PLAIN.replace("max_steps: 10", "preconditioner: riemannian") + "shared: {rank: 8}\n",
            "two adapters in one",
        ),
        (
            PLAIN.replace("output_dir", "ranks: gora\noutput_dir") + "shared: {rank: 8}\n",
            "ranks: data cannot decide",
        ),
        (
            PLAIN.replace("  - name: para", "    stages: [{at: 5, freeze: top}]\n  - name: para")
            + "shared: {rank: 8}\n",
            "tasks.0.stages: beside shared an adapter stays",
        ),
        (PLAIN + "shared: {rank: 8, init: pissa}\n", "shared.init: pissa takes a part"),
        (
            PLAIN.replace("output_dir", "stages: [{at: 5, freeze: bot}]\noutput_dir"),
            "r.yaml:8: stages.0.freeze: stage 'stage0': there is no band 'bot'\nhint: the bands are: bottom, top",
        ),
        (PLAIN.replace("max_steps: 10", "save_only_model: true") + "shared: {rank: 8}\n", "to go on from"),
        (
            TWO.split("tasks:")[0] + "data: {sources: x}\nshared: {rank: 8}\n",
            "shared: has no effect without tasks",
        ),
        (ONE + "shared: {rank: 8}\n", "shared: has no effect with a single task"),
        (TWO.split("tasks:")[0] + "tasks: []\n", "r.yaml:9: tasks: is empty"),
        (TWO.split("tasks:")[0] + "data: {sources: x}\ntasks: 3\n", "r.yaml:10: tasks: should be a valid list"),
        (TWO.split("tasks:")[0] + "data: {sources: x}\ntasks: [3]\n", "r.yaml:10: tasks.0: must be a mapping"),
        (TWO.split("tasks:")[0] + "tasks: [{}]\n", "tasks.0.name: is missing"),
    ],
)
def test_sections_that_do_not_go_together(text, words):
    assert words in recipe_error(text)


def test_editors_are_told_that_tasks_have_the_sections():
    schema = Recipe.model_json_schema()
    assert set(schema["required"]) == {"model", "output_dir"}
    assert {"required": ["tasks"]} in schema["anyOf"]
    assert schema["$defs"]["TaskSection"]["required"] == ["name"]
    json.dumps(schema)
