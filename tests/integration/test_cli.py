"""The command line as a user meets it: messages, exit codes, no tracebacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import THREE_BANDS, chat_rows, write_rows

from qhybrid.cli import main


def qhybrid(*arguments, cwd=None, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "qhybrid.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **environment},
        timeout=300,
    )
    assert "Traceback" not in done.stderr + done.stdout, done.stderr[-3000:]
    return done


@pytest.fixture
def project(tmp_path, tiny_model_folder):
    """A folder as a user has it: recipe.yaml, and data beside it."""
    write_rows(tmp_path / "train.jsonl", chat_rows(24))
    write_rows(tmp_path / "eval.jsonl", chat_rows(6, seed=5))
    recipe = {
        "model": {"path": str(tiny_model_folder), "dtype": "float32"},
        "adapters": THREE_BANDS,
        "data": {"sources": "train.jsonl", "eval_sources": "eval.jsonl"},
        "training": {
            "max_steps": 4, "per_device_train_batch_size": 2, "gradient_checkpointing": False,
            "logging_steps": 2, "save_strategy": "no",
        },
        "output_dir": "out",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe, indent=1))
    return tmp_path


def test_sft_then_eval(project):
    done = qhybrid("sft", "recipe.yaml", "training.max_steps=5", cwd=project)
    assert done.returncode == 0, done.stderr
    for words in (
        "step 2/5",
        "tok/s",
        "left",
        "ranks",
        "band     mid: adalora rank 6→3",
        "24",
        "adapter  out/adapter",
    ):
        assert words in done.stdout, done.stdout
    assert done.stderr == ""
    scored = qhybrid(
        "eval",
        "eval.jsonl",
        "--adapter",
        "out",
        "--max-new-tokens",
        4,
        "--predictions",
        "p.jsonl",
        "--json",
        cwd=project,
    )
    assert scored.returncode == 0, scored.stderr
    figures = json.loads(scored.stdout)
    assert figures["rows"] == figures["answers"] == 6 and figures["loss"] > 0 and 0 <= figures["exact_match"] <= 1
    lines = [json.loads(line) for line in (project / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and lines[0]["prompt"].endswith("<|im_start|>assistant\n")
    model = json.loads((project / "recipe.yaml").read_text())["model"]["path"]
    base = qhybrid("eval", "eval.jsonl", "--model", model,
                   "--no-generation", "--dtype", "float32", cwd=project)  # fmt: skip
    assert base.returncode == 0 and "perplexity" in base.stdout and "exact match" not in base.stdout
    again = qhybrid("sft", "recipe.yaml", cwd=project)
    assert again.returncode == 2 and "finished run" in again.stderr and "hint: " in again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft", "nowhere.yaml"], "no recipe"),
        (["sft", "recipe.yaml", "training.learning_rte=1"], "learning_rate"),
        (["sft", "recipe.yaml", "model.path=./missing"], "missing"),
        (["sft", "recipe.yaml", "model.path=org/model"], "org/model"),
        (["sft", "recipe.yaml", "data.sources=trian.jsonl"], "train.jsonl"),
        (["sft", "recipe.yaml", "data.sources=empty.jsonl"], "empty.jsonl"),
        (["sft", "recipe.yaml", "data.sources=broken.jsonl"], "invalid JSON"),
        (["sft", "recipe.yaml", "adapters.low.layers=0-99"], "'low'"),
        (["sft", "recipe.yaml", "adapters.low.target_modules=[qproj]"], "q_proj"),
        (["sft", "recipe.yaml", "adapters.mid.layers=bottom"], "both claim"),
        (["sft", "recipe.yaml", "adapters.mid.adalora.warmup=3", "adapters.mid.adalora.final=2"], "'mid'"),
        (["sft", "recipe.yaml", "distributed.zero_stage=2", "training.optim=lion_32bit"], "one flat tensor"),
        (["sft", "recipe.yaml", "memory.vram=24"], "unit"),
        (["sft", "recipe.yaml", "training.eval_strategy=steps", "data.eval_sources=[]"], "eval_strategy"),
        (["sft", "recipe.yaml", "training.report_to=[nothing]"], "nothing"),
        (["sft", "recipe.yaml", "--resume", "maybe"], "maybe"),
        (["sft"], "RECIPE"),
        (["sfd", "recipe.yaml"], "sft"),
        (["eval", "eval.jsonl"], "--model or --adapter"),
        (["eval", "eval.jsonl", "--adapter", "."], "not an adapter folder"),
        (["eval", "missing.jsonl", "--adapter", "."], "not found"),
        (["eval", "eval.jsonl", "--model", "./none"], "./none"),
        (["eval", "eval.jsonl", "--model", "x", "--columns", "a"], "OURS=THEIRS"),
        (["eval", "eval.jsonl", "--model", "x", "--format", "words"], "alpaca"),
        (["recipes", "show", "recipe.yaml", "--layout", "--config", "none.json"], "none.json"),
        (["recipes", "copy", "nothing"], "demo"),
        (["recipes", "check", "broken.jsonl"], "broken.jsonl"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_mistakes_are_one_message_and_exit_code_2(project, arguments, words):
    (project / "empty.jsonl").write_text("")
    (project / "broken.jsonl").write_text('{"instruction": "a"\n' * 20)
    done = qhybrid(*arguments, cwd=project)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert words in done.stderr, done.stderr
    assert not (project / "out").exists() or not any((project / "out").iterdir())


def test_recipes_commands(project, tiny_model_folder):
    listed = qhybrid("recipes", "list")
    assert listed.returncode == 0 and "demo" in listed.stdout and "llama2_7b_instruct" in listed.stdout
    shown = qhybrid("recipes", "show", "llama2_7b_instruct")
    assert shown.returncode == 0 and "path: meta-llama/Llama-2-7b-hf" in shown.stdout
    layout = qhybrid(
        "recipes", "show", "recipe.yaml", "--layout", "--config", tiny_model_folder / "config.json", cwd=project
    )
    assert layout.returncode == 0 and "total: 42 modules" in layout.stdout
    as_json = qhybrid("recipes", "show", "recipe.yaml", "--layout", "--json", cwd=project)
    assert len(json.loads(as_json.stdout)["rows"]) == 42
    assert qhybrid("recipes", "copy", "demo", project).returncode == 0
    second = qhybrid("recipes", "copy", "demo", project)
    assert second.returncode == 2 and "exists already" in second.stderr
    assert qhybrid("recipes", "check", "demo.yaml", "recipe.yaml", cwd=project).returncode == 0
    schema = json.loads(qhybrid("recipes", "schema").stdout)
    assert set(schema["properties"]) == {
        "model", "quantization", "adapters", "schedule", "ranks", "stages", "data", "training", "memory",
        "monitoring", "distributed", "sweep", "tasks", "shared", "output_dir",
    }  # fmt: skip


def test_help_and_recipes_import_no_torch():
    for arguments in (["--help"], ["recipes", "list"], ["recipes", "show", "demo"], ["recipes", "schema"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "qhybrid.cli.main", *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not imported & {"torch", "transformers", "peft", "trl", "bitsandbytes", "numpy"}


def test_doctor_finds_this_machine_ready():
    done = qhybrid("doctor")
    assert done.returncode == 0, done.stdout
    assert "NF4 forward and backward" in done.stdout and "torch" in done.stdout
    findings = json.loads(qhybrid("doctor", "--json").stdout)
    assert all(finding["state"] != "problem" for finding in findings)


def test_trackers_through_report_to(project):
    done = qhybrid(
        "sft", "recipe.yaml", "training.report_to=[tensorboard]", "training.logging_steps=1", cwd=project
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(project / "out" / "tensorboard")).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft", "recipe.yaml", "--resume", "auto", "--overwrite"], "give one of them"),
        (["train", "recipe.yaml"], "'sft'"),
        (["eval", "eval.jsonl", "--adapter", "nowhere"], "there is no nowhere"),
        (["eval", "eval.jsonl", "--model", "x", "--no-generation", "--predictions", "p"], "nothing to write"),
        (["eval", "other.jsonl", "--model", "MODEL"], "--columns prompt=q --columns completion=a"),
        (["recipes", "check", "missing_data.yaml"], "gone.jsonl"),
        (["recipes", "check", "overlap.yaml"], "both claim"),
        (["recipes", "show", "recipe.yaml", "--layout", "model.path=org/name"], "--config"),
    ],
)
def test_more_mistakes_are_one_message(project, arguments, words):
    recipe = json.loads((project / "recipe.yaml").read_text())
    write_rows(project / "other.jsonl", [{"q": "one?", "a": "one"}] * 3)
    missing = {**recipe, "data": {"sources": "gone.jsonl"}, "training": {}}
    (project / "missing_data.yaml").write_text(json.dumps(missing))
    overlap = {**recipe, "adapters": [{"band": "a", "layers": "0-3"}, {"band": "b", "layers": "3-5"}]}
    (project / "overlap.yaml").write_text(json.dumps(overlap))
    arguments = [recipe["model"]["path"] if argument == "MODEL" else argument for argument in arguments]
    done = qhybrid(*arguments, cwd=project)
    assert done.returncode == 2 and words in " ".join(done.stderr.split()), done.stderr


def test_the_recipe_in_a_run_folder_can_be_used_again_from_anywhere(project, tmp_path_factory):
    """It names its data from the root."""
    done = qhybrid("sft", project / "recipe.yaml", f"output_dir={project / 'out'}", cwd=project.parent)
    assert done.returncode == 0, done.stderr
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    again = qhybrid("sft", project / "out" / "recipe.yaml", "output_dir=second", cwd=elsewhere)
    assert again.returncode == 0, again.stderr
    weights = "adapter/adapter.safetensors"
    assert (elsewhere / "second" / weights).read_bytes() == (project / "out" / weights).read_bytes()


def test_copied_recipes_bring_their_data(tmp_path):
    done = qhybrid("recipes", "copy", "demo", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "orders_train.jsonl").is_file() and (tmp_path / "mine.yaml").is_file()
    assert qhybrid("recipes", "check", "mine.yaml", cwd=tmp_path).returncode == 0


def test_preflight_loads_no_torch():
    """A mistake is told within a second."""
    code = "import sys, qhybrid.training.preflight; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_running_out_of_memory_is_one_message(monkeypatch, capsys, error):
    def fail(**_):
        raise error

    monkeypatch.setattr(main.cli, "main", fail)
    with pytest.raises(SystemExit) as caught:
        main.main([])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: out of memory\nhint: ")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, capsys):
    def fail(**_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(main.cli, "main", fail)
    with pytest.raises(SystemExit) as stopped:
        main.main([])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and said.startswith("Traceback") and "RuntimeError: a fault" in said
