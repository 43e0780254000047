"""Several tasks in one process: each adapter is the one that a run of its own gives, and they take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_cli
from rich.console import Console
from safetensors.torch import load_file
from task_helpers import TASKS, alone, storages, tasks_recipe, turns_of

from qhybrid.errors import QhybridError, RunFolderError
from qhybrid.recipe.load import dump_recipe, parse_recipe, resolve
from qhybrid.training import session
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft
from qhybrid.training.trainer import BandedTrainer
from qhybrid.training.turns import due

QUIET = Console(quiet=True)
EXACT = ("loss", "grad_norm", "learning_rates", "tokens", "regularizer", "live_ranks", "step", "eval_loss")
NAMES = [task["name"] for task in TASKS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_folder):
    """Three tasks, trained together."""
    loaded = tasks_recipe(tmp_path_factory.mktemp("tasks"), tiny_model_folder)
    return loaded, run_sft(loaded, console=QUIET)


@pytest.mark.parametrize("name", NAMES)
def test_each_task_is_a_run_of_its_own_to_the_last_bit(trained, tmp_path, name):
    _, result = trained
    task = result.tasks[name].run.folder
    own = run_sft(alone(task, tmp_path / "alone"), console=QUIET)
    together, separate = (
        load_file(folder / "adapter" / "adapter.safetensors") for folder in (task, own.run.folder)
    )
    assert together.keys() == separate.keys()
    assert all(torch.equal(together[key], separate[key]) for key in separate)
    for event in ("step", "evaluation", "allocation"):
        one, other = (read_events(folder / "events.jsonl", event) for folder in (task, own.run.folder))
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            for key in EXACT:
                assert a.get(key) == b.get(key), (event, key)
    assert result.tasks[name].figures.get("adapter_of_step") == own.figures.get("adapter_of_step")
    for file in ("layout.json", "base.json", "audit.json"):
        assert (task / file).read_text() == (own.run.folder / file).read_text()


def test_the_adapters_differ(trained):
    _, result = trained
    files = [result.tasks[name].run.adapter / "adapter.safetensors" for name in NAMES]
    assert len({file.read_bytes() for file in files}) == 3


def test_steps_come_by_weight(trained):
    """Weights 2, 1 and 0.5, with 8, 5 and 6 steps: at (k + ½)/weight, and the first in the list where two meet."""
    _, result = trained
    turns = turns_of(result.run.folder)
    order = "bands rs bands ada bands rs bands bands rs bands ada bands rs bands rs ada ada ada ada"
    assert [name for name, _ in turns] == order.split()
    for name, number in zip(NAMES, (8, 5, 6), strict=True):
        assert [step for other, step in turns if other == name] == list(range(1, number + 1))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (2.0, 1.0, 0.5), (1.0, 0.3, 0.7, 5.0)])
def test_no_task_is_ever_a_step_and_a_half_from_its_share(weights):
    steps = [0] * len(weights)
    for taken in range(1, 400):
        chosen = min(range(len(weights)), key=lambda index: due(steps[index], weights[index]))
        steps[chosen] += 1
        for index, weight in enumerate(weights):
            assert abs(steps[index] - taken * weight / sum(weights)) < 1.5, (taken, steps)


def test_the_folder_of_all_tells_of_all(trained):
    loaded, result = trained
    folder = result.run.folder
    status = json.loads((folder / "run.json").read_text())
    assert status["status"] == "finished" and list(status["figures"]["tasks"]) == NAMES
    assert status["figures"]["tasks"]["rs"]["optimizer_steps"] == 5
    assert sorted(item.name for item in folder.iterdir()) == [
        "base.json", "events.jsonl", "plan.json", "recipe.yaml", "run.json", "tasks",
    ]  # fmt: skip
    recipe, _ = parse_recipe((folder / "recipe.yaml").read_text(), "written")
    assert recipe == parse_recipe(dump_recipe(resolve(loaded.recipe)), "given")[0]
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["largest_task"] in NAMES and set(plan["adapters_by_band"]) == {
        "bands.low", "bands.mid", "bands.high", "rs.all", "ada.all",
    }  # fmt: skip
    for name in NAMES:
        (planned,) = read_events(folder / "tasks" / name / "events.jsonl", "plan")
        assert planned["predicted"]["process_bytes"] == plan["for_this_data"]["host_bytes"]  # of the process


def test_the_tensors_are_those_of_the_plan(tmp_path, tiny_model_folder, monkeypatch):
    """One base, three adapters and three optimizer states, counted by the memory that they lie in."""
    kept: list[BandedTrainer] = []

    class Kept(BandedTrainer):
        def train(self, *args, **kwargs):
            kept.append(self)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(session, "BandedTrainer", Kept)
    result = run_sft(tasks_recipe(tmp_path, tiny_model_folder, training={"save_steps": 100}), console=QUIET)
    planned = json.loads((result.run.folder / "plan.json").read_text())["for_this_data"]["components"]
    adapters = sum(size for name, size in planned.items() if name.startswith("adapters: "))
    base = planned["base weights"] + planned["unquantised weights"]
    assert len(kept) == 3
    # Of the norms, those that are held until the next step are gone.
    held = sum(storages(*(trainer.model for trainer in kept)).values())
    assert held == pytest.approx(base + adapters + planned["DoRA norms"] / 2, rel=0.001)
    moments = [
        value.numel() * value.element_size()
        for trainer in kept
        for state in trainer.optimizer.state.values()
        for value in state.values()
    ]
    assert sum(moments) == planned["optimizer states"]


LATE = {"kind": "adalora", "adalora": {"warmup": 50}}


@pytest.mark.parametrize(
    ("task", "sections", "words"),
    [
        (
            "bands",
            {"training": {"load_best_model_at_end": True}},
            "task bands: training: --load_best_model_at_end",
        ),
        ("rs", {"data": {"sources": "nowhere.jsonl"}}, "task rs: .*nowhere.jsonl"),
        ("ada", {"adapters": [{"layers": "7"}]}, "task ada: band 'band0': .*7"),
        ("ada", {"adapters": [LATE]}, "task ada: .*warm-up takes 50"),
        ("rs", {"training": {"lr_scheduler_type": "cosine_with_min_lr"}}, "task rs: training.lr_scheduler_type"),
    ],
)
def test_what_is_wrong_with_one_task_names_it(tmp_path, tiny_model_folder, task, sections, words):
    sections = {"training": {}, **sections}
    if task == "bands":
        sections["training"] |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    loaded = tasks_recipe(tmp_path, tiny_model_folder, of_tasks={task: sections})
    with pytest.raises(QhybridError, match=f"^{words}") as caught:
        run_sft(loaded, console=QUIET)
    assert caught.value.exit_code == 2
    if (tmp_path / "run").exists():  # what the trainer alone finds; nothing is lost
        assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
        run_sft(tasks_recipe(tmp_path, tiny_model_folder, "ada", adapters=None), console=QUIET)


MEASURED = """\
import json, sys
from pathlib import Path
from helpers import tiny_folder, write_rows
import torch
from qhybrid.recipe.load import LoadedRecipe, parse_recipe
from qhybrid.training.sft import run_sft
from rich.console import Console

torch.set_num_threads(1)
folder, number = Path(sys.argv[1]), int(sys.argv[2])
model = tiny_folder(folder / "m", hidden_size=192, intermediate_size=512, max_position_embeddings=1024)
write_rows(folder / "rows.jsonl", [{"text": " ".join(f"word {i * j}" for i in range(150))} for j in range(1, 9)])
values = {
    "model": {"path": str(model), "dtype": "float32"},
    "adapters": [{"rank": 2}],
    "training": {"max_steps": 2, "per_device_train_batch_size": 8, "gradient_checkpointing": False,
                 "save_strategy": "no", "max_length": 512},
    "tasks": [{"name": f"t{n}", "data": {"sources": str(folder / "rows.jsonl")}} for n in range(number)],
    "output_dir": str(folder / f"run{number}"),
}
result = run_sft(LoadedRecipe(parse_recipe(json.dumps(values), "m")[0], folder / "r"), console=Console(quiet=True))
print(result.figures["tasks"]["t0"]["peak_process_bytes"])
"""


@pytest.mark.slow
def test_three_tasks_take_the_activations_of_one(tmp_path):
    """On the CPU, where the threads of the loops would each keep what they had freed."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    peaks = []
    for number in (1, 3):
        command = [sys.executable, "-c", MEASURED, str(tmp_path), str(number)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0]


def test_a_finished_run_is_left_alone(trained):
    loaded, result = trained
    again = run_sft(loaded, resume=True, console=QUIET)
    assert again.figures == result.figures and list(again.tasks) == NAMES
    with pytest.raises(RunFolderError, match="finished run"):
        run_sft(loaded, console=QUIET)


def test_commands_read_the_run_of_a_task(trained, tmp_path, tiny_model_folder):
    loaded, result = trained
    data = loaded.recipe.tasks[0].data.eval_sources[0].path
    task = result.tasks["bands"].run.folder
    scored = run_cli("eval", data, "--adapter", task, "--json", "--no-generation")
    assert scored.returncode == 0, scored.stderr
    measured = result.tasks["bands"].figures["eval_loss"]
    assert json.loads(scored.stdout)["loss"] == pytest.approx(measured, rel=1e-5)
    assert "adalora" in run_cli("inspect", task).stdout
    exported = run_cli("export", result.tasks["rs"].run.folder, tmp_path / "peft", "--to", "peft")
    assert exported.returncode == 0, exported.stderr
    for command in (("inspect",), ("eval", data, "--adapter")):
        whole = run_cli(*command, result.run.folder)
        assert whole.returncode == 2 and "an adapter for each task" in whole.stderr
        assert str(result.run.folder / "tasks" / "ada") in whole.stderr


def test_the_command_line(tmp_path, tiny_model_folder):
    loaded = tasks_recipe(tmp_path, tiny_model_folder, "rs", "ada", training={"save_strategy": "no"})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(loaded.recipe))
    dry = run_cli("sft", file, "--dry-run")
    assert dry.returncode == 0 and "task      rs: 2 x 64 tokens" in dry.stdout and "rs takes most" in dry.stdout
    checked = run_cli("recipes", "check", file)
    assert checked.returncode == 0, checked.stderr
    layouts = run_cli("recipes", "show", file, "--layout", "--config", tiny_model_folder)
    assert layouts.stdout.count("total: 42 modules") == 2
    short = ["tasks.rs.training.max_steps=2", "tasks.ada.training.max_steps=3", "tasks.ada.weight=1"]
    done = run_cli("sft", file, *short)
    assert done.returncode == 0, done.stderr
    assert "rs: step 1/2" in done.stdout and "ada: step 3/3" in done.stdout
    assert f"adapter  {tmp_path / 'run' / 'tasks' / 'ada' / 'adapter'}" in done.stdout
    again = run_cli("sft", file, *short, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert turns_of(tmp_path / "run") == [("rs", 1), ("ada", 1), ("rs", 2), ("ada", 2), ("ada", 3)]
    changed = run_cli("sft", file, *short[:-1], "tasks.ada.weight=3", "--resume", "auto")
    assert "nothing to do" in changed.stdout
