"""The plan of several tasks: one base, the adapters and states of all, the activations of the largest."""

from __future__ import annotations

import dataclasses
import json

import pytest
from helpers import TINY, run_cli

from qhybrid.architecture.catalog import find_model
from qhybrid.architecture.spec import spec_from_config
from qhybrid.planner.plan import Budget, RankCap, make_plan
from qhybrid.planner.solve import with_ranks
from qhybrid.planner.tasks import (
    lower_ranks,
    plan_tasks,
    task_caps,
    task_override,
    task_overrides_between,
    ways_to_fit_tasks,
    with_task_caps,
)
from qhybrid.recipe.load import parse_recipe, resolve
from qhybrid.recipe.tasks import adapter_recipes, task_recipes
from qhybrid.training.planning import smaller_plan

TEXT = """\
model: {path: llama-2-7b}
adapters:
  - {layers: bottom, rank: 16}
  - {band: rest, layers: 33%-100%, kind: adalora, rank: 8}
training: {per_device_train_batch_size: 4, max_length: 1024, gradient_accumulation_steps: 2}
output_dir: out
tasks:
  - {name: math, data: {sources: math.jsonl}}
  - name: para
    data: {sources: para.jsonl}
    adapters: [{rank: 64, kind: dora}]
    training: {max_length: 2048, gradient_accumulation_steps: 1}
  - name: small.one
    data: {sources: small.jsonl}
    adapters: [{rank: 8, kind: rslora}]
    training: {per_device_train_batch_size: 1}
"""
SHARED = TEXT.replace("kind: adalora, ", "").replace(", kind: dora", "") + "shared: {rank: 32}\n"
UNCHECKED = TEXT.replace("max_length: 1024,", "max_length: 1024, gradient_checkpointing: false,")
STATES = ("adapters", "optimizer states", "AdaLoRA scores", "DoRA norms")


def recipe_of(text: str, *words: str):
    return resolve(parse_recipe(text, "tasks", words)[0])


def spec_of(name: str = "llama-2-7b"):
    found = find_model(name)
    assert found is not None
    return spec_from_config(found.config)


SPEC = spec_of()


def states_of(plan) -> int:
    return sum(plan.prediction.components.get(name, 0) for name in STATES)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_all_adapters_and_one_set_of_activations(device):
    recipe = recipe_of(TEXT)
    whole = plan_tasks(recipe, SPEC, Budget(None), device=device)
    alone = {name: make_plan(own, SPEC, Budget(None), device=device) for name, own in task_recipes(recipe).items()}
    assert whole.largest_task == "para"
    assert states_of(whole) == sum(states_of(plan) for plan in alone.values())
    for name in ("base weights", "unquantised weights"):
        assert whole.prediction.components[name] == alone["math"].prediction.components[name]
    others = sum(states_of(plan) for name, plan in alone.items() if name != "para")
    assert whole.prediction.peak == alone["para"].prediction.peak + others
    assert sum(whole.prediction.components.values()) == whole.prediction.peak
    for moment, size in alone["para"].prediction.moments.items():
        assert whole.prediction.moments[moment] >= size + others
    assert set(whole.prediction.bands) == {"math.bottom", "math.rest", "para.all", "small.one.all"}
    assert sum(whole.prediction.bands.values()) == whole.prediction.components["adapters"]
    assert whole.layout.num_parameters == sum(plan.layout.num_parameters for plan in alone.values())
    if device == "cuda":  # each loop has a thread of its own, with a workspace of cuBLAS
        assert whole.workspace == 2 * alone["math"].workspace


def test_one_task_is_planned_as_a_recipe_of_its_own():
    text = TEXT.split("  - name: para")[0]
    recipe = recipe_of(text)
    one, other = (
        plan_tasks(recipe, SPEC, Budget(None)),
        make_plan(task_recipes(recipe)["math"], SPEC, Budget(None)),
    )
    assert one.needed == other.needed and one.prediction.moments == other.prediction.moments


def test_what_all_share_is_there_once():
    recipe = recipe_of(SHARED)
    parts = adapter_recipes(recipe)
    whole = plan_tasks(recipe, SPEC, Budget(None))
    alone = {name: make_plan(part, SPEC, Budget(None)) for name, part in parts.items()}
    assert states_of(whole) == sum(states_of(plan) for plan in alone.values())
    assert list(whole.prediction.bands) == ["shared", "math.bottom", "math.rest", "para.all", "small.one.all"]
    # A step has the activations of both adapters.
    bare = plan_tasks(recipe_of(SHARED.split("shared:")[0]), SPEC, Budget(None))
    passing = [plan.prediction.peak - plan.prediction.moments["model and states"] for plan in (whole, bare)]
    assert passing[0] > passing[1]


@pytest.mark.parametrize("text", [TEXT, SHARED])
def test_ranks_are_lowered_together_until_it_fits(text):
    recipe = recipe_of(text)
    asked = plan_tasks(recipe, SPEC, Budget(None))
    limit = Budget(asked.needed - states_of(asked) // 3)
    got = lower_ranks(recipe, SPEC, lambda tried: plan_tasks(tried, SPEC, limit))
    assert got is not None
    fitting = plan_tasks(got, SPEC, limit)
    assert fitting.fits and limit.vram - fitting.needed < 0.1 * states_of(asked)
    caps = task_caps(recipe, got)
    assert all(cap.got < cap.asked for cap in caps) and len(caps) == (5 if recipe.shared else 4)
    shares = [cap.got / cap.asked for cap in caps]
    assert max(shares) - min(shares) < 0.3
    assert with_task_caps(recipe, caps) == got and with_task_caps(got, caps) == got
    # The words that are proposed do the same.
    words = task_overrides_between(recipe, got)
    again = recipe_of(text, *words)
    assert task_caps(recipe, again) == caps
    nothing = plan_tasks(recipe, SPEC, Budget(None)).needed // 4
    assert lower_ranks(recipe, SPEC, lambda tried: plan_tasks(tried, SPEC, Budget(nothing))) is None


@pytest.mark.parametrize(("text", "gib"), [(TEXT, 7.0), (TEXT, 6.0), (SHARED, 7.0), (UNCHECKED, 12.0)])
def test_changes_that_are_proposed_make_it_fit(text, gib):
    recipe, limit = recipe_of(text), Budget(int(gib * 2**30))
    changes, enough = ways_to_fit_tasks(recipe, SPEC, lambda tried: plan_tasks(tried, SPEC, limit))
    words = [word for change in changes for words in change.overrides for word in words.split()]
    assert enough and words and any(word.startswith("tasks.para.") for word in words)
    assert plan_tasks(recipe_of(text, *words), SPEC, limit).fits
    assert sum(change.saves for change in changes) > 0


def test_the_words_for_one_task():
    recipe = recipe_of(TEXT)
    assert task_override(recipe, "para", "training.max_length=512") == "tasks.para.training.max_length=512"
    assert task_override(recipe, "small.one", "adapters.all.rank=4") == "tasks.2.adapters.all.rank=4"
    assert task_override(recipe, "para", "model.dtype=bfloat16") == "model.dtype=bfloat16"
    for_all = task_override(recipe, "para", "training.optim=sgd").split()  # beside shared it must be one
    assert for_all == [
        "tasks.math.training.optim=sgd",
        "tasks.para.training.optim=sgd",
        "tasks.2.training.optim=sgd",
    ]
    own = task_recipes(recipe)["para"]
    expected = plan_tasks(recipe, SPEC, Budget(10 * 2**30))
    words = smaller_plan(own, SPEC, expected, 2048, lambda word: task_override(recipe, "para", word)).split()
    assert words and any(word.startswith("tasks.para.") for word in words)
    assert task_recipes(recipe_of(TEXT, *words))["para"] != own


def test_caps_of_another_recipe_are_left_alone():
    recipe = recipe_of(TEXT)
    parts = adapter_recipes(recipe)
    caps = task_caps(recipe, recipe)
    assert with_task_caps(recipe, caps) == recipe
    assert with_task_caps(recipe, caps[1:]) is recipe
    other = tuple(dataclasses.replace(cap, asked=cap.asked + 1, got=4) for cap in caps)
    assert with_task_caps(recipe, other) is recipe
    assert with_ranks(parts["math"], {"bottom": 16}) == parts["math"]


def test_the_plan_command(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(TEXT)
    shown = run_cli("plan", file, "--gpu", "RTX 4090")
    assert shown.returncode == 0 and "task      para: 4 x 2,048 tokens" in shown.stdout
    assert "assumed: activations of one task at a time; para takes most" in shown.stdout
    short = run_cli("plan", file, "--vram", "7GiB")
    assert short.returncode == 1 and "to make it fit:" in short.stdout and "tasks.para.training" in short.stdout
    assert "qhybrid sft lowers the ranks" in run_cli("plan", file, "--vram", "10GiB").stdout
    content = json.loads(run_cli("plan", file, "--json").stdout)
    assert content["largest_task"] == "para" and "math.bottom" in content["adapters_by_band"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    assert run_cli("plan", file, "tasks.para.adapters.all.rank=8", "--config", config).returncode == 0
    for option in (("--solve", "rank", "--vram", "8GiB"), ("--simulate",)):
        refused = run_cli("plan", file, *option)
        assert refused.returncode == 2 and "tasks" in refused.stderr
    many = run_cli("plan", file, "tasks.para.adapters.all.layers=40")
    assert many.returncode == 2 and "40" in many.stderr


def test_caps_in_words():
    """A band may be called budget, and is none."""
    told = {RankCap(name, 16, 4).told for name in ("budget", "sql.budget", "sql.(budget)")}
    assert told == {
        "band budget gets rank 4 instead of 16",
        "band sql.budget gets rank 4 instead of 16",
        "the ranks of task sql get a budget of 4 parameters instead of 16",
    }
