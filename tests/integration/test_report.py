"""`qhybrid report` on real runs: the page beside what other commands say, samples, places, and refusals."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from helpers import run_cli, run_recipe
from report_helpers import PageText, require_self_contained
from rich.console import Console

from qhybrid.evaluation.evaluate import evaluate
from qhybrid.evaluation.models import load_adapter_for_inference
from qhybrid.export.derive.inspect import inspect_adapter
from qhybrid.recipe.schema import SourceSection
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished[1].run.folder, tmp_path / "run"))


def test_the_page_says_what_the_run_says(finished, run):
    done = run_cli("report", run)
    assert done.returncode == 0 and done.stdout.startswith(f"report  {run / 'report.html'} ("), done.stderr
    page = (run / "report.html").read_text(encoding="utf-8")
    require_self_contained(page)
    text, told = PageText(page).text, re.findall(r"<title>(.*?)</title>", page)
    figures = finished[1].figures
    assert f"Evaluation loss {figures['eval_loss']:.4f}" in text
    assert f"Training loss {figures['last_tenth_loss']:.4f}" in text
    for record in read_events(run / "events.jsonl", "evaluation"):
        assert any(
            line.startswith(f"held-out rows, {record['step']}: ")
            and math.isclose(float(line.split(": ")[1]), record["eval_loss"], rel_tol=1e-5)
            for line in told
        )
    for module in inspect_adapter(run / "adapter").modules:
        assert f"{module.module}: {module.norm:.4g}" in told
        assert f"{module.module}: {module.energy_rank_99} of rank {module.live_rank}" in told
        assert f"{module.module}: rank {module.live_rank}" in told  # live ranks, of the last allocation
    assert len(page) < 1_000_000 and "problem" not in text and "cannot be read" not in text


def test_samples_are_those_of_qhybrid_eval_and_are_kept(finished, run, monkeypatch):
    done = run_cli("report", run, "--samples", 3, "--max-new-tokens", 12)
    assert done.returncode == 0, done.stderr
    samples = json.loads((run / "samples.json").read_text())["samples"]
    assert len(samples) == 3
    model, tokenizer, info = load_adapter_for_inference(run / "adapter")
    from qhybrid.data.prepare import prepare_file

    source = SourceSection.model_validate({"path": finished[0].recipe.data.eval_sources[0].path})
    rows, _ = prepare_file(source, tokenizer, chat_template=None, base_folder=Path(), date=info.date)
    answers = {a.prompt: a for a in evaluate(model, tokenizer, rows, batch_size=4, max_new_tokens=12).answers}
    with model.disable_adapter():
        alone = {a.prompt: a for a in evaluate(model, tokenizer, rows, batch_size=4, max_new_tokens=12).answers}
    for sample in samples:
        adapter, base = answers[sample["prompt"]], alone[sample["prompt"]]
        assert sample["expected"] == adapter.expected
        assert (sample["adapter"], sample["adapter_is_cut_off"]) == (adapter.generated, adapter.is_cut_off)
        assert (sample["base"], sample["base_is_cut_off"]) == (base.generated, base.is_cut_off)
    assert any(sample["adapter"] != sample["base"] for sample in samples)

    monkeypatch.setattr("qhybrid.serving.load.load_engine", lambda *_: pytest.fail("a model was loaded"))
    first = (run / "report.html").read_text()
    assert run_cli("report", run).returncode == 0
    made = re.compile(r"Written by .*?<")
    assert made.sub("", (run / "report.html").read_text()) == made.sub("", first)
    assert "3 held-out rows, answered greedily" in first


def test_changed_data_is_not_asked_about(tiny_model_folder, tmp_path):
    loaded = run_recipe(tmp_path, tiny_model_folder, training={"max_steps": 2})
    result = run_sft(loaded, console=Console(quiet=True))
    (tmp_path / "eval.jsonl").write_text('{"instruction": "Other?", "output": "Other."}\n')
    done = run_cli("report", result.run.folder, "--samples", 1)
    assert done.returncode == 2 and "has changed since it was trained" in done.stderr
    assert not (result.run.folder / "samples.json").exists()
    assert run_cli("report", result.run.folder).returncode == 0


def test_samples_want_held_out_rows(tiny_model_folder, tmp_path):
    data = {"sources": str(tmp_path / "train.jsonl")}
    loaded = run_recipe(tmp_path, tiny_model_folder, training={"max_steps": 2}, data=data)
    result = run_sft(loaded, console=Console(quiet=True))
    done = run_cli("report", result.run.folder, "--samples", 1)
    assert done.returncode == 2 and "no held-out rows" in done.stderr and "data.eval_fraction" in done.stderr


def test_refusals(run, tmp_path):
    (tmp_path / "mine.html").write_text("<html>my page</html>")
    os.symlink(tmp_path / "mine.html", tmp_path / "link.html")
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((tmp_path / "none",), "there is no folder"),
        ((tmp_path / "empty",), "is not a run folder of qhybrid"),
        ((run / "adapter",), f"did you mean its run, {run}"),
        ((run, "-o", tmp_path / "mine.html"), "is no report of qhybrid"),
        ((run, "-o", tmp_path / "link.html"), "is no report of qhybrid"),
        ((run, "-o", tmp_path / "no" / "report.html"), "there is no folder"),
        ((run, "-o", tmp_path / "report.pdf"), "name it FILE.html"),
        ((run, "-o", tmp_path), "name it FILE.html"),
        ((run, "--max-new-tokens", 3), "no effect without --samples"),
        ((run, "--samples", 0), "0 is not in the range"),
    ):
        done = run_cli("report", *arguments)
        assert done.returncode == 2 and words in done.stderr, (arguments, done.stderr)
    assert (tmp_path / "mine.html").read_text() == "<html>my page</html>"
    shutil.rmtree(run / "adapter")
    done = run_cli("report", run, "--samples", 2)
    assert done.returncode == 2 and "it has no adapter that could answer" in done.stderr


def test_a_report_may_be_written_again_and_elsewhere(run, tmp_path):
    out = tmp_path / "page.html"
    for _ in range(2):
        assert run_cli("report", run, "-o", out).returncode == 0
    assert not (run / "report.html").exists()
    assert "training run" in out.read_text()
    assert {item.name for item in tmp_path.iterdir()} == {"page.html", "run"}


def test_a_new_run_takes_the_report_of_the_old_one_away(tiny_model_folder, tmp_path):
    loaded = run_recipe(tmp_path, tiny_model_folder, training={"max_steps": 2})
    folder = run_sft(loaded, console=Console(quiet=True)).run.folder
    for name in ("report.html", "samples.json"):
        (folder / name).write_text("of the old run")
    run_sft(loaded, overwrite=True, console=Console(quiet=True))
    assert not (folder / "report.html").exists() and not (folder / "samples.json").exists()
