"""The recommender: valid recipes, a reason for each number, and the direction of each axis."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.architecture.bands import layout_of_bands
from qhybrid.architecture.spec import ModelSpec, spec_from_config
from qhybrid.errors import RecipeError
from qhybrid.planner import recommend as module
from qhybrid.planner.recommend import MAX_RANK, MIN_RANK, MULTIPLE, Recommendation, Task, recommend
from qhybrid.recipe.load import parse_recipe
from qhybrid.recipe.training_fields import OWNED_ELSEWHERE, TrainingSection
from qhybrid.sweep.results import read_results
from qhybrid.units import format_count

TASKS = get_args(Task)
DOCS = Path(__file__).parents[3] / "docs" / "recommend.md"
EVIDENCE = DOCS.parent / "data" / "evidence"


def llama(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int | None = None, **more: Any) -> ModelSpec:
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads or heads, "vocab_size": 32000,
    }  # fmt: skip
    return spec_from_config({**config, **more})


SMOLLM2_135M = llama(576, 1536, 30, 9, 3)
LLAMA_2_7B = llama(4096, 11008, 32, 32)
LLAMA_2_13B = llama(5120, 13824, 40, 40)
LLAMA_2_70B = llama(8192, 28672, 80, 64, 8)
SPECS = {
    "SmolLM2-135M": SMOLLM2_135M,
    "Llama-2-7B": LLAMA_2_7B,
    "Llama-2-70B": LLAMA_2_70B,
    "Qwen2.5-0.5B": llama(896, 4864, 24, 14, 2, model_type="qwen2"),
    "Phi-3": llama(3072, 8192, 32, 32, model_type="phi3"),
    "Gemma": llama(2048, 16384, 18, 8, 1, model_type="gemma"),
    "tiny": llama(64, 96, 6, 4, 2),
    "narrow": llama(16, 24, 4, 2, 1),
    "two layers": llama(64, 96, 2, 4),
    "one layer": llama(64, 96, 1, 4),
}
# Growing models whose narrowest module takes MAX_RANK, so that only the size differs.
BY_SIZE = [llama(2048, 5504, 16, 16), llama(3072, 8192, 28, 24), LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B]

tasks, counts = st.sampled_from(TASKS), st.integers(1, 10**8)
specs = st.sampled_from(list(SPECS.values()))


def ranks(found: Recommendation) -> list[int]:
    return [band.rank for band in found.bands]


def leaves(values: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{path}.{key}") if isinstance(value, dict) else {f"{path}.{key}": value}
    return found


@settings(deadline=None)
@given(specs, tasks, counts, st.none() | st.integers(1, 10**5))
def test_every_recommendation_is_a_recipe_whose_layout_builds(spec, task, rows, tokens):
    found = recommend(spec, task=task, rows=rows, tokens_per_row=tokens)
    recipe, notices = parse_recipe(found.to_recipe("some/model"), "recommended.yaml")
    assert notices == []
    assert recipe.adapters == found.bands
    assert {key: getattr(recipe.training, key) for key in found.training} == found.training
    assert recipe.model.path == "some/model" and recipe.data.sources[0].path == "rows.jsonl"
    layout = layout_of_bands(found.bands, spec)
    assert len(layout) == spec.num_layers * len(spec.linears)  # no layer and no linear is left out
    for rank in ranks(found):
        assert MIN_RANK <= rank <= MAX_RANK and rank % MULTIPLE == 0


@settings(deadline=None)
@given(specs, tasks, counts)
def test_every_value_has_a_reason_and_a_source(spec, task, rows):
    found = recommend(spec, task=task, rows=rows)
    expected = leaves(found.training, "training")
    for band in found.bands:
        values = band.model_dump(exclude_unset=True)
        assert values.pop("band") and values.pop("layers")
        expected |= leaves(values, f"adapters.{band.band}")
    assert {choice.name: choice.value for choice in found.choices} == expected
    assert len(found.choices) == len(expected)
    for choice in found.choices:
        assert choice.reason.strip() and choice.source.strip() and "\n" not in choice.reason
    assert set(found.training) <= set(TrainingSection.model_fields) - set(OWNED_ELSEWHERE)


@settings(deadline=None)
@given(specs, tasks, counts, counts, st.none() | st.integers(1, 10**4))
def test_more_rows_never_lower_a_rank(spec, task, one, other, tokens):
    fewer, more = (
        ranks(recommend(spec, task=task, rows=rows, tokens_per_row=tokens)) for rows in sorted((one, other))
    )
    assert fewer[0] <= more[0]


@settings(deadline=None)
@given(specs, tasks, counts, st.integers(1, 10**5), st.integers(1, 10**5))
def test_longer_rows_never_lower_a_rank(spec, task, rows, one, other):
    shorter, longer = (
        ranks(recommend(spec, task=task, rows=rows, tokens_per_row=tokens)) for tokens in sorted((one, other))
    )
    assert shorter[0] <= longer[0]


@settings(deadline=None)
@given(tasks, counts, st.tuples(*[st.integers(0, len(BY_SIZE) - 1)] * 2))
def test_larger_models_never_get_a_higher_rank_or_rate(task, rows, pair):
    small, large = (recommend(BY_SIZE[index], task=task, rows=rows) for index in sorted(pair))
    assert ranks(small)[0] >= ranks(large)[0]
    assert small.training["learning_rate"] >= large.training["learning_rate"]
    assert small.bands[0].dropout >= large.bands[0].dropout


@settings(deadline=None)
@given(specs, tasks, counts)
def test_the_control_has_the_parameters_that_the_bands_end_with(spec, task, rows):
    found = recommend(spec, task=task, rows=rows)
    at_the_end = sum(
        row.target_rank * (row.in_features + row.out_features) for row in layout_of_bands(found.bands, spec)
    )
    assert layout_of_bands((found.control,), spec).num_parameters == at_the_end
    assert found.control.kind in ("lora", "rslora") and found.control.band == "uniform"


@settings(deadline=None)
@given(specs, tasks, counts)
def test_bands_have_one_rank(spec, task, rows):
    assert len(set(ranks(recommend(spec, task=task, rows=rows)))) == 1


@pytest.mark.parametrize(("task", "floor"), [("classification", 8), ("seq2seq", 16), ("reasoning", 32)])
def test_little_data_gets_the_floor_of_the_task(task, floor):
    assert ranks(recommend(LLAMA_2_7B, task=task, rows=10)) == [floor]


def test_rank_follows_the_trained_tokens():
    """2,498,560 parameters for a rank: 40 million tokens need 16.01 of them, so 32; 39 million need 16."""
    assert ranks(recommend(LLAMA_2_7B, task="generation", rows=39_000, tokens_per_row=1000)) == [16, 16, 16]
    found = recommend(LLAMA_2_7B, task="generation", rows=40_000, tokens_per_row=1000)
    assert ranks(found) == [32, 32, 32]
    reason = next(choice.reason for choice in found.choices if choice.name == "adapters.bottom.rank")
    assert "79,953,920 parameters for 40,000,000 trained tokens" in reason


def test_adalora_needs_steps_to_allocate_in():
    few, enough = (recommend(LLAMA_2_7B, task="generation", rows=rows) for rows in (528, 529))  # 99 and 102 steps
    assert [(band.kind, band.layers) for band in few.bands] == [("lora", "all")]
    assert "99 optimizer steps are too few" in few.to_recipe("m")
    assert [band.kind for band in enough.bands] == ["lora", "adalora", "lora"]
    assert enough.bands[1].init_rank == 24


def test_adalora_has_the_rate_and_the_alpha_of_the_evidence():
    """Its best rate at rank 4 was three times uniform LoRA's, at an alpha of 32 to 8."""
    found = read_results(EVIDENCE / "gsm8k_rank4")
    rates = [found.arm(name).best_learning_rate for name in ("uniform", "adalora")]
    for spec in (SMOLLM2_135M, LLAMA_2_7B, LLAMA_2_70B):
        bands = recommend(spec, task="generation", rows=5000).bands
        assert [band.resolved_alpha for band in bands] == [32, 32 * 32 / 8, 32]
        assert [band.lr_ratio for band in bands] == pytest.approx([1, rates[1] / rates[0], 1])


def test_adalora_in_all_layers_is_an_override_of_the_notes():
    found = recommend(LLAMA_2_7B, task="generation", rows=52_000)
    note = next(note for note in found.notes if "third run" in note)
    overrides = re.findall(r"adapters=\[.*?\]|training\.\S+", note)
    recipe, _ = parse_recipe(found.to_recipe("m"), "r.yaml", overrides)
    (band,) = recipe.adapters
    assert (band.kind, band.rank, band.alpha, recipe.training.learning_rate) == ("adalora", 16, 128, 6e-4)
    few = recommend(LLAMA_2_7B, task="generation", rows=100)
    assert not any("third run" in note for note in few.notes)


def test_high_ranks_scale_with_the_root_of_the_rank():
    found = recommend(LLAMA_2_7B, task="reasoning", rows=500_000)
    assert [band.kind for band in found.bands] == ["rslora", "adalora", "rslora"]
    scale = {row.band: row.scaling for row in layout_of_bands(found.bands, LLAMA_2_7B)}
    assert scale["bottom"] == pytest.approx(8 / 128**0.5)


def test_rates_and_dropout_are_those_of_qlora():
    for spec, rate, dropout in ((LLAMA_2_7B, 2e-4, 0.1), (LLAMA_2_13B, 2e-4, 0.1), (LLAMA_2_70B, 1e-4, 0.05)):
        found = recommend(spec, task="generation", rows=5000)
        assert found.training["learning_rate"] == rate
        assert {band.dropout for band in found.bands} == {dropout}


def test_notes_name_the_control_the_assumption_and_what_does_not_fit():
    found = recommend(SMOLLM2_135M, task="reasoning", rows=500_000)
    text = " ".join(found.notes)
    assert "uniform control" in text and "assumption for reasoning" in text and "Not capped to memory" in text
    assert "fewer than that" in text  # 29 million parameters for 256 million tokens
    known = recommend(LLAMA_2_7B, task="reasoning", rows=1000, tokens_per_row=300)
    assert "assumption" not in " ".join(known.notes) and "fewer than that" not in " ".join(known.notes)
    assert "300,000 tokens" in known.notes[1]


def test_the_control_in_the_notes_works_as_an_override():
    found = recommend(LLAMA_2_7B, task="generation", rows=52_000)
    override = re.search(r"adapters=\[.*?\]", found.notes[0])
    assert override
    recipe, _ = parse_recipe(found.to_recipe("m"), "r.yaml", [override[0]])
    assert recipe.adapters[0].model_copy(update={"band": "uniform"}) == found.control


def test_the_recipe_carries_reasons_and_sources():
    text = recommend(LLAMA_2_7B, task="generation", rows=52_000).to_recipe("m")
    assert re.search(r"^    rank: 16  # as everywhere: no profile along the depth.* \[\d+\]$", text, re.M)
    assert re.search(r"^      init_rank: 24  # .+ \[\d+\]$", text, re.M)
    for number in set(re.findall(r"\[(\d+)\]$", text, re.M)):
        assert f"\n# [{number}] " in text
    assert all(len(line) <= 115 for line in text.splitlines())


@pytest.mark.parametrize("path", ["a: b # c", "C:\\models\\x", "日本", "line\nbreak", "", "'", "x" * 300 + " y"])
def test_any_model_path_survives(path):
    text = recommend(LLAMA_2_7B, task="code", rows=100).to_recipe(path or "m")
    assert parse_recipe(text, "r")[0].model.path == (path or "m")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"task": "clasification"}, "did you mean 'classification'"),
        ({"task": "seq2sec"}, "did you mean 'seq2seq'"),
        ({"task": "xyz"}, "known: classification, extraction"),
        ({"task": ""}, "unknown task"),
        ({"rows": 0}, "at least 1 row"),
        ({"rows": -5}, "rows is -5"),
        ({"tokens_per_row": 0}, "tokens_per_row is 0"),
        ({"spec": llama(64, 96, 4, 16, 1)}, "is only 4 wide"),
    ],
)
def test_what_cannot_be_recommended_is_one_message(given, words):
    with pytest.raises(RecipeError) as caught:
        recommend(**{"spec": LLAMA_2_7B, "task": "generation", "rows": 100, **given})
    assert words in str(caught.value)


def test_eight_wide_is_just_wide_enough_for_the_lowest_rank():
    assert ranks(recommend(llama(8, 16, 4, 4), task="code", rows=10**6)) == [MIN_RANK] * 3


def test_tasks_are_case_insensitive_and_the_literal_is_complete():
    assert recommend(LLAMA_2_7B, task=" Generation ", rows=9) == recommend(LLAMA_2_7B, task="generation", rows=9)
    assert recommend(LLAMA_2_7B, task="seq2seq", rows=9) == recommend(LLAMA_2_7B, task="rewriting", rows=9)
    assert set(TASKS) == {*module._PROFILES, *module._ALIASES}


def test_models_of_under_three_layers_get_one_band():
    for name in ("one layer", "two layers"):
        found = recommend(SPECS[name], task="generation", rows=100_000)
        assert [(band.band, band.layers, band.kind) for band in found.bands] == [("all", "all", "lora")]


def test_nothing_of_a_recommendation_can_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recommend(LLAMA_2_7B, task="code", rows=9).bands = ()  # type: ignore[misc]


def docs_table() -> list[str]:
    lines = []
    for name in ("SmolLM2-135M", "Llama-2-7B", "Llama-2-70B"):
        for task, rows in (("classification", 1000), ("generation", 52_000), ("reasoning", 500_000)):
            found = recommend(SPECS[name], task=task, rows=rows)
            star = "*" if found.bands[0].kind == "rslora" else ""
            parameters = layout_of_bands(found.bands, SPECS[name]).num_parameters
            cells = (
                name, f"{task}, {format_count(rows)}", found.notes[1].partition(" ")[0],
                f"{found.bands[0].rank}{star}", " / ".join(f"{band.resolved_alpha:g}" for band in found.bands),
                format_count(parameters), f"{found.training['learning_rate']:g}",
                f"{found.training['num_train_epochs']:g}", f"{found.bands[0].dropout:g}",
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def test_the_table_of_the_docs_is_what_the_code_proposes():
    text = DOCS.read_text(encoding="utf-8")
    for line in docs_table():
        assert line in text
