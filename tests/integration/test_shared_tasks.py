"""Tasks that share an adapter: the sum of two, trained by all, saved together, and exported as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import chat_rows, run_cli, write_rows
from rich.console import Console
from safetensors.torch import load_file
from task_helpers import at_step, killed, sigterm, turns_of

from qhybrid.adapters.attach import ADAPTER, attach
from qhybrid.adapters.folder import read_plain
from qhybrid.adapters.shared import attach_shared, concatenated
from qhybrid.architecture.bands import layout_of_bands
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import read_spec
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.base.share import share_weights
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.data.prepare import prepare_data
from qhybrid.errors import NonFiniteError, RunFolderError
from qhybrid.recipe.load import LoadedRecipe, parse_recipe
from qhybrid.recipe.tasks import SHARED, task_recipes
from qhybrid.training.checkpoint import newest_sealed
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft
from qhybrid.training.signals import Interrupted

QUIET = Console(quiet=True)
SHARED_BAND = {"rank": 3, "layers": "0-3", "alpha": 5, "dropout": 0.1}


def recipe_in(folder: Path, model: Path, *, tasks: list[dict[str, Any]] | None = None, **sections) -> LoadedRecipe:
    """Two tasks with bands of their own beside a shared one."""
    for name, seed in (("a", 0), ("b", 5)):
        write_rows(folder / f"{name}.jsonl", chat_rows(16, seed=seed))
    held = write_rows(folder / "held.jsonl", chat_rows(6, seed=9))
    base = [
        {
            "name": "a",
            "weight": 2,
            "data": {"sources": str(folder / "a.jsonl")},
            "training": {"run_name": "a", "save_steps": 3},
        },
        {
            "name": "b",
            "data": {"sources": str(folder / "b.jsonl"), "eval_sources": str(held)},
            "adapters": [{"layers": "top", "kind": "rslora", "rank": 2, "target_modules": ["q_proj", "v_proj"]}],
            "training": {"run_name": "b", "max_steps": 5, "learning_rate": 2e-3, "eval_strategy": "epoch"},
        },
    ]
    training = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 100,
        "max_length": 64,
        "seed": 0,
        **sections.pop("training", {}),
    }
    replaced = set.intersection(*(set(task["training"]) for task in tasks or base))  # or it would have no effect
    values = {
        "model": {"path": str(model), "dtype": "float32"},
        "adapters": [{"band": "low", "layers": "bottom", "rank": 2, "loraplus_lr_ratio": 2, "dropout": 0.1}],
        "training": {key: value for key, value in training.items() if key not in replaced},
        "output_dir": str(folder / "run"),
        "tasks": tasks or base,
        "shared": SHARED_BAND,
        **sections,
    }
    return LoadedRecipe(parse_recipe(json.dumps(values), "shared")[0], folder / "recipe.yaml")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_folder):
    """A run that nothing stopped."""
    loaded = recipe_in(tmp_path_factory.mktemp("shared"), tiny_model_folder)
    return loaded, run_sft(loaded, console=QUIET)


def again(whole, folder: Path) -> LoadedRecipe:
    loaded, _ = whole
    return LoadedRecipe(loaded.recipe.model_copy(update={"output_dir": str(folder)}), loaded.path)


def assert_same(folder: Path, expected: Path) -> None:
    for name in ("a", "b"):
        one, other = (
            load_file(run / "tasks" / name / "adapter" / "adapter.safetensors") for run in (folder, expected)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in other), name
        scores = [
            [(e["step"], e["eval_loss"]) for e in read_events(run / "tasks" / name / "events.jsonl", "evaluation")]
            for run in (folder, expected)
        ]
        assert list(dict(scores[0]).items()) == scores[1]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_both_adapters_have_the_shared_factors(whole):
    _, result = whole
    a, b = (read_plain(result.tasks[name].run.folder) for name in "ab")
    shared = {module.module: module for module in b if module.rank == 3}
    assert len(shared) == 28  # layers 0 to 3, where b has nothing of its own
    for module in a:
        if module.module in shared:
            same = shared[module.module]
            assert torch.equal(module.a[:3], same.a) and torch.equal(module.b[:, :3], same.b)
            assert module.scaling == 1 and float(same.b.abs().max()) > 0
    assert {module.rank for module in a} == {3, 5} and {module.rank for module in b} == {2, 3}
    for name in "ab":
        rows = Layout.from_json((result.tasks[name].run.folder / "layout.json").read_text())
        exported = Layout.from_json((result.tasks[name].run.adapter / "layout.json").read_text())
        assert [(r.module, r.rank, r.scaling) for r in rows] == [(r.module, r.rank, r.scaling) for r in exported]


def test_the_exported_adapter_is_what_was_trained(whole):
    """The last step, and the evaluation after it, were those of b."""
    loaded, result = whole
    assert turns_of(result.run.folder)[-1] == ("b", 5)
    held = loaded.recipe.tasks[1].data.eval_sources[0].path
    scored = run_cli("eval", held, "--adapter", result.tasks["b"].run.folder, "--json", "--no-generation")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["loss"] == pytest.approx(result.tasks["b"].figures["eval_loss"], rel=1e-6)


def test_all_steps_move_the_shared_factors_with_one_state(whole):
    _, result = whole
    newest = newest_sealed(result.run.checkpoints)
    assert newest is not None and newest.name == "checkpoint-13"
    common = load_file(newest / "optimizer.safetensors")
    steps = {key: int(value) for key, value in common.items() if key.endswith(":step")}
    assert len(steps) == 56 and set(steps.values()) == {13}
    for name, number in (("a", 8), ("b", 5)):
        own = load_file(newest / "tasks" / name / "optimizer.safetensors")
        assert {int(value) for key, value in own.items() if key.endswith(":step")} == {number}
        assert not any(key.startswith(SHARED) for key in own)
        assert not (result.tasks[name].run.folder / "checkpoints").exists()


@torch.no_grad()
def test_the_sum_and_its_concatenation(tiny_model_folder):
    """W·x + s·B·A·x + s_t·B_t·A_t·x in float64, with the very same parameters in two models."""
    loaded = recipe_in(tiny_model_folder.parent, tiny_model_folder)
    recipes = task_recipes(loaded.recipe)
    spec = read_spec(tiny_model_folder)
    shared = layout_of_bands((loaded.recipe.shared,), spec)
    base = load_base(loaded.recipe.model, loaded.recipe.quantization, device="cpu")
    keep_exact_on_cpu(base)
    factors, models = None, {}
    for name, recipe in recipes.items():
        own = layout_of_bands(recipe.adapters, spec)
        model = attach(share_weights(base), own, dtype=torch.float32)
        factors = attach_shared(model, shared, dtype=torch.float32, factors=factors)
        models[name] = (model.eval(), own)
    for factor in factors.values():
        factor.normal_(std=0.2)
    module = "model.layers.1.mlp.down_proj"
    (a, own), (b, _) = models["a"], models["b"]
    for key, parameter in a.named_parameters():
        if f".{ADAPTER}." in key:
            parameter.normal_(std=0.2)
    in_a, in_b = a.get_base_model().get_submodule(module), b.get_base_model().get_submodule(module)
    assert in_a.lora_A[SHARED].weight is in_b.lora_A[SHARED].weight
    x = torch.randn(3, 96)
    plain = in_a.get_base_layer()(x).double()
    s = 5 / 3
    common = s * x.double() @ in_a.lora_A[SHARED].weight.double().T @ in_a.lora_B[SHARED].weight.double().T
    row = next(row for row in own if row.module == module)
    low = x.double() @ in_a.lora_A[ADAPTER].weight.double().T @ in_a.lora_B[ADAPTER].weight.double().T
    torch.testing.assert_close(in_a(x).double(), plain + common + row.scaling * low, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(in_b(x).double(), plain + common, rtol=1e-5, atol=1e-5)
    joined = {part.module: part for part in concatenated(a, shared, own)}
    delta = x.double() @ joined[module].a.double().T @ joined[module].b.double().T
    torch.testing.assert_close(delta, common + row.scaling * low, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("task", "step", "left"), [("a", 5, 5), ("b", 5, 12), ("a", 2, None)])
def test_killed_it_goes_on_from_the_last_common_checkpoint(whole, tmp_path, monkeypatch, task, step, left):
    loaded = again(whole, tmp_path / "run")
    with monkeypatch.context() as patched:
        at_step(patched, task, step, killed)
        with pytest.raises(KeyboardInterrupt):
            run_sft(loaded, console=QUIET)
    newest = newest_sealed(tmp_path / "run" / "checkpoints")
    assert newest == (None if left is None else tmp_path / "run" / "checkpoints" / f"checkpoint-{left}")
    run_sft(loaded, resume=True, console=QUIET)
    assert_same(tmp_path / "run", whole[1].run.folder)


@pytest.mark.parametrize(("task", "step", "method"), [("a", 4, "training_step"), ("b", 5, "prediction_step")])
def test_a_signal_saves_all_at_once(whole, tmp_path, monkeypatch, task, step, method):
    loaded = again(whole, tmp_path / "run")
    with monkeypatch.context() as patched:
        at_step(patched, task, step, sigterm, method)
        with pytest.raises(Interrupted):
            run_sft(loaded, console=QUIET)
    newest = newest_sealed(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == f"checkpoint-{sum(last_steps(tmp_path / 'run'))}"
    run_sft(loaded, resume=True, console=QUIET)
    assert_same(tmp_path / "run", whole[1].run.folder)
    assert turns_of(tmp_path / "run") == turns_of(whole[1].run.folder)


def test_saved_before_a_task_has_begun_and_after_one_has_ended(tmp_path, tiny_model_folder, monkeypatch):
    """b begins when a has taken all its steps; of the checkpoints only the newest is kept."""
    of_b = {"run_name": "b", "max_steps": 4, "eval_strategy": "epoch", "eval_on_start": True}
    held = {"eval_sources": str(tmp_path / "held.jsonl")}
    tasks = [
        {"name": "a", "weight": 10, "training": {"run_name": "a", "max_steps": 3}},
        {"name": "b", "training": of_b, "data": {"sources": str(tmp_path / "b.jsonl"), **held}},
    ]
    tasks[0]["data"] = {"sources": str(tmp_path / "a.jsonl")}
    training = {"save_steps": 1, "save_total_limit": 1}

    def recipe(folder: str) -> LoadedRecipe:
        return again(
            (recipe_in(tmp_path, tiny_model_folder, tasks=tasks, training=training), None), tmp_path / folder
        )

    run_sft(recipe("expected"), console=QUIET)
    for task, step in (("a", 2), ("a", 3), ("b", 1)):
        with monkeypatch.context() as patched:
            at_step(patched, task, step, sigterm)
            with pytest.raises(Interrupted):
                run_sft(recipe("run"), resume=True, console=QUIET)
    run_sft(recipe("run"), resume=True, console=QUIET)
    assert_same(tmp_path / "run", tmp_path / "expected")


def last_steps(run: Path) -> list[int]:
    return [len(read_events(run / "tasks" / name / "events.jsonl", "step")) for name in "ab"]


def test_one_that_fails_takes_the_others_back_with_it(whole, tmp_path, monkeypatch):
    loaded = again(whole, tmp_path / "run")

    def poison(trainer) -> None:
        trainer.step_loss = float("inf")

    with monkeypatch.context() as patched:
        at_step(patched, "b", 3, poison)
        with pytest.raises(NonFiniteError, match=r"^task b: the loss is inf at step 3"):
            run_sft(loaded, console=QUIET)
    newest = newest_sealed(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == "checkpoint-5"  # of a's third step
    with pytest.raises(RunFolderError, match="weights"):
        tasks = tuple(task.model_copy(update={"weight": 1.0}) for task in loaded.recipe.tasks)
        other = loaded.recipe.model_copy(update={"tasks": tasks})
        run_sft(LoadedRecipe(other, loaded.path), resume=True, console=QUIET)
    run_sft(loaded, resume=True, console=QUIET)
    assert_same(tmp_path / "run", whole[1].run.folder)


def test_training_against_a_float64_reference(tmp_path, tiny_model_folder):
    """Two tasks, one AdamW state for the shared factors, written out by hand on the model's own weights."""
    rate, eps, betas = {"a": 2e-3, "b": 5e-3}, 1e-3, (0.9, 0.999)
    tasks = [
        {
            "name": name,
            "weight": weight,
            "data": {"sources": str(tmp_path / f"{name}.jsonl")},
            "adapters": [{"layers": "2-5", "rank": 2, "alpha": alpha, "target_modules": ["q_proj", "down_proj"]}],
            "training": {"learning_rate": rate[name], "max_steps": steps},
        }
        for name, weight, alpha, steps in (("a", 1, 4, 4), ("b", 1, 3, 3))
    ]
    sections = {
        "tasks": tasks,
        "adapters": None,
        "shared": {"rank": 3, "layers": "0-3", "alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "quantization": {"method": "none"},
    }
    common = {"lr_scheduler_type": "constant", "adam_epsilon": eps, "max_grad_norm": 1e6, "save_strategy": "no"}
    common |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2}

    def trained(folder: Path) -> tuple[LoadedRecipe, dict[str, dict[str, torch.Tensor]]]:
        loaded = recipe_in(tmp_path, tiny_model_folder, training=common, **sections)
        recipe = loaded.recipe.model_copy(update={"output_dir": str(folder)})
        if folder.name == "start":  # what it began with: nothing moves at a rate of 0
            still = tuple(
                task.model_copy(update={"training": task.training.model_copy(update={"learning_rate": 0.0})})
                for task in recipe.tasks
            )
            recipe = recipe.model_copy(update={"tasks": still})
        result = run_sft(LoadedRecipe(recipe, loaded.path), console=QUIET)
        files = {name: load_file(each.run.adapter / "adapter.safetensors") for name, each in result.tasks.items()}
        return LoadedRecipe(recipe, loaded.path), files

    _, start = trained(tmp_path / "start")
    loaded, found = trained(tmp_path / "run")

    model = load_base(loaded.recipe.model, loaded.recipe.quantization, device="cpu").double()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    scales = {"shared": 2.0, "a": 2.0, "b": 1.5}
    factors: dict[str, dict[str, torch.Tensor]] = {"shared": {}, "a": {}, "b": {}}
    for name, tensors in start.items():
        for key, value in tensors.items():
            cut = value if key.endswith("lora_A") else value.T  # (r, ...), of 3 shared and 2 own
            if cut.shape[0] in (3, 5):
                factors["shared"][key] = cut[:3].double().clone()
            if cut.shape[0] in (2, 5):
                factors[name][key] = cut[-2:].double().clone()
    assert {name: len(own) for name, own in factors.items()} == {"shared": 24, "a": 16, "b": 16}
    moments = {owner: {key: [0, 0.0, 0.0] for key in own} for owner, own in factors.items()}

    def step(name: str, batch: list[dict[str, Any]]) -> None:
        leaves = {
            (owner, key): value.requires_grad_()
            for owner in ("shared", name)
            for key, value in factors[owner].items()
        }
        changed = dict(weights)
        for owner, key in leaves:
            if key.endswith("lora_A"):
                module = key.removesuffix(".lora_A")
                delta = leaves[owner, f"{module}.lora_B"].T @ leaves[owner, key]
                changed[f"{module}.weight"] = changed[f"{module}.weight"] + scales[owner] * delta
        total, count = 0.0, 0
        for row in batch:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = torch.func.functional_call(model, changed, (ids,)).logits[0]
            kept = labels[1:] != -100
            total = total - logits[:-1].log_softmax(-1)[kept, labels[1:][kept]].sum()
            count += int(kept.sum())
        gradients = torch.autograd.grad(total / count, list(leaves.values()))
        with torch.no_grad():
            for ((owner, key), value), gradient in zip(leaves.items(), gradients, strict=True):
                state = moments[owner][key]
                state[0] += 1
                state[1] = betas[0] * state[1] + (1 - betas[0]) * gradient
                state[2] = betas[1] * state[2] + (1 - betas[1]) * gradient**2
                first, second = state[1] / (1 - betas[0] ** state[0]), state[2] / (1 - betas[1] ** state[0])
                factors[owner][key] = (value - rate[name] * first / (second.sqrt() + eps)).detach()

    rows = {
        name: list(prepare_data(recipe, load_tokenizer(recipe.model), base_folder=tmp_path).train)
        for name, recipe in task_recipes(loaded.recipe).items()
    }
    taken = {"a": 0, "b": 0}
    for name in "ababab" + "a":
        begin = 2 * taken[name]
        step(name, rows[name][begin : begin + 2])
        taken[name] += 1
    for name in "ab":
        for key, value in found[name].items():
            scale = scales if key.endswith("lora_B") else dict.fromkeys(scales, 1.0)
            parts = [factors[owner][key] * scale[owner] for owner in ("shared", name) if key in factors[owner]]
            expected = torch.cat(parts) if key.endswith("lora_A") else torch.cat(parts).T
            assert float(value.abs().max()) > 1e-3, key
            torch.testing.assert_close(value.double(), expected.detach(), rtol=2e-4, atol=2e-6)
