"""The report of a sweep: its numbers are those of results.json, and it claims what the intervals carry."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import run_cli
from report_helpers import PageText, require_self_contained

from qhybrid.errors import SweepError
from qhybrid.report.comparison import Interval, Point, intervals, scatter
from qhybrid.report.sweep_report import sweep_report
from qhybrid.sweep.results import ArmResult, Estimate, ModuleRank, RunResult, SweepResults, write_results

RATES = (1e-4, 1e-3, 1e-2)


def arm(name: str, loss: float | None, difference: tuple[float, float] | None = None, **changes) -> ArmResult:
    """An arm with a mean loss, and the ends of its difference to the control."""
    ranks = tuple(
        ModuleRank(layer, target, "lora", 1 + layer) for layer in (0, 2) for target in ("q_proj", "v_proj")
    )
    metrics = (
        {} if loss is None else {"loss": Estimate(loss, loss - 0.1, loss + 0.1), "f1": Estimate(0.5, 0.4, 0.6)}
    )
    differences = {}
    if difference is not None:
        low, high = difference
        differences = {"loss": Estimate((low + high) / 2, low, high), "f1": Estimate(0.1, 0.05, 0.15)}
    given = {
        "name": name, "description": f"lora like {name}", "is_control": False, "status": "finished",
        "parameters": 1000, "trained_parameters": 1000, "mean_rank": 2.5, "ranks": ranks,
        "best_learning_rate": 1e-3, "is_best_at_edge": False, "seeds": (0, 1), "metrics": metrics,
        "differences": differences, "seconds": 90.0, "peak_bytes": 3 * 2**30, "is_on_front": False,
    }  # fmt: skip
    return ArmResult(**{**given, **changes})


def run(arm: str, rate: float, seed: int, loss: float | None, **changes) -> RunResult:
    given = {
        "name": f"{arm}/lr-{rate:g}-seed-{seed}", "arm": arm, "learning_rate": rate, "seed": seed,
        "phase": "search", "counts": True, "status": "finished" if loss is not None else "pruned", "step": 9,
        "total_steps": 10, "metrics": {} if loss is None else {"loss": loss, "f1": 0.5}, "seconds": 60.0,
        "other_seconds": 30.0, "peak_bytes": 2**30,
    }  # fmt: skip
    return RunResult(**{**given, **changes})


def results(**changes) -> SweepResults:
    arms = (
        arm("worse", 2.5, (0.2, 0.4), is_best_at_edge=True, best_learning_rate=1e-2),
        arm("uniform", 2.0, is_control=True, is_on_front=True),
        arm("maybe", 1.9, (-0.3, 0.1)),
        arm("better", 1.5, (-0.6, -0.4), is_on_front=True, seconds=150.0),
        arm("gone", None, status="diverged", best_learning_rate=None, seconds=None, peak_bytes=None, seeds=()),
    )
    runs = [run(one.name, rate, 0, 2.0 + i / 8) for one in arms[:4] for i, rate in enumerate(RATES)]
    runs += [run("gone", rate, 0, None, note="loss nan at step 3") for rate in RATES]
    runs += [run("better", 1e-3, 1, 9.0, phase="final")]
    given = {
        "recipe": "article.yaml", "model": "org/model", "device": "cpu", "control": "uniform", "parameters": 1000,
        "metrics": ("loss", "f1"), "learning_rates": RATES, "search_seeds": (0,), "seeds": (0, 1), "num_rows": 50,
        "jobs": 1, "threads": 2, "arms": arms, "runs": tuple(runs), "notes": ("a word of caution",),
        "versions": {"qhybrid": "0.1.0"}, "date": "2026-01-02",
    }  # fmt: skip
    return SweepResults(**{**given, **changes})


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "sweep").mkdir()
    write_results(results(), tmp_path / "sweep")
    return tmp_path / "sweep"


def test_numbers_are_those_of_the_results(folder):
    page = sweep_report(folder)
    require_self_contained(page)
    text = PageText(page).text
    assert "5 ways to spend 1,000 adapter parameters on org/model" in text and "a word of caution" in text
    assert "Best arm better loss 1.5000 [1.4000, 1.6000]" in text
    assert "Clearly better 1 of 4" in text and "Clearly worse 1 of 4" in text
    seconds = 90 * len(results().runs)
    assert f"Time of all runs {seconds // 60}m {seconds % 60:02d}s" in text
    assert "By loss, clearly better than uniform: better; clearly worse: worse. For the other 2 this sweep" in text
    rows = [
        "1 better 0.001 1.5000 [1.4000, 1.6000] -0.5000 [-0.6000, -0.4000] ● 0.5000 [0.4000, 0.6000] +0.1000",
        "2 maybe 0.001 1.9000 [1.8000, 2.0000] -0.1000 [-0.3000, +0.1000] 0.5000",
        "3 uniform (control) 0.001 2.0000 [1.9000, 2.1000] 0.5000 [0.4000, 0.6000] 1m 30s 3.00 GiB *",
        "4 worse 0.01 ! 2.5000 [2.4000, 2.6000] +0.3000 [+0.2000, +0.4000] ●",
        "5 gone – diverged diverged",
    ]
    places = [text.index(row) for row in rows]
    assert places == sorted(places)
    assert "2 maybe lora like maybe 2.50 1,000" in text


def test_pictures_of_a_sweep(folder):
    page = sweep_report(folder)
    told = re.findall(r"<title>(.*?)</title>", page)
    assert told.count("1  better: 1.5000 [1.4000, 1.6000]") == 2  # its line and its dot
    assert "1  better: -0.5000 [-0.6000, -0.4000]" in told and not any("uniform: +0.0" in line for line in told)
    assert "better: memory at the peak, GiB 3, loss 1.5" in told
    assert "better: time of a run&#39;s steps, minutes 2.5, loss 1.5" in [
        line.replace("'", "&#39;") for line in told
    ]
    assert "better, 0.001: 2.125" in told  # the mean over the seeds of the search alone
    assert "layer 2 v_proj: 3" in told
    text = PageText(page).text
    assert (
        "the Pareto front when no other is at least as good in quality, memory and time: better, uniform." in text
    )
    assert "4 worse: best at 0.01" in text and "5 gone: none finished; given up: 0.0001, 0.001, 0.01" in text
    assert "1 better: rank 1 to 3" in text and "loss nan at step 3" in text


def test_one_rate_is_no_search(folder):
    only = tuple(one for one in results().runs if one.learning_rate == 1e-3)
    write_results(results(learning_rates=(1e-3,), runs=only), folder)
    assert '<section id="rates">' not in sweep_report(folder)


def test_every_arm_has_its_own_rates(folder):
    """One rate each, which another sweep found, is no search. What other arms were tried with is not a gap."""
    own = {"worse": 1e-2, "uniform": 1e-3, "maybe": 1e-4, "better": 1e-3, "gone": 1e-2}
    only = tuple(one for one in results().runs if one.learning_rate == own[one.arm])
    write_results(results(runs=only), folder)
    assert '<section id="rates">' not in sweep_report(folder)
    write_results(results(runs=(*only, run("better", 2e-3, 0, 1.0))), folder)
    text = PageText(sweep_report(folder)).text
    assert "1 better: best at 0.001 " in text and "5 gone: none finished; given up: 0.01 " in text


def test_nothing_finished(folder):
    gone = tuple(
        dataclasses.replace(one, metrics={}, differences={}, status="diverged", seconds=None, peak_bytes=None,
                            ranks=(), is_on_front=False, best_learning_rate=None)
        for one in results().arms
    )  # fmt: skip
    write_results(results(arms=gone, runs=()), folder)
    page = sweep_report(folder)
    require_self_contained(page)
    assert "Best arm" not in page and "clearly better than uniform: none" in PageText(page).text
    assert '<section id="front">' not in page and '<section id="maps">' not in page


def test_hostile_results(folder):
    evil = "</title><script>alert(1)</script><img src=x onerror=alert(2)>"
    arms = tuple(dataclasses.replace(one, name=one.name + evil, description=evil) for one in results().arms)
    runs = tuple(dataclasses.replace(one, arm=one.arm + evil, name=evil, note=evil) for one in results().runs)
    changes = {"control": "uniform" + evil, "notes": (evil,), "model": evil, "recipe": evil, "date": evil}
    write_results(results(arms=arms, runs=runs, **changes), folder)
    page = sweep_report(folder)
    require_self_contained(page)
    assert "<script>alert" not in page and "<img" not in page


def test_the_command(folder, tmp_path):
    done = run_cli("report", folder)
    assert done.returncode == 0 and done.stdout.startswith(f"report  {folder / 'report.html'}"), done.stderr
    assert "· sweep" in (folder / "report.html").read_text()
    done = run_cli("report", folder, "--samples", 2)
    assert done.returncode == 2 and "its folder runs/" in done.stderr
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "sweep.json").write_text("{}")
    done = run_cli("report", begun)
    assert done.returncode == 2 and "when all its runs have ended" in done.stderr
    (folder / "results.json").write_text("{}")
    with pytest.raises(SweepError):
        sweep_report(folder)


def test_intervals_are_where_their_values_are():
    rows = [Interval("a", (1.0, 2.0, 4.0), "text a", 2), Interval("b", None, "gone", 7)]
    svg = ElementTree.fromstring(intervals(rows, alt="a", x_label="loss", line=("control", 3.0)))
    lines = {element.get("class"): element for element in svg.iter("line")}
    low, high = (float(lines["whisker c2"].get(name, 0)) for name in ("x1", "x2"))
    control = float(lines["mark"].get("x1", 0))
    (dot,) = svg.iter("circle")
    places = np.array([low, float(dot.get("cx", 0)), control, high])
    assert np.allclose((places - low) / (high - low), [0, 1 / 3, 2 / 3, 1], atol=1e-3)
    assert {"a", "b", "gone", "text a", "control"} <= {element.text for element in svg.iter("text")}


def test_discs_are_where_their_values_are():
    points = [Point(1, "a", 1.0, 10.0, 0), Point(2, "b", 2.0, 20.0, 7), Point(3, "c", 4.0, 15.0, 0)]
    svg = ElementTree.fromstring(scatter(points, alt="a", x_label="x", y_label="y"))
    discs = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in svg.iter("circle")]
    xs, ys = np.array(discs).T
    assert np.allclose((xs - xs[0]) / (xs[2] - xs[0]), [0, 1 / 3, 1], atol=1e-3)
    assert np.allclose((ys[0] - ys) / (ys[0] - ys[1]), [0, 1, 0.5], atol=1e-3)
