"""Starting several processes as a user does: qhybrid, torchrun, accelerate; mistakes, deaths and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import case, steps_of
from helpers import parse_recipe

from qhybrid.recipe.load import dump_recipe
from qhybrid.training.checkpoint import newest_sealed

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
QHYBRID = ["-m", "qhybrid.cli.main", "sft"]


@pytest.fixture
def recipe_file(tmp_path, tiny_model_folder) -> Path:
    """A recipe of four steps for two processes with ZeRO 2."""
    training = {"max_steps": 4, "use_cpu": True, "save_strategy": "steps", "save_steps": 2}
    one = case(
        "run", tmp_path, tiny_model_folder, training=training, distributed={"processes": 2, "zero_stage": 2}
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(parse_recipe(json.dumps(one["recipe"]), "r")[0]))
    return file


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=180)


def test_qhybrid_starts_the_processes_itself(recipe_file):
    done = run(*QHYBRID, str(recipe_file), "training.logging_steps=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4/4") == 1  # one process prints
    assert "Traceback" not in done.stderr
    folder = recipe_file.parent / "run"
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert list(steps_of(folder)) == [1, 2, 3, 4]
    config = json.loads((folder / "deepspeed.json").read_text())
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["reduce_bucket_size"] < 1e6  # not DeepSpeed's 5e8


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "qhybrid.cli.main", "sft"],
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "-m", *QHYBRID[1:]],
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers_that_users_have(recipe_file, launcher):
    done = run(*launcher, str(recipe_file))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((recipe_file.parent / "run" / "run.json").read_text())["status"] == "finished"


def test_a_mistake_is_one_message(recipe_file):
    done = run(*QHYBRID, str(recipe_file), "data.sources=none.jsonl")
    assert done.returncode == 2 and done.stderr.count("none.jsonl") == 1 and "Traceback" not in done.stderr
    # What only the processes find, all of them, after the start.
    done = run(*QHYBRID, str(recipe_file), "training.adam_beta1=1.5")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


def started(recipe_file: Path, *overrides: str) -> tuple[subprocess.Popen, list[psutil.Process], Path]:
    """A long run, once its first checkpoint is there, with its processes."""
    log = recipe_file.with_name("log.txt").open("w")
    process = subprocess.Popen(
        [sys.executable, *QHYBRID, str(recipe_file), "training.max_steps=5000", *overrides],
        env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    checkpoints = recipe_file.parent / "run" / "checkpoints"
    until = time.monotonic() + 120
    while newest_sealed(checkpoints) is None:
        assert process.poll() is None and time.monotonic() < until, recipe_file.with_name("log.txt").read_text()
        time.sleep(0.2)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "sft" in " ".join(p.cmdline())]
    return process, workers, checkpoints


@pytest.mark.parametrize("whom", [pytest.param("launcher", marks=pytest.mark.slow), "one of the processes"])
def test_a_signal_stops_all_of_them_with_a_checkpoint(recipe_file, whom):
    process, workers, checkpoints = started(recipe_file)
    assert len(workers) == 2
    before = newest_sealed(checkpoints)
    (process if whom == "launcher" else workers[1]).send_signal(signal.SIGTERM)
    assert process.wait(timeout=90) == 143, recipe_file.with_name("log.txt").read_text()
    newest = newest_sealed(checkpoints)
    last = max(steps_of(recipe_file.parent / "run"))
    assert newest != before and newest.name == f"checkpoint-{last}"
    assert json.loads((recipe_file.parent / "run" / "run.json").read_text())["status"] == "interrupted"
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers)
    resumed = run(*QHYBRID, str(recipe_file), f"training.max_steps={last + 2}", "--resume", "auto")
    assert "training.max_steps" in resumed.stderr  # another schedule is another run


def test_the_death_of_one_process_ends_all(recipe_file):
    process, workers, checkpoints = started(recipe_file)
    workers[1].kill()
    assert process.wait(timeout=150) != 0
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers)
    assert newest_sealed(checkpoints) is not None
