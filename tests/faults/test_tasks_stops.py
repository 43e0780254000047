"""Tasks in one process that stop: by a kill, a signal, or one that fails. All go on as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from runs import assert_same, checkpoints_of, forget_repeats, one_thread, status_of, steps_of
from task_helpers import at_step, killed, sigterm, tasks_recipe, turns_of

from qhybrid.errors import NonFiniteError, TrainingError
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.training import signals, tasks, trainer_checkpoints
from qhybrid.training.checkpoint import step_of
from qhybrid.training.session import SftResult
from qhybrid.training.sft import run_sft
from qhybrid.training.signals import Interrupted
from qhybrid.training.trainer import BandedTrainer

NAMES = ("bands", "rs")


def train(loaded: LoadedRecipe, **options) -> SftResult:
    with one_thread():
        return run_sft(loaded, **{"console": Console(quiet=True), **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_folder):
    """Two tasks that nothing stopped."""
    loaded = tasks_recipe(tmp_path_factory.mktemp("whole"), tiny_model_folder, *NAMES)
    return loaded, train(loaded).run.folder


@pytest.fixture
def again(whole, tmp_path) -> LoadedRecipe:
    """The same tasks in another folder."""
    loaded, _ = whole
    return LoadedRecipe(loaded.recipe.model_copy(update={"output_dir": str(tmp_path / "run")}), loaded.path)


def assert_all_same(run: Path, whole: Path) -> None:
    for name in NAMES:
        forget_repeats(run / "tasks" / name)
        assert_same(run / "tasks" / name, whole / "tasks" / name)
    assert status_of(run) == "finished"


def newest(run: Path, task: str) -> int:
    return max((step_of(folder) for folder in checkpoints_of(run / "tasks" / task)), default=0)


@pytest.mark.parametrize(("task", "step", "left"), [("rs", 4, (6, 0)), ("bands", 6, (4, 0))])
def test_killed_in_a_step_nothing_of_the_checkpoints_is_lost(again, whole, monkeypatch, task, step, left):
    folder = Path(again.recipe.output_dir)
    with monkeypatch.context() as patched:
        at_step(patched, task, step, killed)
        with pytest.raises(KeyboardInterrupt):
            train(again)
    assert tuple(newest(folder, name) for name in NAMES) == left
    assert status_of(folder) == status_of(folder / "tasks" / "rs") == "interrupted"
    assert train(again, resume=True).figures["tasks"]["rs"]["optimizer_steps"] == 5
    assert_all_same(folder, whole[1])


@pytest.mark.parametrize(("task", "step", "left"), [("bands", 1, (1, 0)), ("rs", 2, (3, 2)), ("bands", 8, (8, 4))])
def test_a_signal_saves_every_task_where_it_is(again, whole, monkeypatch, task, step, left):
    folder = Path(again.recipe.output_dir)
    with monkeypatch.context() as patched:
        at_step(patched, task, step, sigterm)
        with pytest.raises(Interrupted) as caught:
            train(again)
    assert caught.value.exit_code == 143
    assert tuple(newest(folder, name) for name in NAMES) == left
    for name, number in zip(NAMES, left, strict=True):
        assert status_of(folder / "tasks" / name) == "interrupted"  # after the last step: before its evaluation
        assert number == 0 or max(steps_of(folder / "tasks" / name)) == number
    assert status_of(folder) == "interrupted"
    train(again, resume=True)
    assert_all_same(folder, whole[1])
    assert turns_of(folder) == turns_of(whole[1])  # the order goes on where it was


def test_a_second_interrupt_ends_all_at_once(again, whole, monkeypatch):
    folder = Path(again.recipe.output_dir)

    def impatient(trainer) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6)  # the main thread sees it within 0.2 seconds

    with monkeypatch.context() as patched:
        patched.setattr(signals, "_SECONDS_OF_ONE_PRESS", 0.0)
        at_step(patched, "bands", 4, impatient)
        with pytest.raises(Interrupted) as caught:
            train(again)
    assert caught.value.exit_code == 130
    assert (newest(folder, "bands"), newest(folder, "rs")) == (2, 0)  # nothing was saved for it
    assert not [thread for thread in threading.enumerate() if thread.daemon and "_run" in thread.name]
    train(again, resume=True)
    assert_all_same(folder, whole[1])


def test_a_signal_in_an_evaluation(again, whole, monkeypatch):
    folder = Path(again.recipe.output_dir)
    with monkeypatch.context() as patched:
        at_step(patched, "bands", 5, sigterm, "prediction_step")  # that after step 4
        with pytest.raises(Interrupted):
            train(again)
    assert (newest(folder, "bands"), newest(folder, "rs")) == (4, 2)
    train(again, resume=True)
    assert_all_same(folder, whole[1])


def test_one_that_fails_is_named_and_the_others_are_saved(again, whole, monkeypatch):
    folder = Path(again.recipe.output_dir)

    def poison(trainer) -> None:
        trainer.step_loss = float("nan")

    with monkeypatch.context() as patched:
        at_step(patched, "rs", 3, poison)
        with pytest.raises(NonFiniteError, match=r"^task rs: the loss is nan at step 3") as caught:
            train(again)
    assert caught.value.exit_code == 1 and caught.value.hint
    assert status_of(folder) == status_of(folder / "tasks" / "rs") == "failed"
    assert status_of(folder / "tasks" / "bands") == "interrupted"
    assert newest(folder, "bands") == max(steps_of(folder / "tasks" / "bands")) == 5
    train(again, resume=True)
    assert_all_same(folder, whole[1])


def test_out_of_memory_in_one_says_what_takes_less(again, monkeypatch):
    def full(trainer) -> None:
        monkeypatch.setattr(BandedTrainer, "_in_parts", fail)

    def fail(self, *others):
        raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB")

    at_step(monkeypatch, "rs", 2, full)
    with pytest.raises(TrainingError, match="task rs: out of memory; the plan expected") as caught:
        train(again)
    assert caught.value.hint.startswith("try model.dtype=bfloat16 model.adapter_dtype=null; stopped before")


def test_out_of_memory_while_the_base_is_loaded(again, monkeypatch):
    """As in a run of one: a message, and the folders of all tasks say that it is over."""

    def full(*args, **kwargs):
        raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(tasks, "load_base", full)
    with pytest.raises(TrainingError, match="out of memory; the plan expected"):
        train(again)
    folder = Path(again.recipe.output_dir)
    assert [status_of(folder / "tasks" / name) for name in NAMES] == ["failed", "interrupted"]


def test_stopped_after_the_last_task_and_before_the_end(again, whole):
    folder = Path(again.recipe.output_dir)
    train(again)
    status = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**status, "status": "running", "process": {}}))
    train(again, resume=True)
    assert_all_same(folder, whole[1])


def test_a_full_disk_ends_all_with_one_message(again, whole, monkeypatch):
    def no_space(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")

    with monkeypatch.context() as patched:
        patched.setattr(trainer_checkpoints, "save_weights", no_space)
        with pytest.raises(TrainingError, match="task bands: the disk is full: weights"):
            train(again)
    folder = Path(again.recipe.output_dir)
    assert [status_of(folder / "tasks" / name) for name in NAMES] == ["failed", "interrupted"]
    train(again, resume=True)
    assert_all_same(folder, whole[1])


def test_an_earlier_run_is_replaced_after_the_first_step_of_any_task(whole, again, monkeypatch):
    folder = Path(again.recipe.output_dir)
    train(again, resume=True)
    before = (folder / "tasks" / "rs" / "adapter" / "adapter.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        at_step(patched, "bands", 1, killed)
        with pytest.raises(KeyboardInterrupt):
            train(again, overwrite=True)
    assert (folder / "tasks" / "rs" / "adapter" / "adapter.safetensors").read_bytes() == before
    assert status_of(folder) == "finished"
    with monkeypatch.context() as patched:
        at_step(patched, "rs", 1, killed)
        with pytest.raises(KeyboardInterrupt):
            train(again, overwrite=True)
    assert not (folder / "tasks" / "rs" / "adapter").exists() and status_of(folder) == "interrupted"
