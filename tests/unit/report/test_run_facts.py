"""Run folders are read as far as they can be: going on, cut off, resumed, damaged, or none at all."""

from __future__ import annotations

import json
import os

import psutil
import pytest
from helpers import tiny_layout
from report_helpers import STEPS, events_of_a_run, write_run

from qhybrid.errors import RunFolderError
from qhybrid.report.run_facts import read_run
from qhybrid.training.events import read_events


def test_everything_of_a_finished_run_is_read(tmp_path):
    facts = read_run(write_run(tmp_path / "run"))
    assert facts.problems == () and facts.status == "finished" and facts.name == "run"
    assert [step.step for step in facts.events.in_order] == list(range(1, STEPS + 1))
    assert facts.events.steps[5].loss == 3.0 / 5 and facts.events.total_steps == STEPS
    assert facts.events.losses() == [(10.0, 0.25), (20.0, 0.125)]
    assert facts.events.last_tenth_loss == (3.0 / 19 + 3.0 / 20) / 2
    assert facts.expected is not None and facts.expected.needed_bytes == 5 * 2**29
    assert facts.peaks == {"process_bytes": 3 * 2**30}
    assert facts.layout == tiny_layout() and facts.recipe is not None and facts.audit is not None


def test_what_a_resumed_run_took_again_counts_once(tmp_path):
    events = events_of_a_run(tiny_layout())
    first = [event for event in events if event.get("step", 0) <= 12]
    stage = {
        "event": "stage", "stage": "more", "passed_over": False, "expanded": {}, "froze": [], "unfroze": [],
        "num_parameters_before": 1, "num_parameters": 1,
    }  # fmt: skip
    again = [
        {"event": "begin", "step": 6, "total_steps": STEPS},
        {"event": "step", "step": 7, "loss": 77.0},
    ]
    log = [*first, {**stage, "step": 5}, {**stage, "step": 6}, *again]
    facts = read_run(write_run(tmp_path / "run", events=log, status="interrupted", figures={}))
    assert sorted(facts.events.steps) == [1, 2, 3, 4, 5, 6, 7] and facts.events.steps[7].loss == 77.0
    assert facts.events.evaluations == {} and facts.events.spectra == {}
    assert list(facts.events.allocations) == [(4, "mid")]
    assert list(facts.events.stages) == [(5, "more")]  # the one after step 6 begins again


def test_a_log_that_was_cut_off_is_read_up_to_there(tmp_path):
    run = write_run(tmp_path / "run")
    log = run / "events.jsonl"
    content = log.read_bytes() + '{"event": "step", "step": 21, "loss": 1, "note": "é'.encode()[:-1]
    log.write_bytes(content)
    facts = read_run(run)
    assert max(facts.events.steps) == STEPS and facts.problems == ()
    assert len(read_events(log, "step")) == STEPS


def test_lines_of_another_form_are_counted_and_passed_over(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "events.jsonl").open("a") as log:
        for line in (
            {"event": "step", "step": "many", "loss": 1},
            {"event": "step", "step": 21},
            {"event": "evaluation", "eval_loss": 1},
            {"event": "allocation", "step": 3, "band": "mid", "budget": 1, "live_ranks": {"m": "x"}},
            {"event": "spectra", "step": 3, "modules": {"m": 3}},
        ):
            log.write(json.dumps(line) + "\n")
        log.write("[1, 2]\n5\nnot json\n" + "[" * 100_000 + "\n")
    facts = read_run(run)
    assert facts.events.num_unreadable == 5 and max(facts.events.steps) == STEPS
    assert facts.problems == ("5 lines of events.jsonl are not as qhybrid writes them.",)


def test_values_that_are_not_finite_are_read_from_text(tmp_path):
    events = [{"event": "step", "step": 1, "loss": "nan"}, {"event": "evaluation", "step": 1, "eval_loss": "inf"}]
    facts = read_run(write_run(tmp_path / "run", events=events, figures={"peak_process_bytes": "nan"}))
    assert facts.events.steps[1].loss != facts.events.steps[1].loss
    assert facts.events.losses() == [(1.0, float("inf"))]


@pytest.mark.parametrize("name", ["layout.json", "plan.json", "audit.json", "recipe.yaml", "events.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "empty", "list", "binary", "folder"])
def test_a_damaged_file_is_told_and_the_rest_is_read(tmp_path, name, damage):
    run = write_run(tmp_path / "run")
    file = run / name
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes({"empty": b"", "list": b"[1, 2]\n", "binary": b"\xff\xfe\x00\x01"}[damage])
    facts = read_run(run)
    told = " ".join(facts.problems)
    if name != "events.jsonl" or damage in ("missing", "folder"):  # an empty log is one of a run that just began
        assert name in told, facts.problems
    assert (facts.layout is None) == (name == "layout.json")
    assert (facts.plan is None) == (name == "plan.json")
    assert (facts.audit is None) == (name == "audit.json")
    assert bool(facts.events.steps) == (name != "events.jsonl")


def test_a_run_without_its_process_was_killed(tmp_path):
    parent = psutil.Process(os.getppid())
    alive = {"pid": parent.pid, "started": parent.create_time()}
    assert read_run(write_run(tmp_path / "a", status="running", process=alive)).status == "running"
    gone = {**alive, "started": alive["started"] - 100}
    assert read_run(write_run(tmp_path / "b", status="running", process=gone)).status == "killed"
    assert read_run(write_run(tmp_path / "c", status="running", process=[])).status == "killed"


def test_no_run(tmp_path):
    run = write_run(tmp_path / "runs" / "one")
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for folder, hint in (
        (tmp_path / "none", "there is no folder"),
        (tmp_path / "empty", "output_dir"),
        (tmp_path / "runs", f"did you mean {run}"),
        (run / "adapter", f"did you mean its run, {run}"),
        (run / "run.json", "there is no folder"),
    ):
        with pytest.raises(RunFolderError) as caught:
            read_run(folder)
        assert hint in str(caught.value)
