"""Runs with training.preconditioner: they train, resume exactly, and leave AdaLoRA's scores to the task's loss."""

from __future__ import annotations

import pytest
import torch
from helpers import THREE_BANDS, cut_back, randomize_adapters, recipe_error, run_recipe
from rich.console import Console
from safetensors.torch import load_file

from qhybrid.errors import RecipeError
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.training import sft, trainer
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft

QUIET = Console(quiet=True)
RIEMANNIAN = {"preconditioner": "riemannian"}


def test_it_trains_every_kind_and_resumes_exactly(tmp_path, tiny_model_folder):
    training = {**RIEMANNIAN, "max_steps": 12, "save_strategy": "steps", "save_steps": 5}
    loaded = run_recipe(tmp_path, tiny_model_folder, training=training)
    whole = run_sft(loaded, console=QUIET).run
    steps = read_events(whole.events_file, "step")
    assert steps[-1]["loss"] < 0.95 * steps[0]["loss"]
    folder = cut_back(whole.folder, tmp_path / "cut", 5)
    recipe = loaded.recipe.model_copy(update={"output_dir": str(folder)})
    resumed = run_sft(LoadedRecipe(recipe, loaded.path), resume=True, console=QUIET).run
    assert resumed.resume_from.name == "checkpoint-5"
    again = read_events(resumed.events_file, "step")
    assert [record["loss"] for record in again] == [record["loss"] for record in steps]
    name = "adapter.safetensors"
    assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def scores_and_norms(folder, model, monkeypatch, **training):
    """AdaLoRA's averages and the gradient norms of three steps that change nothing, with adapters that matter."""
    attach = sft.attach

    def attach_random(*args, **kwargs):
        attached = attach(*args, **kwargs)
        randomize_adapters(attached, scale=0.3)
        return attached

    monkeypatch.setattr(sft, "attach", attach_random)
    settings = {"max_steps": 3, "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 3, **training}
    bands = [*THREE_BANDS[:1], {**THREE_BANDS[1], "adalora": {"init_rank": 6, "warmup": 1, "final": 0}}]
    run = run_sft(run_recipe(folder, model, adapters=bands, training=settings), console=QUIET).run
    monkeypatch.undo()
    averages = load_file(run.checkpoints / "checkpoint-3" / "allocators.safetensors")
    return averages, [record["grad_norm"] for record in read_events(run.events_file, "step")]


def test_adaloras_scores_are_of_the_tasks_own_gradients(tmp_path, tiny_model_folder, monkeypatch):
    plain, norms = scores_and_norms(tmp_path / "plain", tiny_model_folder, monkeypatch)
    found, others = scores_and_norms(tmp_path / "preconditioned", tiny_model_folder, monkeypatch, **RIEMANNIAN)
    assert any(key.startswith("mid:importance") and value.any() for key, value in plain.items())
    assert plain.keys() == found.keys() and all(torch.equal(plain[key], found[key]) for key in plain)
    assert others == pytest.approx(norms, rel=1e-2)  # of the task's gradients, too; without preconditioner with R


def test_it_comes_between_clipping_and_the_regulariser(tmp_path, tiny_model_folder, monkeypatch):
    order = []
    for name in ("clip_gradients", "precondition", "add_regularizer"):
        function = getattr(trainer, name)

        def told(*args, name=name, function=function, **kwargs):
            order.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(trainer, name, told)
    run_sft(run_recipe(tmp_path, tiny_model_folder, training={**RIEMANNIAN, "max_steps": 3}), console=QUIET)
    assert order == ["clip_gradients", "precondition", "add_regularizer"] * 3


def test_optimizers_that_make_their_own_groups_are_refused(tmp_path, tiny_model_folder, monkeypatch):
    """GaLore, APOLLO, LOMO: their libraries are not needed to say so."""
    monkeypatch.setattr(
        sft.BandedTrainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.SGD, {"optimizer_dict": {}})
    )
    training = {**RIEMANNIAN, "optim": "galore_adamw_layerwise"}
    loaded = run_recipe(tmp_path, tiny_model_folder, training=training, adapters=[{"rank": 2}])
    with pytest.raises(RecipeError, match="a preconditioner do not work with it") as caught:
        run_sft(loaded, console=QUIET)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("training: {preconditioner_delta: 0.1}", "has no effect without training.preconditioner"),
        ("training: {preconditioner: riemannian, preconditioner_delta: 0}", "preconditioner_delta"),
        ("training: {preconditioner: newton}", "riemannian"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(section, words):
    recipe = f"model: {{path: m}}\nadapters: [{{rank: 2}}]\ndata: {{sources: r.jsonl}}\noutput_dir: out\n{section}"
    assert words in recipe_error(recipe)


def test_scores_of_the_whole_objective_are_refused_beside_it():
    bands = "adapters: [{kind: adalora, rank: 2, adalora: {regularizer_in_scores: true}}]"
    recipe = f"model: {{path: m}}\n{bands}\ndata: {{sources: r.jsonl}}\noutput_dir: out\n"
    assert "regularizer_in_scores" in recipe_error(recipe + "training: {preconditioner: riemannian}")
