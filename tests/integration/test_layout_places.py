"""Bands, schedules and stages that do not fit the model: what is said names file and line of the recipe."""

from __future__ import annotations

import pytest
from helpers import chat_rows, run_cli, write_rows

# Lines 1 to 4; what a test adds begins with line 5.
HEAD = """\
model: {{path: {model}, dtype: float32}}
data: {{sources: {rows}}}
training: {{max_steps: 8}}
output_dir: {folder}/run
"""
BANDS = "adapters:\n  - {band: low, layers: bottom}\n  - band: high\n    layers: top\n    rank: 4\n"
TASKS = "tasks:\n  - {name: plain}\n  - name: deep\n    adapters:\n      - layers: 0-9\n"


@pytest.fixture
def recipe(tmp_path, tiny_model_folder):
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(4))

    def write(text: str):
        file = tmp_path / "r.yaml"
        file.write_text(HEAD.format(model=tiny_model_folder, rows=rows, folder=tmp_path) + text)
        return file

    return write


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("adapters:\n  schedule:\n    name: random\n    budget: 100\n", 8, "a budget of 100 parameters is below"),
        ("adapters:\n  layers: 2\n  schedule: pyramid\n", 7, "schedule pyramid runs over the depth"),
        ("adapters:\n  rank: 4\n  schedule:\n    name: by_module\n    weights:\n      query: 2\n", 10, "'query'"),
        ("adapters:\n  - band: a\n    schedule:\n      name: uniform\n      min_rank: 40\n", 9, "min_rank 40"),
        ("adapters:\n  ranks: gora\n  rank: 4\nquantization: {method: none}\n", None, ""),
        (BANDS.replace("top", "8-9"), 8, "band 'high': layer 9 is out of range"),
        (BANDS.replace("rank: 4", "rank: 999"), 9, "band 'high': rank 999 is above"),
        (BANDS.replace("top", "all"), 7, "bands 'low' and 'high' both claim"),
        ("adapters:\n  band: a\n" + TASKS, 11, "task deep: "),
        ("adapters: {band: a}\nshared:\n  layers: 8-9\ntasks: [{name: a}, {name: b}]\n", 7, "task shared: "),
    ],
)
def test_a_layout_that_does_not_fit(recipe, text, line, words):
    file = recipe(text)
    for command in (("recipes", "show", file, "--layout"), ("plan", file), ("sft", file, "--dry-run")):
        done = run_cli(*command)
        if line is None:
            assert done.returncode == 0, done.stderr
            continue
        assert done.returncode == 2 and f"{file}:{line}: " in done.stderr, (command, done.stderr)
        assert words in done.stderr


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (BANDS + "stages:\n  - at: 2\n    expand:\n      by: 1\n      top: 400\n", 14, "expand.top 400 is more"),
        (BANDS + "stages:\n  - at: 2\n    expand:\n      to: 4\n", 13, "expand.to 4 has no effect"),
        (BANDS + "stages:\n  - at: 2\n    expand:\n      times: 90\n", 12, "may expand"),
        (BANDS + "stages:\n  - at: 2\n    freeze: low\ntraining.optim: adalomo\n", None, ""),
        (
            "adapters:\n  - band: a\n    kind: adalora\n    adalora:\n      warmup: 9\n",
            8,
            "no step to allocate in",
        ),
    ],
)
def test_a_run_that_cannot_go_as_the_recipe_says(recipe, tmp_path, text, line, words):
    if line is None:
        file, place = recipe(text.rpartition("training.optim")[0]), "command line"
        done = run_cli("sft", file, "training.optim=adalomo")
    else:
        file, place = recipe(text), f"{recipe(text)}:{line}"
        done = run_cli("sft", file)
    assert done.returncode == 2 and f"{place}: " in done.stderr and words in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
