"""results.json: read back as it was written, and refused when it is something else."""

from __future__ import annotations

import json

import pytest

from qhybrid.errors import SweepError
from qhybrid.sweep.results import (
    ArmResult,
    Estimate,
    ModuleRank,
    RunResult,
    SweepResults,
    read_results,
    write_results,
)
from qhybrid.sweep.text import as_markdown, table


def arm(name: str, loss: float | None, **changes) -> ArmResult:
    own = {"loss": Estimate(loss, loss - 0.1, loss + 0.1)} if loss is not None else {}
    away = {"loss": Estimate(-0.25, -0.5, -0.125)} if loss is not None and name != "uniform" else {}
    there = loss is not None
    values = {
        "name": name, "description": "lora, uniform", "is_control": name == "uniform",
        "status": "finished" if there else "pruned", "parameters": 1000, "trained_parameters": 1500,
        "mean_rank": 4.0, "ranks": (ModuleRank(0, "q_proj", "lora", 4),),
        "best_learning_rate": 0.001 if there else None, "is_best_at_edge": name == "uniform",
        "seeds": (0,) if there else (), "metrics": own, "differences": away, "seconds": 61.0 if there else None,
        "peak_bytes": 2**30 if there else None, "is_on_front": name == "mine",
    }  # fmt: skip
    return ArmResult(**{**values, **changes})


def results() -> SweepResults:
    run = RunResult(
        "uniform/lr-0.001-seed-0", "uniform", 0.001, 0, "search", True, "finished", 10, 10, {"loss": 2.0}, 61.0,
        5.0, 2**30,
    )  # fmt: skip
    return SweepResults(
        recipe="r.yaml", model="org/model", device="cpu", control="uniform", parameters=1000, metrics=("loss",),
        learning_rates=(0.001,), search_seeds=(0,), seeds=(0,), num_rows=12, jobs=1, threads=2,
        arms=(arm("uniform", 2.0), arm("hopeless", None), arm("mine", 1.75)), runs=(run,), notes=("one seed",),
        versions={"torch": "2"}, date="2026-01-01",
    )  # fmt: skip


def test_it_reads_back_equal(tmp_path):
    file = write_results(results(), tmp_path)
    assert read_results(tmp_path) == read_results(file) == results()
    assert read_results(file).arm("mine").metrics["loss"].mean == 1.75
    assert [run.name for run in read_results(file).runs_of("uniform")] == ["uniform/lr-0.001-seed-0"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content | {"format_version": 99}, "format version 99 is not 1"),
        (lambda content: content | {"arms": [{"name": 3}]}, "arms.0."),
        (lambda content: content | {"surprise": 1}, "surprise"),
        (lambda content: [], "not the results of a sweep"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, change, words):
    file = write_results(results(), tmp_path)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(SweepError, match=words):
        read_results(tmp_path)


def test_a_sweep_that_has_not_ended(tmp_path):
    with pytest.raises(SweepError, match=r"there is no .*results\.json"):
        read_results(tmp_path)


def test_the_table_is_sorted_and_says_what_was_pruned():
    header, rows = table(results())
    assert header[:4] == ["arm", "parameters", "rank", "rate"]
    assert [row[0] for row in rows] == ["mine", "uniform", "hopeless"]
    mine, uniform, hopeless = rows
    assert "-0.2500 [-0.5000, -0.1250] ●" in mine and mine[-1] == "*" and "1m 01s" in mine and "1.00 GiB" in mine
    assert "control" in uniform and "0.001 !" in uniform
    assert "pruned" in hopeless and "–" in hopeless
    text = as_markdown(results())
    assert "- one seed" in text and "| mine | 1,000 |" in text
