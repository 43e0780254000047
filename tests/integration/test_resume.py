"""A resumed run equals the uninterrupted one exactly, wherever it was interrupted."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import THREE_BANDS, record_figure, run_recipe
from rich.console import Console
from safetensors.torch import load_file

from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.data.prepare import prepare_data
from qhybrid.errors import RecipeError, RunFolderError
from qhybrid.training import session
from qhybrid.training.checkpoint import is_whole, newest_sealed, prune, seal
from qhybrid.training.events import read_events
from qhybrid.training.preflight import preflight, settle
from qhybrid.training.sft import run_sft

QUIET = Console(quiet=True)
WITH_DROPOUT = [{**band, "dropout": 0.1} if band["kind"] != "dora" else band for band in THREE_BANDS]
RECIPES = {
    "mixed": WITH_DROPOUT,
    "lora": [{"rank": 4, "dropout": 0.1}],
    "lora+": [{"rank": 4, "loraplus_lr_ratio": 4, "dropout": 0.1}],
    "dora": [{"kind": "dora", "rank": 4}],  # which takes no dropout
    "adalora": [{"band": "ada", "kind": "adalora", "rank": 3, "adalora": {"init_rank": 6}, "dropout": 0.1}],
}
EXACT = ("loss", "grad_norm", "learning_rates", "tokens", "regularizer", "live_ranks")


def forty_steps(folder, model, bands):
    """Accumulation 4 in epochs of 20 steps, dropout 0.1, a checkpoint after every step."""
    loaded = run_recipe(
        folder,
        model,
        rows=159,  # the last step of an epoch has fewer rows
        adapters=bands,
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model_folder):
    """40 steps of three bands."""
    return forty_steps(tmp_path_factory.mktemp("resume"), tiny_model_folder, RECIPES["mixed"])


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == "mixed" else pytest.mark.slow) for name in RECIPES],
)
def of_each_kind(request, tmp_path_factory, tiny_model_folder):
    """The same for every kind; its name, and what `uninterrupted` gives."""
    if request.param == "mixed":
        return "mixed", request.getfixturevalue("uninterrupted")
    folder = tmp_path_factory.mktemp(f"resume-{request.param}")
    return request.param, forty_steps(folder, tiny_model_folder, RECIPES[request.param])


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
def test_resuming_is_exact(of_each_kind, step):
    name, whole_run = of_each_kind
    loaded, whole = interrupted_at(whole_run, step)
    result = run_sft(loaded, resume=True, console=QUIET)
    expected = {r["step"]: r for r in read_events(whole / "events.jsonl", "step")}
    resumed = {r["step"]: r for r in read_events(result.run.events_file, "step") if r["step"] > step}
    assert sorted(resumed) == list(range(step + 1, 41))
    for number, record in resumed.items():
        for key in EXACT:
            assert record.get(key) == expected[number].get(key), (number, key)
        rates = record["learning_rates"]
        if "lora.B×4" in rates:  # item 3: LoRA+ still has its effect
            assert rates["lora.B×4"] == pytest.approx(4 * rates["lora.A"], rel=1e-12)
    allocations = [
        [(a["step"], a["live_ranks"]) for a in read_events(file, "allocation")]
        for file in (whole / "events.jsonl", result.run.events_file)
    ]
    assert allocations[0] == allocations[1] and bool(allocations[0]) == (name in ("mixed", "adalora"))
    files = [file.relative_to(whole) for file in (whole / "adapter").rglob("*.safetensors")]
    assert len(files) >= 2
    for file in files:
        assert (whole / file).read_bytes() == (result.run.folder / file).read_bytes()
    if allocations[0]:
        last = "checkpoints/checkpoint-40/allocators.safetensors"
        one, other = load_file(whole / last), load_file(result.run.folder / last)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    figure = "loss and gradient norm differ by 0.0, adapter bytes equal"
    record_figure(2, f"{name}, stopped after step {step} of 40", figure)


def test_settings_take_effect_after_a_resume(uninterrupted, monkeypatch):
    """No group is empty, none lost its parameters, and the final ranks are those of the recipe."""
    groups = []
    create = session.BandedTrainer.create_optimizer

    def kept(self, model=None):
        groups.append([(g["name"], len(g["params"])) for g in create(self, model).param_groups])
        return self.optimizer

    monkeypatch.setattr(session.BandedTrainer, "create_optimizer", kept)
    loaded, _ = interrupted_at(uninterrupted, 39)
    result = run_sft(loaded, resume=True, console=QUIET)
    assert {name for name, _ in groups[0]} == set(
        read_events(result.run.events_file, "step")[-1]["learning_rates"]
    )
    assert all(number > 0 for _, number in groups[0])
    state = json.loads((result.run.checkpoints / "checkpoint-40" / "state.json").read_text())
    assert [group["name"] for group in state["optimizer"]["groups"]] == [name for name, _ in groups[0]]
    weights = load_file(result.run.adapter / "adapter.safetensors")
    alive = sum(int(value.count_nonzero()) for name, value in weights.items() if "lambda" in name)
    assert alive <= result.figures["target_ranks"] == 42 and result.figures["allocations"] > 0
    figure = f"{alive} of at most 42, after {result.figures['allocations']} allocations"
    record_figure(3, "AdaLoRA's final live ranks", figure)
    record_figure(3, "lr_B/lr_A after a resume", "4, as in the recipe; no empty parameter group")


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


def mark_as_crashed(run):
    """As if the process had died after its last checkpoint."""
    shutil.rmtree(run.adapter)
    status = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**status, "status": "failed", "process": {}}))


@pytest.mark.parametrize("step", [20, 40])
def test_a_crash_between_the_last_checkpoint_of_an_epoch_and_its_evaluation_is_made_up_for(uninterrupted, step):
    loaded, whole = interrupted_at(uninterrupted, step)
    events = uninterrupted[1].run.events_file
    lines = events.read_text().splitlines()
    kept = [line for line in lines if '"eval_loss"' not in line or json.loads(line)["step"] < step]
    events.write_text("\n".join(kept) + "\n")
    result = run_sft(loaded, resume=True, console=QUIET)
    expected, found = (
        [(e["step"], e["eval_loss"]) for e in read_events(file, "evaluation")]
        for file in (whole / "events.jsonl", result.run.events_file)
    )
    assert found == expected and [number for number, _ in found] == [20, 40]
    assert found[-1][1] == result.figures["eval_loss"]
    assert result.figures["live_ranks"] == uninterrupted[1].figures["live_ranks"]


@pytest.mark.parametrize("patience", [None, 1])
def test_a_crash_before_the_adapter_was_written_still_gives_the_best_one(tmp_path, tiny_model_folder, patience):
    """The loss falls and counts as worse for it, so the first evaluation is the best one."""
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=[{"rank": 2}],
        training={
            "max_steps": 8, "greater_is_better": True, "eval_strategy": "steps", "eval_steps": 2,
            "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True,
            "early_stopping_patience": patience,
        },
    )  # fmt: skip
    result = run_sft(loaded, console=QUIET)
    best = (result.run.adapter / "adapter.safetensors").read_bytes()
    last = result.run.checkpoints / f"checkpoint-{result.figures['optimizer_steps']}" / "adapter.safetensors"
    assert best != last.read_bytes()
    assert result.figures["optimizer_steps"] == (8 if patience is None else 4)
    mark_as_crashed(result.run)
    again = run_sft(loaded, resume=True, console=QUIET)
    assert (again.run.adapter / "adapter.safetensors").read_bytes() == best
    for name in ("optimizer_steps", "eval_loss"):
        assert again.figures[name] == result.figures[name]


def test_schedule_free_optimizers_give_the_averaged_weights_after_a_crash_too(tmp_path, tiny_model_folder):
    """Checkpoints hold the weights that are trained; the result is what the optimizer's eval makes of them."""
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=[{"rank": 2}],
        training={
            "max_steps": 6, "optim": "schedule_free_adamw", "lr_scheduler_type": "constant",
            "save_strategy": "steps", "save_steps": 3,
        },
    )  # fmt: skip
    result = run_sft(loaded, console=QUIET)
    whole = (result.run.adapter / "adapter.safetensors").read_bytes()
    assert whole != (result.run.checkpoints / "checkpoint-6" / "adapter.safetensors").read_bytes()
    mark_as_crashed(result.run)
    assert (run_sft(loaded, resume=True, console=QUIET).run.adapter / "adapter.safetensors").read_bytes() == whole
    mark_as_crashed(result.run)
    shutil.rmtree(result.run.checkpoints / "checkpoint-6")
    assert (run_sft(loaded, resume=True, console=QUIET).run.adapter / "adapter.safetensors").read_bytes() == whole


def test_schedule_free_optimizers_are_refused_beside_adalora(tmp_path, tiny_model_folder):
    training = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
    with pytest.raises(RecipeError, match="dropped triplets would come back"):
        run_sft(run_recipe(tmp_path, tiny_model_folder, training=training), console=QUIET)


def test_a_template_beside_the_recipe_does_not_stop_a_resume(tmp_path, tiny_model_folder, monkeypatch):
    """The run folder names it from the root, the recipe by its name."""
    (tmp_path / "dated.jinja").write_text(DATED)
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=[{"rank": 2}],
        data={"sources": "train.jsonl", "chat_template": "dated.jinja"},
        training={"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_length": None},
    )  # fmt: skip
    result = run_sft(loaded, console=QUIET)
    mark_as_crashed(result.run)
    preflight(settle(loaded), base_folder=loaded.folder, resume=True, overwrite=False)
    monkeypatch.chdir(tmp_path)
    run_sft(loaded, resume=True, console=QUIET)


def test_pruning_leaves_the_newest_sealed_one(tmp_path):
    """A damaged checkpoint of a later step, from before the crash, is not a newer one."""
    for step, sealed in ((100, True), (200, True), (400, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter.safetensors").write_bytes(b"weights")
        if sealed:
            seal(folder)
    prune(tmp_path, newest=200, limit=1, keep=None)
    assert newest_sealed(tmp_path).name == "checkpoint-200"
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-200", "checkpoint-400"]


DATED = (
    "{{- 'Today is ' + strftime_now('%d %B %Y') + '.\\n' }}{% for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_template_with_the_date_is_resumed_on_another_day(tmp_path, tiny_model_folder):
    (tmp_path / "dated.jinja").write_text(DATED)
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=[{"rank": 2}],
        data={"sources": str(tmp_path / "train.jsonl"), "chat_template": str(tmp_path / "dated.jinja")},
        training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_length": None},
    )  # fmt: skip
    result = run_sft(loaded, console=QUIET)
    mark_as_crashed(result.run)
    shutil.rmtree(result.run.checkpoints / "checkpoint-4")
    status = json.loads((result.run.folder / "run.json").read_text())
    tokenizer = load_tokenizer(loaded.recipe.model)
    old, new = (
        prepare_data(loaded.recipe, tokenizer, base_folder=tmp_path, date=date)
        for date in ("2001-02-03", status["date"])
    )
    assert old.fingerprint != new.fingerprint == status["data_fingerprint"]
    assert "Today is 03 February 2001." in tokenizer.decode(old.train[0]["input_ids"])
    # As if it had been started on that day, and is resumed today.
    changed = {**status, "date": "2001-02-03", "data_fingerprint": old.fingerprint}
    (result.run.folder / "run.json").write_text(json.dumps(changed))
    again = run_sft(loaded, resume=True, console=QUIET)
    assert again.run.resume_from.name == "checkpoint-2"
    assert json.loads((again.run.adapter / "adapter.json").read_text())["date"] == "2001-02-03"


@pytest.mark.parametrize("file", ["train.jsonl", "eval.jsonl"])
def test_changed_data_is_not_resumed(tmp_path, tiny_model_folder, file):
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=[{"rank": 2}],
        training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    )  # fmt: skip
    result = run_sft(loaded, console=QUIET)
    status = json.loads((result.run.folder / "run.json").read_text())
    (result.run.folder / "run.json").write_text(json.dumps({**status, "status": "failed", "process": {}}))
    shutil.rmtree(result.run.checkpoints / "checkpoint-4")
    rows = (tmp_path / file).read_text().splitlines(keepends=True)
    (tmp_path / file).write_text("".join(rows[:-1]))
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
