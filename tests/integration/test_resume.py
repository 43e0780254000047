"""A resumed run equals the uninterrupted one exactly, wherever it was interrupted."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import THREE_BANDS, run_recipe
from rich.console import Console
from safetensors.torch import load_file

from qhybrid.errors import RunFolderError
from qhybrid.training.checkpoint import is_whole, newest_sealed
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft

QUIET = Console(quiet=True)
WITH_DROPOUT = [{**band, "dropout": 0.1} if band["kind"] != "dora" else band for band in THREE_BANDS]
EXACT = ("loss", "grad_norm", "learning_rates", "tokens", "regularizer", "live_ranks")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model_folder):
    """40 steps of accumulation 4 in epochs of 20 steps, dropout 0.1, a checkpoint after every step."""
    loaded = run_recipe(
        tmp_path_factory.mktemp("resume"),
        tiny_model_folder,
        rows=159,  # the last step of an epoch has fewer rows
        adapters=WITH_DROPOUT,
        training={
            "max_steps": 40,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "epoch",
        },
    )
    return loaded, run_sft(loaded, console=QUIET)


def interrupted_at(uninterrupted, step: int):
    """The run folder as a crash right after `step` leaves it."""
    loaded, result = uninterrupted
    folder = result.run.folder
    backup = folder.with_name("whole")
    if not backup.exists():
        shutil.copytree(folder, backup)
    shutil.rmtree(folder)
    shutil.copytree(backup, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "adapter")
    (folder / "run.json").write_text(json.dumps({"status": "running", "versions": {"qhybrid": "0.1.0"}}))
    lines = (folder / "events.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line).get("step", 0) <= step and '"end"' not in line]
    (folder / "events.jsonl").write_text("\n".join(kept) + "\n")
    return loaded, backup


@pytest.mark.parametrize("step", [1, 7, 20, 21, 39])
def test_resuming_is_exact(uninterrupted, step):
    loaded, whole = interrupted_at(uninterrupted, step)
    result = run_sft(loaded, resume=True, console=QUIET)
    expected = {r["step"]: r for r in read_events(whole / "events.jsonl", "step")}
    resumed = {r["step"]: r for r in read_events(result.run.events_file, "step") if r["step"] > step}
    assert sorted(resumed) == list(range(step + 1, 41))
    for number, record in resumed.items():
        for key in EXACT:
            assert record[key] == expected[number][key], (number, key)
    allocations = [
        [(a["step"], a["live_ranks"]) for a in read_events(file, "allocation")]
        for file in (whole / "events.jsonl", result.run.events_file)
    ]
    assert allocations[0] == allocations[1]
    for name in ("adapter.safetensors", "peft/lora/adapter_model.safetensors"):
        assert (whole / "adapter" / name).read_bytes() == (result.run.adapter / name).read_bytes()
    last = "checkpoints/checkpoint-40/allocators.safetensors"
    one, other = load_file(whole / last), load_file(result.run.folder / last)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_damaged_checkpoint_is_passed_over(uninterrupted):
    loaded, _ = interrupted_at(uninterrupted, 20)
    checkpoints = uninterrupted[1].run.checkpoints
    damaged = checkpoints / "checkpoint-20" / "adapter.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (checkpoints / "checkpoint-19" / "manifest.json").unlink()  # killed before the seal
    (checkpoints / "checkpoint-99").mkdir()
    assert not is_whole(checkpoints / "checkpoint-20")
    assert newest_sealed(checkpoints).name == "checkpoint-18"
    assert run_sft(loaded, resume=True, console=QUIET).run.resume_from.name == "checkpoint-18"


def test_another_recipe_is_not_resumed(uninterrupted, tiny_model_folder):
    loaded, _ = interrupted_at(uninterrupted, 7)
    training = loaded.recipe.training.model_copy(update={"learning_rate": 1e-5})
    recipe = loaded.recipe.model_copy(update={"training": training})
    changed = type(loaded)(recipe, loaded.path)
    with pytest.raises(RunFolderError, match="learning_rate") as caught:
        run_sft(changed, resume=True, console=QUIET)
    assert caught.value.exit_code == 2
    quieter = loaded.recipe.training.model_copy(update={"logging_steps": 7.0})
    again = type(loaded)(loaded.recipe.model_copy(update={"training": quieter}), loaded.path)
    run_sft(again, resume=True, console=QUIET)


def test_resume_auto_without_a_run_starts_one(tmp_path, tiny_model_folder):
    loaded = run_recipe(tmp_path, tiny_model_folder, training={"max_steps": 3}, adapters=[{"rank": 2}])
    result = run_sft(loaded, resume=True, console=QUIET)
    assert result.run.resume_from is None and result.figures["optimizer_steps"] == 3


def test_a_checkpoint_of_the_last_step_is_only_loaded(uninterrupted):
    """A crash between the last checkpoint and the adapter: nothing is trained again."""
    loaded, whole = interrupted_at(uninterrupted, 40)
    result = run_sft(loaded, resume=True, console=QUIET)
    steps = [record["step"] for record in read_events(result.run.events_file, "step")]
    assert steps == list(range(1, 41))
    name = "adapter/adapter.safetensors"
    assert (whole / name).read_bytes() == (result.run.folder / name).read_bytes()


def test_changed_data_is_not_resumed(tmp_path, tiny_model_folder):
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=[{"rank": 2}],
        training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    )  # fmt: skip
    result = run_sft(loaded, console=QUIET)
    status = json.loads((result.run.folder / "run.json").read_text())
    (result.run.folder / "run.json").write_text(json.dumps({**status, "status": "failed", "process": {}}))
    shutil.rmtree(result.run.checkpoints / "checkpoint-4")
    rows = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(RunFolderError, match="data of the run"):
        run_sft(loaded, resume=True, console=QUIET)


def test_checkpoints_without_an_optimizer_are_not_resumed(tmp_path, tiny_model_folder):
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=[{"rank": 2}],
        training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_only_model": True},
    )  # fmt: skip
    result = run_sft(loaded, console=QUIET)
    status = json.loads((result.run.folder / "run.json").read_text())
    (result.run.folder / "run.json").write_text(json.dumps({**status, "status": "failed", "process": {}}))
    with pytest.raises(RunFolderError, match="no optimizer state"):
        run_sft(loaded, resume=True, console=QUIET)
