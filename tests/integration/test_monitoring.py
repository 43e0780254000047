"""Spectra and importance in the event log of a run: right, at the right steps, and without any effect on it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import cut_back, recipe_error, run_recipe
from rich.console import Console
from safetensors.torch import load_file

from qhybrid.recipe.load import LoadedRecipe
from qhybrid.recipe.monitoring import MonitoringSection
from qhybrid.training import sft
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft

QUIET = Console(quiet=True)
TRAINING = {"max_steps": 11, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny_model_folder):
    """Eleven steps of three bands, of which every third is measured, and what the gradients were there."""
    seen = []

    class Watching(sft.BandedTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.gradient_watchers.append(self.look)

        def look(self, scale, access):
            products = {}
            for name, parameter in self.model.named_parameters():
                if ".lora_A." in name or ".lora_B." in name:
                    each = (parameter.detach().double() * parameter.grad.double()).abs()
                    products.setdefault(name.split(".lora_")[0].removeprefix("base_model.model."), []).append(each)
            seen.append(
                {m: float(torch.cat([e.flatten() for e in parts]).mean()) for m, parts in products.items()}
            )

    folder = tmp_path_factory.mktemp("watched")
    loaded = run_recipe(folder, tiny_model_folder, training=TRAINING, monitoring={"spectrum_steps": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "BandedTrainer", Watching)
        run = run_sft(loaded, console=QUIET).run
    return loaded, run, seen


def test_spectra_are_those_of_the_checkpoints(watched):
    """Measured after the update and the allocation of a step, as its checkpoint holds them."""
    _, run, _ = watched
    events = read_events(run.events_file, "spectra")
    assert [event["step"] for event in events] == [3, 6, 9, 11]
    live = {a["step"]: a["live_ranks"] for a in read_events(run.events_file, "allocation")}
    scalings = {"low": 2.0, "mid": 1.0, "high": 2.0}  # twice the rank, over the initial rank
    for event in events:
        weights = load_file(run.checkpoints / f"checkpoint-{event['step']}" / "adapter.safetensors")
        assert len(event["modules"]) == 42
        for name, told in event["modules"].items():
            layer = int(name.split(".")[2])
            b = weights[f"{name}.lora_B"].double()
            if f"{name}.lora_lambda" in weights:
                b = b * weights[f"{name}.lora_lambda"].double()
                latest = max((step for step in live if step <= event["step"]), default=None)
                assert told["live_rank"] == (6 if latest is None else live[latest][name])
                assert told["live_rank"] >= sum(value > 1e-6 * told["norm"] for value in told["singular_values"])
            dense = scalings[("low", "mid", "high")[layer // 2]] * b @ weights[f"{name}.lora_A"].double()
            sigma = torch.linalg.svdvals(dense)[: told["rank"]].tolist()
            assert told["singular_values"] == pytest.approx(sigma, rel=1e-3, abs=2e-8 * sigma[0])
            assert told["largest"] == told["singular_values"][0]
            assert told["norm"] == pytest.approx(float(dense.norm()), rel=1e-3)
            if not dense.any():  # AdaLoRA dropped them all
                assert told["energy_rank_99"] == told["effective_rank"] == told["stable_rank"] == 0
                continue
            squares = torch.tensor(sigma).square()
            for share, key in ((0.9, "energy_rank_90"), (0.99, "energy_rank_99")):
                assert told[key] == next(k for k in range(1, 99) if squares[:k].sum() >= share * squares.sum())
            shares = [value / sum(sigma) for value in sigma if value > 0]
            entropy = -sum(share * math.log(share) for share in shares)
            assert told["effective_rank"] == pytest.approx(math.exp(entropy), rel=2e-3)
            assert told["stable_rank"] == pytest.approx(float(squares.sum() / squares[0]), rel=2e-3)


def test_importance_is_a_running_average_of_the_tasks_gradients(watched):
    _, run, seen = watched
    events = read_events(run.events_file, "importance")
    assert [event["step"] for event in events] == [3, 6, 9, 11] and len(seen) == 11
    average = None
    for event in events:
        now = seen[event["step"] - 1]
        average = now if average is None else {m: 0.85 * average[m] + 0.15 * now[m] for m in now}
        assert event["modules"] == pytest.approx(average, rel=2e-3)
    assert sum(value > 0 for value in average.values()) > 35  # of the others AdaLoRA has dropped every triplet


def adapter_bytes(run):
    return (run.adapter / "adapter.safetensors").read_bytes()


def test_measuring_changes_nothing_of_the_training(watched, tmp_path, tiny_model_folder):
    never = run_recipe(tmp_path, tiny_model_folder, training=TRAINING, monitoring={"spectrum_steps": 0})
    run = run_sft(never, console=QUIET).run
    assert not read_events(run.events_file, "spectra") and not read_events(run.events_file, "importance")
    assert adapter_bytes(run) == adapter_bytes(watched[1])
    one, other = (read_events(each.events_file, "step") for each in (run, watched[1]))
    assert [(r["loss"], r["grad_norm"]) for r in one] == [(r["loss"], r["grad_norm"]) for r in other]


@pytest.mark.parametrize("step", [5, 6])
def test_a_resumed_run_measures_on_without_doubles(watched, tmp_path, step):
    loaded, run, _ = watched
    folder = cut_back(run.folder, tmp_path / "cut", step)
    recipe = loaded.recipe.model_copy(update={"output_dir": str(folder)})
    resumed = run_sft(LoadedRecipe(recipe, loaded.path), resume=True, console=QUIET).run
    for name in ("spectra", "importance"):
        before, now = (read_events(each.events_file, name) for each in (run, resumed))
        assert [(e["step"], e["modules"]) for e in now] == [(e["step"], e["modules"]) for e in before]


def test_how_often_may_differ_in_a_resumed_run(watched, tmp_path):
    loaded, run, _ = watched
    folder = cut_back(run.folder, tmp_path / "cut", 9)
    changes = {"output_dir": str(folder), "monitoring": MonitoringSection(spectrum_steps=1, importance=False)}
    recipe = loaded.recipe.model_copy(update=changes)
    resumed = run_sft(LoadedRecipe(recipe, loaded.path), resume=True, console=QUIET).run
    assert [event["step"] for event in read_events(resumed.events_file, "spectra")] == [3, 6, 9, 10, 11]
    assert [event["step"] for event in read_events(resumed.events_file, "importance")] == [3, 6, 9]
    assert adapter_bytes(resumed) == adapter_bytes(run)


def test_by_default_it_is_some_twenty_times_in_a_run():
    def steps(total, **settings):
        return [step for step in range(1, total + 1) if MonitoringSection(**settings).is_due(step, total)]

    assert steps(1000) == list(range(50, 1001, 50))
    assert steps(1010)[:2] == [51, 102] and steps(1010)[-2:] == [969, 1010]
    assert steps(70) == [20, 40, 60, 70] and steps(7) == [7]
    assert steps(1000, spectrum_steps=0.5) == [500, 1000]
    assert steps(7, spectrum_steps=3) == [3, 6, 7] and steps(3, spectrum_steps=1) == [1, 2, 3]
    assert steps(100, spectrum_steps=0) == []


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{spectrum_steps: 2.5}", "a whole number of steps"),
        ("{spectrum_steps: -1}", "greater than or equal to 0"),
        ("{spectrum_steps: 0, importance: false}", "no effect"),
        ("{spectrum_step: 3}", "did you mean 'spectrum_steps'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(section, words):
    recipe = "model: {path: m}\nadapters: [{rank: 2}]\ndata: {sources: r.jsonl}\noutput_dir: out\n"
    assert words in recipe_error(f"{recipe}monitoring: {section}")
