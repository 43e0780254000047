"""What stops a run, before or in the middle, and what it leaves: nothing lost, nothing overwritten."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import make_recipe, run_recipe
from rich.console import Console
from safetensors.torch import load_file

from qhybrid.errors import AllocationError, DataError, NonFiniteError, RecipeError, RunFolderError
from qhybrid.recipe.load import dump_recipe
from qhybrid.training import session
from qhybrid.training.claim import claim, discard_replaced, has_replaced
from qhybrid.training.events import read_events
from qhybrid.training.preflight import settle
from qhybrid.training.sft import run_sft
from qhybrid.training.summary import summary_rows
from qhybrid.training.trainer import BandedTrainer

QUIET = Console(quiet=True)


def test_too_few_steps_for_adalora_is_told_before_training(tmp_path, tiny_model_folder):
    bands = [{"band": "ada", "kind": "adalora", "rank": 2, "adalora": {"warmup": 5, "final": 5}}]
    loaded = run_recipe(tmp_path, tiny_model_folder, adapters=bands)
    with pytest.raises(RecipeError) as caught:
        run_sft(loaded, console=QUIET)
    assert "'ada'" in str(caught.value) and "10 optimizer steps" in str(caught.value)


def test_what_only_the_scheduler_refuses_is_a_mistake_in_the_recipe(tmp_path, tiny_model_folder):
    training = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lrate": 1e-5}}
    with pytest.raises(RecipeError, match=r"cosine_with_min_lr: .*min_lr") as caught:
        run_sft(run_recipe(tmp_path, tiny_model_folder, training=training), console=QUIET)
    assert "lr_scheduler_kwargs" in str(caught.value)


def test_a_run_that_never_allocated_fails_and_says_why(tmp_path, tiny_model_folder):
    """Early stopping ends the run inside the warm-up."""
    bands = [{"band": "ada", "kind": "adalora", "rank": 2, "adalora": {"warmup": 0.5}}]
    loaded = run_recipe(
        tmp_path,
        tiny_model_folder,
        adapters=bands,
        training={
            "max_steps": 40,
            "learning_rate": 0.0,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "early_stopping_patience": 2,
        },
    )
    with pytest.raises(AllocationError) as caught:
        run_sft(loaded, console=QUIET)
    assert "'ada'" in str(caught.value) and "step 3" in str(caught.value)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_stops_before_the_optimizer_step(tmp_path, tiny_model_folder, monkeypatch, what):
    loaded = run_recipe(tmp_path, tiny_model_folder)
    seen = {}

    class Poisoned(BandedTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            if self.state.global_step != 3:
                return loss
            seen["before"] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            seen["model"] = model
            if what == "loss":
                return loss * float("nan")
            next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g * float("inf"))
            return loss

    monkeypatch.setattr(session, "BandedTrainer", Poisoned)
    with pytest.raises(NonFiniteError, match="step 4") as caught:
        run_sft(loaded, console=QUIET)
    assert caught.value.exit_code == 1
    for name, parameter in seen["model"].named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, seen["before"][name])
    assert [r["step"] for r in read_events(tmp_path / "run" / "events.jsonl", "step")] == [1, 2, 3]
    (failed,) = read_events(tmp_path / "run" / "events.jsonl", "failed")
    assert failed["error"] == "NonFiniteError"


def test_folders_are_never_overwritten_silently(finished, tmp_path, tiny_model_folder):
    loaded, result = finished
    with pytest.raises(RunFolderError, match="finished run"):
        run_sft(loaded, console=QUIET)
    again = run_sft(loaded, resume=True, console=QUIET)  # finished already: nothing to do
    assert again.figures == result.figures
    foreign = run_recipe(tmp_path, tiny_model_folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RunFolderError, match="not from a run"):
            run_sft(foreign, console=QUIET, **options)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_a_run_without_a_step_leaves_its_folder_free(tmp_path, tiny_model_folder):
    """A mistake that shows only after the folder was claimed needs no --overwrite to be corrected."""
    bands = [{"band": "ada", "kind": "adalora", "rank": 2, "adalora": {"warmup": 30}}]
    epochs = {"max_steps": -1, "num_train_epochs": 1}
    with pytest.raises(RecipeError, match="'ada'"):
        run_sft(run_recipe(tmp_path, tiny_model_folder, adapters=bands, training=epochs), console=QUIET)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    run_sft(run_recipe(tmp_path, tiny_model_folder), console=QUIET)


def test_foreign_and_running_folders_are_left_alone(tmp_path, tiny_model_folder):
    loaded = run_recipe(tmp_path, tiny_model_folder)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    running = {"pid": other.pid, "started": psutil.Process(other.pid).create_time()}
    ours = {"versions": {"qhybrid": "0.1.0"}}
    try:
        for content, words in (
            ({"status": "queued"}, "not from a run"),
            ({"x": 1}, "not from a run"),
            ({"status": "running", **ours, "process": running}, "going on"),
        ):
            (folder / "run.json").write_text(json.dumps(content))
            for options in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(RunFolderError, match=words):
                    run_sft(loaded, console=QUIET, **options)
    finally:
        other.kill()
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_killed_process_that_nobody_collected_does_not_hold_its_folder(tmp_path):
    """In a container the first process often collects none."""
    recipe = make_recipe(output_dir=str(tmp_path / "run"))
    with claim(recipe, resume=False, overwrite=False) as run:
        run.write_status("running")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    status = json.loads((run.folder / "run.json").read_text())
    status["process"] = {"pid": other.pid, "started": psutil.Process(other.pid).create_time()}
    (run.folder / "run.json").write_text(json.dumps(status))
    with pytest.raises(RunFolderError, match="going on"), claim(recipe, resume=True, overwrite=False):
        pass
    other.kill()
    while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with claim(recipe, resume=True, overwrite=False):
        pass
    other.wait()


def test_overwrite_keeps_the_old_run_until_the_new_one_can_start(finished, tmp_path):
    """The data is read before the old run goes."""
    loaded, result = finished
    (tmp_path / "bad.jsonl").write_text('{"some": "thing"}\n' * 5)
    data = loaded.recipe.data.model_copy(
        update={
            "sources": (loaded.recipe.data.sources[0].model_copy(update={"path": str(tmp_path / "bad.jsonl")}),)
        }
    )
    broken = type(loaded)(loaded.recipe.model_copy(update={"data": data}), loaded.path)
    with pytest.raises(DataError):
        run_sft(broken, overwrite=True, console=QUIET)
    assert (result.run.adapter / "adapter.safetensors").is_file()


def test_overwrite_brings_the_old_run_back_when_no_step_was_taken(finished, tiny_model_folder, tmp_path):
    """A scheduler that is refused after the model was loaded; a file of the user's own is not touched at all."""
    _, result = finished
    folder = tmp_path / "run"
    shutil.copytree(result.run.folder, folder)
    (folder / "notes.txt").write_text("mine")
    before = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    wrong = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lrate": 1e-5}}
    with pytest.raises(RecipeError, match="cosine_with_min_lr"):
        run_sft(run_recipe(tmp_path, tiny_model_folder, training=wrong), overwrite=True, console=QUIET)
    assert before == {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    run_sft(run_recipe(tmp_path, tiny_model_folder, training={"max_steps": 10}), overwrite=True, console=QUIET)
    steps = [event["step"] for event in read_events(folder / "events.jsonl", "step")]
    assert steps == list(range(1, 11)) and (folder / "notes.txt").read_text() == "mine"
    assert not list(folder.glob(".replaced*"))


def test_a_run_that_was_killed_before_its_first_step_gives_back_what_it_replaced(finished, tmp_path):
    loaded, result = finished
    folder = tmp_path / "run"
    shutil.copytree(result.run.folder, folder)
    recipe = loaded.recipe.model_copy(update={"output_dir": str(folder)})
    before = (folder / "run.json").read_bytes()
    with pytest.raises(RunFolderError, match="finished run"), claim(recipe, resume=False, overwrite=True) as run:
        run.write_status("running")
        shutil.copytree(folder, tmp_path / "killed")  # what the kill leaves
        killed = recipe.model_copy(update={"output_dir": str(tmp_path / "killed")})
        with claim(killed, resume=False, overwrite=False):
            pass
    assert (tmp_path / "killed" / "run.json").read_bytes() == before
    assert (folder / "run.json").read_bytes() == before


def test_a_process_that_is_refused_leaves_the_other_ones_folder_alone(finished, tmp_path):
    loaded, result = finished
    folder = tmp_path / "run"
    shutil.copytree(result.run.folder, folder)
    recipe = loaded.recipe.model_copy(update={"output_dir": str(folder)})
    with claim(recipe, resume=False, overwrite=True) as run:
        assert not run.adapter.exists()
        with pytest.raises(RunFolderError, match="going on"), claim(recipe, resume=False, overwrite=False):
            pass
        assert not run.adapter.exists() and has_replaced(run)
        (folder / ".replaced.old").mkdir()  # another run was killed while it removed what it replaced
        (folder / ".replaced.old" / "layout.json").write_text("{}")
        discard_replaced(run)
        assert not list(folder.glob(".replaced*"))
    assert not run.adapter.exists()


def test_a_finished_run_that_came_back_is_not_trained_again(finished, tmp_path):
    """Killed between --overwrite and the first step, and then resumed."""
    loaded, result = finished
    folder = tmp_path / "run"
    shutil.copytree(result.run.folder, folder)
    recipe = settle(loaded).model_copy(update={"output_dir": str(folder)})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    aside = folder / ".replaced"
    aside.mkdir()
    for item in list(folder.iterdir()):
        if item != aside:
            item.rename(aside / item.name)
    shutil.copyfile(aside / "recipe.yaml", folder / "recipe.yaml")
    status = json.loads((aside / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**status, "status": "running", "process": {}}))
    with pytest.raises(RunFolderError, match="finished run"), claim(recipe, resume=True, overwrite=False):
        pass
    assert (folder / "adapter" / "adapter.safetensors").is_file()


def test_an_interrupted_overwrite_says_so(finished, tmp_path, tiny_model_folder, monkeypatch):
    shutil.copytree(finished[1].run.folder, tmp_path / "run")

    class Interrupted(BandedTrainer):
        def compute_loss(self, *args, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(session, "BandedTrainer", Interrupted)
    console = Console(record=True, quiet=False, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    with pytest.raises(KeyboardInterrupt):
        run_sft(run_recipe(tmp_path, tiny_model_folder), overwrite=True, console=console)
    assert "is back as it was" in console.export_text()
    with pytest.raises(KeyboardInterrupt):
        run_sft(run_recipe(tmp_path / "second", tiny_model_folder), console=console)
    assert "before the first checkpoint" in console.export_text()
    status = json.loads((tmp_path / "second" / "run" / "run.json").read_text())
    assert status["status"] == "interrupted"


def test_two_processes_do_not_get_the_same_folder(tmp_path):
    recipe = make_recipe(output_dir=str(tmp_path / "run"))
    with (
        claim(recipe, resume=True, overwrite=False),
        pytest.raises(RunFolderError, match="going on"),
        claim(recipe, resume=True, overwrite=False),
    ):
        pass
    with claim(recipe, resume=True, overwrite=False):
        pass


def test_a_batch_that_never_fills_is_a_mistake_in_the_recipe(tmp_path, tiny_model_folder):
    training = {"dataloader_drop_last": True, "per_device_train_batch_size": 64}
    with pytest.raises(RecipeError, match="32 rows do not fill one batch of 64"):
        run_sft(run_recipe(tmp_path, tiny_model_folder, training=training), console=QUIET)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"adam_beta1": 1.5}, "adamw.*beta"),
        ({"dataloader_persistent_workers": True}, "persistent_workers"),
    ],
)
def test_what_torch_refuses_is_a_mistake_in_the_recipe(tmp_path, tiny_model_folder, training, words):
    with pytest.raises(RecipeError, match=words):
        run_sft(run_recipe(tmp_path, tiny_model_folder, training=training), console=QUIET)


def test_gradients_that_never_become_finite_stop_an_fp16_run():
    """The loss scaler would skip every step to the end, and the adapter would be as it was."""
    trainer = BandedTrainer.__new__(BandedTrainer)
    trainer._num_non_finite, trainer.args, trainer.state = (
        0,
        SimpleNamespace(fp16=True),
        SimpleNamespace(global_step=9),
    )
    trainer.accelerator = SimpleNamespace(distributed_type="NO")
    trainer.step_loss, trainer._step_inputs = 1.0, []
    trainer._find_rows, trainer._report = (lambda batches: []), (lambda event, **facts: None)
    for norm in [math.inf] * 30 + [1.0] + [math.nan] * 30:
        trainer._get_grad_norm(None, norm)
    with pytest.raises(NonFiniteError, match="step 10"):
        trainer._get_grad_norm(None, math.nan)


def test_a_run_that_stopped_early_says_how_many_ranks_it_has(tmp_path, tiny_model_folder):
    """Early stopping inside the decay: the figures count what was saved."""
    loaded = run_recipe(
        tmp_path,
        tiny_model_folder,
        adapters=[{"band": "ada", "kind": "adalora", "rank": 2, "adalora": {"interval": 4}}],
        training={
            "max_steps": 40,
            "learning_rate": 1.0,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "early_stopping_patience": 1,
        },
    )
    result = run_sft(loaded, console=QUIET)
    assert result.figures["optimizer_steps"] < 28
    weights = load_file(result.run.adapter / "adapter.safetensors")
    alive = sum(int(value.count_nonzero()) for name, value in weights.items() if "lambda" in name)
    assert result.figures["live_ranks"] == alive > result.figures["target_ranks"]
    assert any("not reached" in value for _, value in summary_rows(result.figures))


def test_overflowing_gradients_do_not_enter_the_scores(tiny_model_folder):
    """A step that the loss scaler skips: one infinity in the averages would make every score NaN for good."""
    from qhybrid.adapters.allocator import RankAllocator, Triplets
    from qhybrid.adapters.schedule import BudgetSchedule

    triplets = Triplets(*(torch.nn.Parameter(torch.ones(size)) for size in ((2, 3), (4, 2), (2,))))
    allocator = RankAllocator("b", {"m": triplets}, BudgetSchedule(10, 1, 3, 1, 2, 1), 0.85, 0.85)
    for value in (1.0, float("inf"), 2.0):
        for parameter in (triplets.q, triplets.p, triplets.lam):
            parameter.grad = torch.full_like(parameter, value)
        allocator.observe(gradient_scale=1024.0)
    assert all(torch.isfinite(score).all() and (score > 0).all() for score in allocator.scores().values())
