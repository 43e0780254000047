"""The report of a run: its numbers are those of the folder's files, whatever state the run is in."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from helpers import TINY, make_recipe, tiny_layout
from report_helpers import (
    MIDDLE_LAYERS,
    STEPS,
    PageText,
    events_of_a_run,
    grown,
    plan_of,
    require_self_contained,
    sample,
    spectra_of,
    write_run,
    write_samples,
)

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import spec_from_config
from qhybrid.errors import RunFolderError
from qhybrid.recipe.load import dump_recipe
from qhybrid.report.colours import VIRIDIS
from qhybrid.report.layout import KINDS
from qhybrid.report.run_facts import read_run
from qhybrid.report.run_report import run_report
from qhybrid.report.samples import require_adapter
from qhybrid.training.run import Run
from qhybrid.units import format_count

SECTIONS = {
    "training", "layout", "ranks", "stages", "importance", "spectra", "memory", "data", "samples", "settings",
}  # fmt: skip


def section(page: str, name: str) -> str:
    """The HTML of one section."""
    found = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    assert found is not None, name
    return found[1]


def sections(page: str) -> set[str]:
    return set(re.findall(r'<section id="(\w+)">', page))


def told(html: str) -> list[str]:
    """What pictures tell on hover."""
    return re.findall(r"<title>(.*?)</title>", html)


def test_numbers_are_those_of_the_run(tmp_path):
    page = run_report(write_run(tmp_path / "run"))
    require_self_contained(page)
    parsed = PageText(page)
    text = parsed.text
    assert sections(page) == SECTIONS - {"stages"}
    assert "run · training run" in text and "finished" in text
    # the head
    layout = tiny_layout()
    assert (
        f"{layout.num_parameters:,} trained parameters, {layout.num_parameters / 1e6:.2%} of the 1,000,000" in text
    )
    assert "tiny, held in 4-bit NF4, fine-tuned on 8 rows for 20 optimizer steps with 3 bands" in text
    for title, value in (
        ("Evaluation loss", "0.1250"),
        ("Training loss", f"{(3 / 19 + 3 / 20) / 2:.4f}"),
        ("Time", "1m 30s"),
        ("Tokens a second", f"{sum(100 + s for s in range(1, STEPS + 1)) / (STEPS * 0.5):.1f}"),
        ("Memory at the peak", "3.00 GiB"),
    ):
        assert f"{title} {value}" in text
    # curves
    training = section(page, "training")
    for step in (1, 7, 20):
        smooth = np.mean([3.0 / s for s in range(max(1, step - 4), step + 1)])
        assert f"training, mean of 5 steps, {step}: {smooth:.6g}" in told(training)
        assert f"lora.A, dora.magnitude, {step}: {float(f'{1e-3 / step:.3g}'):g}".replace("e-0", "e-") in [
            re.sub(r": ([\d.e-]+)$", lambda m: f": {float(m[1]):.3g}".replace("e-0", "e-"), line)
            for line in told(training)
        ]
    assert "held-out rows, 10: 0.25" in told(training) and "held-out rows, 20: 0.125" in told(training)
    assert "from 3.0000 at the first step to" in text and "it went from 0.2500 to 0.1250" in text
    # data
    assert "8 rows to train on. Of 800 tokens 200 are answers" in text and "2 rows could not be used" in text
    assert "train.jsonl dropped invalid JSON 1 3" in text and "a word of warning" in text


def test_the_time_of_a_resumed_run_is_that_of_all_steps(tmp_path):
    """run.json knows the 90 seconds since its last start; each step took half a second."""
    events = events_of_a_run(tiny_layout())
    again = next(i for i, event in enumerate(events) if event["event"] == "step" and event["step"] == 19)
    events.insert(again, {"event": "begin", "step": 18, "total_steps": STEPS})
    text = PageText(run_report(write_run(tmp_path / "run", events=events))).text
    assert f"Time {STEPS // 2}s" in text and "over all starts" in text


def test_the_ranks_of_an_adapter_that_is_not_the_last_one(tmp_path):
    """With load_best_model_at_end that of step 5 was kept, between two choices of AdaLoRA."""
    figures = {"eval_loss": 0.125, "adapter_of_step": 5}
    layout = tiny_layout()
    page = run_report(write_run(tmp_path / "run", figures=figures))
    kept = sum(row.rank for row in layout) - len(layout.of_kind("adalora"))  # from 6 to 5
    assert f"{kept:,} ranks in all" in PageText(page).text
    assert f"was kept is an earlier one, with {kept:,} ranks" in PageText(section(page, "ranks")).text


def test_ranks_over_time(tmp_path):
    layout = tiny_layout()
    page = run_report(write_run(tmp_path / "run"))
    html = section(page, "ranks")
    adaptive = [row.module for row in layout.of_kind("adalora")]
    live = {row.module: row.rank for row in layout} | {m: 1 + i % 6 for i, m in enumerate(adaptive)}
    cells = dict(line.rsplit(": rank ", 1) for line in told(html) if ": rank " in line)
    assert cells == {module: str(rank) for module, rank in live.items()}
    frames = json.loads(next(f["data-frames"] for f in PageText(html).of("figure") if f.get("data-frames")))
    start = sum(row.rank for row in layout)
    after = {4: start - len(adaptive), 8: sum(live.values())}
    assert frames["titles"] == [f"step {step}: {total} ranks" for step, total in {0: start, **after}.items()]
    assert [sum(ranks) for ranks in frames["ranks"]] == [start, *after.values()]
    assert dict(zip(frames["modules"], frames["ranks"][-1], strict=True)) == live
    assert {str(rank) for ranks in frames["ranks"] for rank in ranks} == frames["colours"].keys()
    assert frames["colours"][str(max(live.values()))] == VIRIDIS[-1]
    changed = {row.layer for row in layout if row.rank != live[row.module]}
    assert changed == set(MIDDLE_LAYERS)
    assert f"mid, 8: {sum(live[module] for module in adaptive)}" in told(html)
    assert f"mid: its final budget, 20: {3 * len(adaptive)}" in told(html)
    means = {m: sum(live[r.module] for r in layout if r.layer == m) / 7 for m in MIDDLE_LAYERS}
    assert all(f"at the end, {layer}: {mean:.6g}" in told(html) for layer, mean in means.items())


def test_data_driven_ranks_are_drawn(tmp_path):
    layout = tiny_layout([{"band": "all", "layers": "all", "kind": "lora", "rank": 2}])
    ranks = {row.module: 1 + 2 * row.layer for row in layout}
    rows = {"format_version": 1, "rows": []}
    for row in json.loads(layout.to_json())["rows"]:
        rows["rows"].append({**row, "rank": ranks[row["module"]], "target_rank": ranks[row["module"]]})
    page = run_report(write_run(tmp_path / "run", layout=json.dumps(rows), plan=plan_of(layout), events=[]))
    html = section(page, "ranks")
    assert dict(line.rsplit(": rank ", 1) for line in told(html)) == {m: str(rank) for m, rank in ranks.items()}
    assert "ranks from 1 to 11" in html and "data-frames" not in html
    assert "1–11" in section(page, "layout")


def test_stages(tmp_path):
    start = tiny_layout()
    now = grown(start, "low", 8)
    low = [row.module for row in start.of_band("low")]
    stage = {
        "event": "stage", "step": 6, "stage": "more", "passed_over": False, "frozen": [], "unfroze": [],
        "expanded": {module: {"before": 4, "after": 8, "score": 0.5} for module in low}, "froze": ["high"],
        "num_parameters_before": start.num_parameters, "num_parameters": now.num_parameters,
    }  # fmt: skip
    late = {**stage, "step": 12, "stage": "never", "passed_over": True, "expanded": {}, "froze": []}
    page = run_report(write_run(tmp_path / "run", layout=now, events=[*events_of_a_run(start), stage, late]))
    text = PageText(section(page, "stages")).text
    before, after = f"{start.num_parameters:,}", f"{now.num_parameters:,}"
    assert f"6 more {len(low)} modules from rank 4 to 8; froze high {before} {after}" in text
    assert "12 never passed over" in text
    assert "Ranks changed at 3 steps" in PageText(section(page, "ranks")).text
    frames = json.loads(next(f["data-frames"] for f in PageText(page).of("figure") if f.get("data-frames")))
    by_step = dict(zip((title.split(":")[0] for title in frames["titles"]), frames["ranks"], strict=True))
    place = frames["modules"].index(low[0])
    assert [by_step[step][place] for step in ("step 0", "step 4", "step 6", "step 8")] == [4, 4, 8, 8]


def test_one_change_of_rank_and_a_stage_that_never_began(tmp_path):
    bands = [{"band": "low", "rank": 4}]
    start = build_layout(make_recipe(adapters=bands), spec_from_config(TINY))
    now = grown(start, "low", 8)
    stages = [
        {"name": "more", "at": 6, "expand": {"by": 4}},
        {"name": "last", "when": "plateau", "plateau": {"metric": "train_loss"}, "expand": {"by": 2}},
    ]
    change = {
        "event": "stage", "step": 6, "stage": "more", "passed_over": False, "froze": [], "unfroze": [],
        "expanded": {row.module: {"before": 4, "after": 8, "score": 0.5} for row in start},
        "num_parameters_before": start.num_parameters, "num_parameters": now.num_parameters,
    }  # fmt: skip
    recipe = dump_recipe(make_recipe(adapters=bands, stages=stages))
    page = run_report(
        write_run(tmp_path / "run", layout=now, recipe=recipe, events=[*events_of_a_run(start), change])
    )
    ranks = PageText(section(page, "ranks")).text
    assert "Ranks changed at 1 step:" in ranks and "than they began with. Rank of every module" in ranks
    assert "last has not begun (when train_loss stops falling" in PageText(section(page, "stages")).text
    importance = PageText(section(page, "importance")).text
    assert "By module type" in importance and "By band" not in importance  # one band always has all of it


def test_spectra_and_importance(tmp_path):
    layout = tiny_layout()
    page = run_report(write_run(tmp_path / "run"))
    html = section(page, "spectra")
    assert "after step 20" in html
    last = spectra_of(layout, 20)
    for i, row in enumerate(layout):
        norm = math.sqrt(sum((20 * (i + 1) * 0.5**k) ** 2 for k in range(row.rank)))
        assert f"{row.module}: {norm:.4g}" in told(html)
        assert f"{row.module}: {last[row.module]['energy_rank_99']} of rank {row.rank}" in told(html)
    assert "low: LoRA, 2: 0.5" in told(html) and "high: DoRA, 3: 0.25" in told(html)
    norms = [spectra_of(layout, 10)[row.module]["norm"] for row in layout.of_band("mid")]
    assert f"mid, 10: {np.median(norms):,.6g}" in told(html)
    importance = section(page, "importance")
    total = len(layout) * (len(layout) + 1) / 2
    assert f"{layout.rows[4].module}: {500 / total:.3g} %" in told(importance)
    tenth = sum(range(len(layout) - len(layout) // 10 + 1, len(layout) + 1)) / total
    assert f"has {tenth:.0%} of the sum; first is {layout.rows[-1].module}" in importance


def test_memory(tmp_path):
    page = run_report(write_run(tmp_path / "run"))
    text = PageText(section(page, "memory")).text
    assert "the plan said 2.50 GiB of the host" in text and "Measured were 3.00 GiB" in text
    assert f"{1 - 2.5 / 3:.1%} too low" in text
    assert "process, resident 2.50 GiB 3.00 GiB -16.7%" in text
    assert "adapters 512.00 MiB 20.0% 512.00 MiB" in text and "sum 2.50 GiB 100.0% 4.00 GiB" in text
    bars = told(section(page, "memory"))
    assert "planned, activations: 1.00 GiB" in bars and "backward, backward: 1.00 GiB" in bars


def test_a_gpu(tmp_path):
    gib = 2**30
    plan = plan_of(tiny_layout())
    for one in (plan, plan["for_this_data"]):
        one |= {"device": "cuda", "allocated_bytes": gib, "reserved_bytes": 2 * gib, "budget_bytes": 8 * gib}
    memory = {"process_bytes": gib, "cuda_max_allocated_bytes": gib // 2, "cuda_max_reserved_bytes": gib,
              "cuda_used_bytes": 5 * gib // 4}  # fmt: skip
    events = [{"event": "step", "step": 1, "loss": 1.0, "memory": memory}]
    page = run_report(write_run(tmp_path / "run", plan=plan, events=events, figures={}))
    text = PageText(page).text
    assert "Memory at the peak 1.25 GiB planned 2.50 GiB" in text
    assert "GPU, allocated by tensors 1.00 GiB 512.00 MiB +100.0%" in text
    assert "GPU, of all processes 2.50 GiB 1.25 GiB +100.0%" in text and "there is" in text


def test_samples(tmp_path):
    run = write_run(tmp_path / "run")
    assert "qhybrid report RUN --samples 4" in section(run_report(run), "samples")
    write_samples(run, sample(), sample(adapter="maybe"))
    html = section(run_report(run), "samples")
    text = PageText(html).text
    assert "2 held-out rows, answered greedily. The base model alone gave the expected text in 0 of 2" in text
    assert "with the adapter it came in 1 of 2" in text and "cut off at 9 tokens" in text
    assert text.count(" exact ") == 1 and text.count(" differs ") == 3 and "no …" in text


def test_samples_of_another_adapter_are_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    write_samples(run, sample(prompt="not to be seen"), adapter=b"trained again")
    page = run_report(run)
    assert "not to be seen" not in page and "belongs to an earlier adapter" in page
    (run / "samples.json").write_text('{"samples": 3}')
    assert "samples.json is not as qhybrid writes it" in run_report(run)


def test_an_adapter_that_cannot_be_read_is_told(tmp_path):
    run = write_run(tmp_path / "run", events=[])
    write_samples(run)
    assert "The adapter cannot be read" in section(run_report(run), "spectra")


def test_of_pissa_the_change_is_that_of_the_adapter_and_not_of_the_log(tmp_path):
    """The log's s·B·A has the principal part of the weight in it."""
    run = write_run(tmp_path / "run", layout=tiny_layout([{"rank": 4, "init": "pissa"}]))
    assert "has in it the part of the weight" in section(run_report(run), "spectra")
    write_samples(run)  # an adapter that cannot be read
    assert "The adapter cannot be read" in section(run_report(run), "spectra")


@pytest.mark.parametrize(
    ("status", "badge"),
    [("running", "killed"), ("failed", "failed"), ("interrupted", "interrupted"), ("finished", "finished")],
)
@pytest.mark.parametrize("steps", [None, 0, 1, 9])
def test_runs_that_did_not_get_far(tmp_path, status, badge, steps):
    log = events_of_a_run(tiny_layout())
    events = None if steps is None else [event for event in log if event.get("step", 0) <= steps]
    page = run_report(write_run(tmp_path / "run", status=status, events=events, figures={}))
    require_self_contained(page)
    parsed = PageText(page)
    assert f"run {badge} " in parsed.text
    assert ("training" in sections(page)) == bool(steps)
    assert sections(page) >= {"layout", "ranks", "spectra", "memory", "data", "samples", "settings"}
    if steps:
        assert f"for {steps} of {STEPS} optimizer step" in parsed.text
    if status == "running":
        assert "qhybrid sft --resume auto" in page


def test_a_folder_with_hardly_anything(tmp_path):
    nothing = dict.fromkeys(("layout", "plan", "audit", "events", "recipe"))
    page = run_report(write_run(tmp_path / "run", **nothing, status="failed", figures=None))
    require_self_contained(page)
    assert sections(page) == {"samples", "settings"}
    for name in ("layout.json", "plan.json", "audit.json", "recipe.yaml", "events.jsonl"):
        assert name in page


def test_a_run_of_several_tasks_shows_them_side_by_side(tmp_path):
    nothing = dict.fromkeys(("layout", "audit"))
    run = write_run(tmp_path / "run", **nothing, plan=plan_of(tiny_layout()), events=[])
    for name in ("b", "a"):
        write_run(run / "tasks" / name)
    half = tiny_layout().rows[:21]
    write_run(run / "tasks" / "c", layout=Layout(half), figures=None, status="failed", events=[])
    page = run_report(run)
    require_self_contained(page)
    text = PageText(page).text
    assert f"Each task has a report of its own: qhybrid report {run / 'tasks' / 'a'} ." in text
    a = read_run(run / "tasks" / "a")
    first, last = a.events.in_order[0].loss, a.events.last_tenth_loss
    held_out = a.figures["eval_loss"]
    assert f"{format_count(tiny_layout().num_parameters)} {a.audit.totals['train_rows']} {STEPS}" in text
    assert text.count(f" {STEPS} {first:.4f} {last:.4f} {held_out:.4f}") == 2
    assert f"c failed {KINDS[half[0].kind]}" in text
    dots = [line for line in told(page) if "held-out rows" in line]
    assert any(line.startswith("a, ") for line in dots) and not any(line.startswith("c, ") for line in dots)
    assert "is not there" not in text
    assert "fine-tuned to 3 tasks" in text and "optimizer steps" not in text and "no samples yet" not in text
    with pytest.raises(RunFolderError, match="an adapter for each task"):
        require_adapter(Run(run))
    assert "mean of 5 steps" in PageText(run_report(run / "tasks" / "a")).text


def test_what_happened_is_told(tmp_path):
    log = events_of_a_run(tiny_layout())
    spikes = [{"event": "loss_spike", "step": s, "loss": 9.0, "rows": [f"a.jsonl {n}" for n in range(20)]}
              for s in range(1, 31)]  # fmt: skip
    rest = [
        {"event": "non_finite", "step": 5, "what": "loss", "value": "nan", "rows": ["a.jsonl 3"]},
        {"event": "out_of_memory", "step": 6, "rows": 8, "rows_from_now_on": 4},
        {"event": "interrupted", "error": "Interrupted", "message": "SIGINT"},
        {"event": "begin", "step": 20, "total_steps": 25},
        {"event": "failed", "error": "TrainingError", "message": "the disk is full"},
    ]
    plan = plan_of(tiny_layout())
    plan["rank_caps"] = [{"band": "low", "asked": 16, "got": 4}, {"band": "mid", "asked": 3, "got": 3}]
    plan["rank_caps"].append({"band": "(budget)", "asked": 2000, "got": 1500})
    page = run_report(write_run(tmp_path / "run", status="failed", events=[*log, *spikes, *rest], plan=plan))
    text = PageText(page).text
    assert text.count("The loss leapt to") == 8 and "There were 30 leaps of the loss in all" in text
    assert "a.jsonl 7 …" in text and "a.jsonl 8" not in text
    assert "The loss was nan at step 5; its rows: a.jsonl 3." in text
    assert "Memory ran out at step 6; from then on 4 rows were taken at a time." in text
    assert "The run was interrupted: SIGINT" in text and "resumed after step 20" in text
    assert "The run failed: TrainingError: the disk is full" in text
    assert "Band low gets rank 4 instead of 16" in text and "Band mid" not in text
    assert "The ranks get a budget of 1,500 parameters instead of 2,000" in text


def test_a_long_run_of_a_large_model_stays_small(tmp_path):
    bands = [{"band": "all", "layers": "all", "kind": "adalora", "rank": 8, "adalora": {"init_rank": 12}}]
    layout = tiny_layout(bands, num_hidden_layers=80)
    modules = [row.module for row in layout]
    rates = {"adalora.PQ": 1e-3, "adalora.lambda": 1e-3}
    events: list[dict] = [{"event": "begin", "step": 0, "total_steps": 20_000}]
    for step in range(1, 20_001):
        events.append({"event": "step", "step": step, "loss": 1 + 1 / step, "grad_norm": 1.0, "tokens": 9,
                       "seconds": 1.0, "learning_rates": rates, "memory": {"process_bytes": step}})  # fmt: skip
        if step % 100 == 0:
            live = {module: 1 + (step // 100 + i) % 12 for i, module in enumerate(modules)}
            events.append({"event": "allocation", "step": step, "band": "all", "budget": 1, "live_ranks": live})
    page = run_report(write_run(tmp_path / "run", layout=layout, events=events))
    assert len(page) < 2_000_000
    frames = json.loads(next(f["data-frames"] for f in PageText(page).of("figure") if f.get("data-frames")))
    assert len(frames["ranks"]) == 60 and frames["titles"][-1].startswith("step 20,000")
