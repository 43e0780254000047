"""The report of a run that somebody else wrote: nothing in it runs, leads elsewhere or tells a secret."""

from __future__ import annotations

import json
import os

from helpers import tiny_layout
from report_helpers import (
    PageText,
    audit_of,
    plan_of,
    require_self_contained,
    sample,
    write_run,
    write_samples,
)

from qhybrid.report.run_report import run_report

EVIL = "</title></script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_a_hostile_run(tmp_path):
    layout = json.loads(tiny_layout().to_json())
    for row in layout["rows"]:
        row["band"], row["target"], row["module"] = (row[name] + EVIL for name in ("band", "target", "module"))
        row["layer"] *= 10**8
    modules = [row["module"] for row in layout["rows"]]
    events = [
        {"event": "begin", "step": 0, "total_steps": 3},
        {"event": "step", "step": 1, "loss": 1.0, "learning_rates": {EVIL: 1.0}, "memory": {EVIL: 10**15}},
        {"event": "evaluation", "step": 1, f"{EVIL}loss": 1.0},
        {"event": "loss_spike", "step": 1, "loss": EVIL, "rows": [EVIL, {"a": EVIL}, 3]},
        {"event": "non_finite", "step": EVIL, "what": EVIL, "value": EVIL, "rows": EVIL},
        {"event": "out_of_memory", "step": EVIL, "rows_from_now_on": EVIL},
        {"event": "failed", "error": EVIL, "message": EVIL},
        {"event": "allocation", "step": 1, "band": EVIL, "budget": 1, "live_ranks": {modules[0]: 10**9}},
        {"event": EVIL, EVIL: EVIL},
    ]
    plan = plan_of(tiny_layout())
    plan["for_this_data"] |= {"components": {EVIL: 5}, "moments": {EVIL: 3}, "peak_moment": EVIL}
    plan["rank_caps"] = [{"band": EVIL, "asked": 2, "got": 1}]
    run = write_run(
        tmp_path / "<b>run<&>",
        layout=json.dumps(layout),
        events=events,
        plan=plan,
        audit=audit_of([EVIL]),
        recipe=f"# {EVIL}\n",
        status=EVIL,
        versions={"qhybrid": EVIL, EVIL: EVIL},
    )
    write_samples(run, sample(prompt=EVIL, expected=EVIL, base=EVIL, adapter=EVIL))
    page = run_report(run)
    require_self_contained(page)
    assert "<script>alert" not in page and "<img" not in page and "<b>run" not in page
    assert "<script>alert(1)" in PageText(page).text and len(page) < 2_000_000


def test_secrets_and_home_folders_are_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "very&secret<word>")
    monkeypatch.setenv("HOME", "/home/someone")
    events = [{"event": "failed", "error": "E", "message": "very&secret<word> in /home/someone/x"}]
    run = write_run(tmp_path / "run", events=events, audit=audit_of(["/home/someone/very&secret<word>.jsonl"]))
    write_samples(run, sample(base="hf_abcdefghijklmnopqrstuvwxyz very&secret<word>"))
    page = run_report(run)
    for word in ("very&", "secret&lt;", "secret<", "/home/someone", "hf_abc"):
        assert word not in page
    assert "~/x" in PageText(page).text


def test_links_and_pipes_in_a_run_are_not_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("private: words\n")
    run = write_run(tmp_path / "run")
    write_samples(run, sample())
    for name in ("recipe.yaml", "samples.json", "layout.json"):
        (run / name).unlink()
        (run / name).symlink_to(mine)
    for name in ("plan.json", "events.jsonl"):
        (run / name).unlink()
        os.mkfifo(run / name)
    page = run_report(run)
    assert "private" not in page and page.count("it is no plain file") == 5
