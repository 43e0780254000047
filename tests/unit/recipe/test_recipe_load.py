"""Recipes from text and overrides: right values, and errors with line, section and hint."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import GOOD_RECIPE as GOOD
from helpers import recipe_error as error_of

from qhybrid.errors import RecipeError
from qhybrid.recipe.load import dump_recipe, load_recipe, parse_recipe, resolve
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.shipped import find_shipped, shipped_names


def test_short_forms_and_defaults():
    recipe, notices = parse_recipe(GOOD, "r.yaml")
    assert notices == []
    assert recipe.training.learning_rate == 0.0002
    assert recipe.adapters[0].band == "bottom"
    assert recipe.adapters[0].kind == "lora" and recipe.adapters[0].loraplus_lr_ratio == 4
    assert recipe.data.sources[0].path == "rows.jsonl"
    resolved = resolve(recipe)
    assert resolved.adapters[0].alpha == 16 and resolved.adapters[1].adalora.init_rank == 12
    assert resolved.model.adapter_dtype == "bfloat16"


def test_the_resolved_recipe_reads_back_equal():
    resolved = resolve(parse_recipe(GOOD, "r.yaml")[0])
    again, notices = parse_recipe(dump_recipe(resolved), "resolved.yaml")
    assert again == resolved and notices == []
    assert resolve(again) == again


def test_recipes_are_frozen():
    recipe, _ = parse_recipe(GOOD, "r.yaml")
    with pytest.raises(ValueError):
        recipe.output_dir = "elsewhere"


def test_overrides_by_section_band_and_number():
    recipe, _ = parse_recipe(
        GOOD,
        "r.yaml",
        ["training.learning_rate=1e-4", "adapters.mid.rank=4", "adapters.0.rank=2", "quantization.method=none"],
    )
    assert recipe.training.learning_rate == 0.0001
    assert [band.rank for band in recipe.adapters] == [2, 4]
    assert recipe.quantization.method == "none"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rate", "not an override"),
        ("=3", "not an override"),
        ("adapters.topp.rank=3", "mid"),
        ("adapters.9.rank=3", "0 to 1"),
        ("output_dir.x=3", "single value"),
        ("training.learning_rte=3", "learning_rate"),
        ("training.max_steps=ten", "command line"),
        ("training.max_steps=[", "command line"),
    ],
)
def test_bad_overrides(override, words):
    text = error_of(GOOD, [override])
    assert words in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("learning_rate: 2e-4", "learning_rte: 2e-4", 14, "learning_rate"),
        ("learning_rate: 2e-4", 'learning_rate: "2e-4"', 14, "remove the quotes"),
        ("learning_rate: 2e-4", "learning_rate: .nan", 14, "finite"),
        ("learning_rate: 2e-4", "learning_rate: -1", 14, "greater than or equal to 0"),
        ("learning_rate: 2e-4", "optim: adamw_torc", 14, "adamw_torch"),
        ("learning_rate: 2e-4", "deepspeed: ds.json", 14, "distributed"),
        ("learning_rate: 2e-4", "lora_rank: 8", 14, "unknown key"),
        ("kind: lora+", "kind: lorra", 5, "did you mean 'lora'"),
        ("rank: 8\n  - band", "rank: -8\n  - band", 6, "greater than or equal to 1"),
        ("rank: 8\n  - band", "rank: 8.5\n  - band", 6, "integer"),
        ("rank: 8\n  - band", "rank: true\n  - band", 6, "integer"),
        ("path: org/model", "pth: org/model", 2, "did you mean 'path'"),
        ("output_dir: out", "outptu_dir: out", 15, "did you mean 'output_dir'"),
        ("output_dir: out", "", None, "output_dir: is missing"),
        ("sources: rows.jsonl", "sources: []", 12, "at least 1"),
        ("sources: rows.jsonl", "sources: 3", 12, "list"),
        ("band: mid", "band: bottom", None, "two bands"),
        ("band: mid", "band: a/b", 7, "pattern"),
        ("kind: adalora", "kind: dora\n    dropout: 0.1", 7, "dropout 0"),
        ("kind: adalora", "kind: lora\n    adalora: {init_rank: 9}", 7, "no effect"),
        ("kind: adalora", "kind: adalora\n    init: gaussian", 7, "no effect"),
        (
            "kind: adalora",
            "kind: adalora\n    adalora: {regularizer_weight: 0, regularizer_in_scores: true}",
            10,
            "no effect",
        ),
        ("kind: adalora", "kind: adalora\n    adalora: {init_rank: 4}", 7, "below the target rank"),
        ("learning_rate: 2e-4", "fp16: true", None, "needs model.dtype: float16"),
        ("learning_rate: 2e-4", "eval_steps: 5", None, "no effect"),
        ("learning_rate: 2e-4", "packing_strategy: wrapped", None, "no effect"),
        ("path: org/model", "path: org/model\n  dtype: float16\n  adapter_dtype: bfloat16", 1, "use float32"),
    ],
)  # fmt: skip
def test_errors_name_line_and_remedy(old, new, line, words):
    assert old in GOOD
    text = error_of(GOOD.replace(old, new, 1))
    assert words in text, text
    if line is not None:
        assert f"r.yaml:{line}: " in text, text


def test_all_problems_are_told_at_once():
    text = error_of(GOOD.replace("kind: lora+", "knd: lora").replace("learning_rate", "learning_rte"))
    assert "r.yaml:5" in text and "r.yaml:14" in text


def test_errors_inside_an_override_are_of_the_command_line():
    assert error_of(GOOD, ["data.sources=[{path: a, format: alpca}]"]).startswith(
        "command line: data.sources.0.format"
    )
    assert error_of(GOOD, ["adapters=[{rank: x}]"]).startswith("command line: adapters.0.rank")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("learning_rate: 2e-4", "lr: 2e-4", "training.learning_rate"),
        ("learning_rate: 2e-4", "batch_size: 4", "training.per_device_train_batch_size"),
        ("learning_rate: 2e-4", "packing: yes", "write true or false"),
        ("learning_rate: 2e-4", "report_to: tensorbord", "did you mean 'tensorboard'"),
        ("learning_rate: 2e-4", "max_length: 0", "greater than or equal to 1"),
        ("learning_rate: 2e-4", "load_best_model_at_end: true", "needs training.eval_strategy"),
        ("model:\n  path: org/model", "model: org/model", "must be a mapping of keys, not 'org/model'"),
        ("kind: adalora", "kind: adalora\n    adalora: {warmup: 0.7, final: 0.3}", "no part of the run"),
        ("  learning_rate", "\tlearning_rate", "no tabs"),
    ],
)
def test_hints_say_what_was_meant(old, new, words):
    assert old in GOOD and words in error_of(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "override", "start"),
    [
        ("learning_rate: 2e-4", "eval_steps: 5", None, "r.yaml:14: training.eval_steps has no effect"),
        ("learning_rate: 2e-4", "bf16: true", "model.dtype=float32", "r.yaml:14: training.bf16 needs"),
        (
            "learning_rate: 2e-4",
            "seed: 1",
            "training.packing_strategy=wrapped",
            "command line: training.packing_s",
        ),
        ("band: mid", "band: bottom", None, "r.yaml:3: adapters: two bands are called 'bottom'"),
    ],
)
def test_checks_over_sections_name_the_line_of_what_they_begin_with(old, new, override, start):
    assert old in GOOD
    assert error_of(GOOD.replace(old, new, 1), [override] if override else []).startswith(start)


def test_an_empty_section_leaves_everything_at_its_default():
    recipe, _ = parse_recipe(GOOD.replace("  learning_rate: 2e-4\n", "quantization:\n"), "r")
    assert recipe.training.learning_rate == 2e-4 and recipe.quantization.method == "nf4"


def test_a_band_can_be_named_as_errors_name_it():
    text = GOOD.replace("  - band: mid\n    layers", "  - layers")
    recipe, _ = parse_recipe(text, "r", ["adapters.band1.rank=3", "adapters.bottom.rank=2"])
    assert [(band.band, band.rank) for band in recipe.adapters] == [("bottom", 2), ("band1", 3)]


def test_an_override_of_one_place_leaves_its_anchor_alone():
    text = GOOD.replace(
        "adapters:\n",
        "adapters:\n"
        "  - {band: x, layers: 0, kind: adalora, rank: 4, adalora: &s {init_rank: 8}}\n"
        "  - {band: y, layers: 1, kind: adalora, rank: 4, adalora: *s}\n",
    )
    recipe, _ = parse_recipe(text, "r", ["adapters.x.adalora.init_rank=20"])
    assert [band.init_rank for band in recipe.adapters[:2]] == [20, 8]


def test_home_in_output_dir_is_spelt_out(monkeypatch):
    """transformers expands it for its checkpoints: a folder called ~ would split the run in two."""
    monkeypatch.setenv("HOME", "/home/someone")
    recipe, _ = parse_recipe(GOOD, "r", ["output_dir=~/runs/x"])
    assert recipe.output_dir == "/home/someone/runs/x"


def test_missing_files_suggest_the_nearest(tmp_path):
    (tmp_path / "train.yaml").write_text(GOOD)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(tmp_path / "trian.yaml"))
    assert "train.yaml" in str(caught.value)


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_are_valid_without_notices(name):
    loaded = load_recipe(str(find_shipped(name)))
    assert loaded.notices == ()


def test_the_json_schema_knows_the_short_forms_and_hides_what_is_refused():
    """Editors check shipped recipes against it, so it must take what the loader takes."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    for section, field, kinds in (
        ("DataSection", "sources", {"array", "string", "object"}),
        ("BandSection", "target_modules", {"array", "string"}),
        ("BandSection", "layers", {"string", "integer"}),
    ):
        assert {option["type"] for option in definitions[section]["properties"][field]["anyOf"]} == kinds
    assert "band" not in definitions["BandSection"].get("required", [])
    assert "hub_token" not in definitions["TrainingSection"]["properties"]
    assert "learning_rate" in definitions["TrainingSection"]["properties"]


def test_the_recipe_floors_import_no_torch():
    code = (
        "import sys, qhybrid.recipe.load, qhybrid.architecture.bands, qhybrid.cli.main, qhybrid.cli.recipes;"
        "print([m for m in ('torch', 'transformers', 'peft', 'trl', 'bitsandbytes') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
