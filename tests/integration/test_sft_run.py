"""Whole runs on a tiny NF4 model: what the run folder holds, and what is trained."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import THREE_BANDS, run_recipe
from rich.console import Console
from safetensors.torch import load_file

from qhybrid.architecture.layout import Layout
from qhybrid.errors import RecipeError
from qhybrid.recipe.load import parse_recipe, resolve
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft

QUIET = Console(quiet=True)


def test_the_run_folder_holds_everything(finished):
    loaded, result = finished
    folder = result.run.folder
    recipe, _ = parse_recipe((folder / "recipe.yaml").read_text(), "recipe.yaml")
    assert recipe == resolve(loaded.recipe)
    layout = Layout.from_json((folder / "layout.json").read_text())
    assert layout.bands == ("low", "mid", "high")
    audit = json.loads((folder / "audit.json").read_text())
    assert audit["totals"]["rows_in"] == 40 and audit["totals"]["dropped"] == 0
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["checkpoint-15", "checkpoint-20"]
    assert {p.name for p in (folder / "adapter" / "peft").iterdir()} == {"lora", "dora"}
    assert (folder / "adapter" / "tokenizer.json").is_file()


def test_every_step_is_logged(finished):
    steps = read_events(finished[1].run.events_file, "step")
    assert [record["step"] for record in steps] == list(range(1, 21))
    for record in steps:
        assert record["loss"] > 0 and record["grad_norm"] > 0 and record["tokens"] > 0
        assert record["tokens_per_second"] > 0 and record["memory"]["process_bytes"] > 0
        assert len(record["live_ranks"]) == 14
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]


def test_adalora_follows_its_schedule_exactly(finished):
    """20 steps: 2 of warm-up, 6 at the end. 14 modules, init 6, target 3: 84 triplets to 42."""
    events = finished[1].run.events_file
    (schedule,) = read_events(events, "adalora_schedule")
    assert (schedule["warmup_steps"], schedule["final_steps"], schedule["interval"]) == (2, 6, 1)
    assert (schedule["init_budget"], schedule["target_budget"]) == (84, 42)
    allocations = read_events(events, "allocation")
    assert [a["step"] for a in allocations] == list(range(3, 15))
    for allocation in allocations:
        assert sum(allocation["live_ranks"].values()) == allocation["budget"]
        left = 1 - (allocation["step"] - 2) / 12
        assert abs(allocation["budget"] - (42 + 42 * left**3)) <= 0.5
    final = read_events(events, "step")[-1]["live_ranks"]
    assert sum(final.values()) == 42 and final == allocations[-1]["live_ranks"]
    weights = load_file(finished[1].run.adapter / "adapter.safetensors")
    assert sum(int((value != 0).sum()) for name, value in weights.items() if "lambda" in name) == 42


def test_learning_rates_are_those_of_the_recipe(finished):
    for record in read_events(finished[1].run.events_file, "step"):
        rates = record["learning_rates"]
        assert set(rates) == {"lora.A", "lora.B×4", "lora.B", "adalora.PQ", "adalora.lambda", "dora.magnitude"}
        assert rates["lora.B×4"] == pytest.approx(4 * rates["lora.A"], rel=1e-12)
        assert len({rates[name] for name in rates if name != "lora.B×4"}) == 1


def test_every_band_was_trained_in_its_dtype(tmp_path, tiny_model_folder):
    loaded = run_recipe(tmp_path, tiny_model_folder, model={"path": str(tiny_model_folder), "dtype": "bfloat16"})
    result = run_sft(loaded, console=QUIET)
    weights = load_file(result.run.adapter / "adapter.safetensors")
    for name, value in weights.items():
        kind = name.rpartition(".")[2]
        assert value.dtype == (torch.float32 if kind in ("lora_lambda", "lora_magnitude") else torch.bfloat16)
        if kind == "lora_B" and ".2." not in name and ".3." not in name:  # P does not start at zero
            assert value.abs().max() > 0, name


@pytest.mark.parametrize("training", [{}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_evaluation_loss_is_of_a_token_whatever_the_batches(tmp_path, tiny_model_folder, training):
    """10 rows of unequal length in batches of 3, 3, 3 and 1 or in one: the mean over batches would differ."""
    losses = []
    for size in (3, 16):
        loaded = run_recipe(
            tmp_path / str(size),
            tiny_model_folder,
            eval_rows=10,
            adapters=[{"rank": 2}],
            training={
                "max_steps": 2,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "per_device_eval_batch_size": size,
                **training,
            },
        )
        losses.append(run_sft(loaded, console=QUIET).figures["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_evaluation_loss_is_the_cross_entropy(finished):
    """No regulariser in it: `qhybrid eval` on the same rows gives the same number."""
    from qhybrid.cli.evaluate import _source
    from qhybrid.data.prepare import prepare_file
    from qhybrid.evaluation.evaluate import evaluate
    from qhybrid.evaluation.models import load_adapter_for_inference

    loaded, result = finished
    logged = read_events(result.run.events_file, "evaluation")
    assert [record["step"] for record in logged] == [10, 20]
    model, tokenizer, _ = load_adapter_for_inference(result.run.adapter)
    source = _source(loaded.recipe.data.eval_sources[0].path, "auto", (), None)
    rows, _ = prepare_file(source, tokenizer, chat_template=None, base_folder=result.run.folder)
    scores = evaluate(
        model,
        tokenizer,
        rows,
        batch_size=8,
        max_new_tokens=None,
    )
    assert scores.loss == pytest.approx(logged[-1]["eval_loss"], rel=1e-5)


def test_the_regulariser_is_there_and_ignores_accumulation(tmp_path, tiny_model_folder):
    """8 rows a step as 1 × 8 or 4 × 2: same losses, same regulariser, same adapter."""
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        loaded = run_recipe(
            tmp_path / str(size),
            tiny_model_folder,
            training={
                "max_steps": 6,
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": accumulation,
            },
        )
        results.append(run_sft(loaded, console=QUIET))
    one, four = (read_events(result.run.events_file, "step") for result in results)
    for a, b in zip(one, four, strict=True):
        assert a["regularizer"] > 0.1
        assert a["regularizer"] == pytest.approx(b["regularizer"], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["live_ranks"] == b["live_ranks"]
    assert one[-1]["regularizer"] < one[0]["regularizer"]  # it is minimised


def test_scores_with_the_regulariser_are_those_of_the_whole_objective(tmp_path, tiny_model_folder, monkeypatch):
    """The paper's scores: autograd through task loss + gamma·R gives the same gradients that are observed."""
    from qhybrid.adapters.allocator import RankAllocator

    observed: dict[bool, dict] = {}
    for in_scores in (False, True):

        def keep(self, gradient_scale=1.0, in_scores=in_scores):
            grads = {n: (t.p.detach().clone(), t.p.grad.clone()) for n, t in self._modules.items()}
            observed.setdefault(in_scores, grads)

        monkeypatch.setattr(RankAllocator, "observe", keep)
        settings = {"regularizer_weight": 0.3, "regularizer_in_scores": in_scores}
        bands = [{"layers": "all", "kind": "adalora", "rank": 2, "adalora": settings}]
        loaded = run_recipe(
            tmp_path / str(in_scores), tiny_model_folder, adapters=bands, training={"max_steps": 4}
        )
        run_sft(loaded, console=QUIET)
    for module, (p, task) in observed[False].items():
        wide = p.double().requires_grad_()
        penalty = (wide.T @ wide - torch.eye(p.shape[1], dtype=torch.float64)).norm()
        (gradient,) = torch.autograd.grad(0.3 * penalty / (2 * len(observed[False])), wide)
        torch.testing.assert_close(
            observed[True][module][1].double(), task.double() + gradient, rtol=1e-5, atol=1e-8
        )


def test_a_regulariser_of_zero_leaves_it_out(tmp_path, tiny_model_folder):
    bands = [{"layers": "all", "kind": "adalora", "rank": 2, "adalora": {"regularizer_weight": 0}}]
    result = run_sft(run_recipe(tmp_path, tiny_model_folder, adapters=bands), console=QUIET)
    assert all(record["regularizer"] == 0 for record in read_events(result.run.events_file, "step"))


def test_early_stopping_and_the_best_checkpoint(tmp_path, tiny_model_folder):
    """Two evaluations without a gain of 1 end the run. With this rate the first adapter is the best."""
    loaded = run_recipe(
        tmp_path,
        tiny_model_folder,
        adapters=[{"kind": "lora", "rank": 4}],
        training={
            "max_steps": 40,
            "learning_rate": 200.0,
            "max_grad_norm": 0.0,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "early_stopping_patience": 2,
            "early_stopping_threshold": 1.0,
        },
    )
    result = run_sft(loaded, console=QUIET)
    losses = {r["step"]: r["eval_loss"] for r in read_events(result.run.events_file, "evaluation")}
    assert list(losses) == [2, 4, 6]
    best = min(losses, key=losses.get)
    saved = load_file(result.run.checkpoints / f"checkpoint-{best}" / "adapter.safetensors")
    final = load_file(result.run.adapter / "adapter.safetensors")
    assert all(torch.equal(saved[name], final[name]) for name in saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "packing_strategy": "bfd"},
        {"packing": True, "packing_strategy": "wrapped"},
        {"gradient_checkpointing": True},
        {"optim": "adamw_bnb_8bit"},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"optim": "lion_8bit"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.2, "weight_decay": 0.1},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_training_options_work_with_all_bands(tmp_path, tiny_model_folder, changes):
    rate = {"sgd": 0.5, "lion_8bit": 5e-4}.get(changes.get("optim"), 5e-3)
    loaded = run_recipe(tmp_path, tiny_model_folder, training={"learning_rate": rate, "max_steps": 12, **changes})
    result = run_sft(loaded, console=QUIET)
    steps = read_events(result.run.events_file, "step")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert sum(steps[-1]["live_ranks"].values()) == 42


def test_an_optimizer_that_is_not_installed_or_makes_its_own_groups_is_refused(tmp_path, tiny_model_folder):
    loaded = run_recipe(
        tmp_path,
        tiny_model_folder,
        adapters=[{"kind": "lora+", "rank": 4}],
        training={"optim": "galore_adamw", "optim_target_modules": "all-linear"},
    )
    with pytest.raises(RecipeError, match="galore_adamw"):
        run_sft(loaded, console=QUIET)


def test_gradient_checkpointing_changes_nothing(tmp_path, tiny_model_folder):
    runs = []
    for on in (False, True):
        loaded = run_recipe(tmp_path / str(on), tiny_model_folder, training={"gradient_checkpointing": on})
        runs.append(read_events(run_sft(loaded, console=QUIET).run.events_file, "step"))
    for plain, checkpointed in zip(*runs, strict=True):
        assert plain["loss"] == pytest.approx(checkpointed["loss"], rel=1e-5)
        assert plain["live_ranks"] == checkpointed["live_ranks"]


def test_evaluating_does_not_change_the_training(tmp_path, tiny_model_folder):
    bands = [{**band, "dropout": 0.1} if band["kind"] != "dora" else band for band in THREE_BANDS]
    runs = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}):
        loaded = run_recipe(
            tmp_path / str(len(evaluation)), tiny_model_folder, adapters=bands, training=evaluation
        )
        runs.append(read_events(run_sft(loaded, console=QUIET).run.events_file, "step"))
    assert [r["loss"] for r in runs[0]] == [r["loss"] for r in runs[1]]


def test_an_unquantised_base_trains_too(tmp_path, tiny_model_folder):
    loaded = run_recipe(tmp_path, tiny_model_folder, quantization={"method": "none"})
    steps = read_events(run_sft(loaded, console=QUIET).run.events_file, "step")
    assert steps[-1]["loss"] < steps[0]["loss"]
