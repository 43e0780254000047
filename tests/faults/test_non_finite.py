"""NaN and infinity stop a run before they reach the adapter; a loss that leaps is told, noise is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_recipe, record_figure, write_rows
from runs import WITH_DROPOUT, recipe_in, status_of, steps_of, train

from qhybrid.errors import NonFiniteError
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.training import session
from qhybrid.training.arguments import training_arguments
from qhybrid.training.callbacks.watch import LossWatch
from qhybrid.training.events import read_events
from qhybrid.training.trainer import BandedTrainer

PLAIN = {
    "eval_strategy": None, "eval_steps": None, "load_best_model_at_end": None, "metric_for_best_model": None,
    "greater_is_better": None, "save_strategy": "no", "save_steps": None,
}  # fmt: skip
NUM_ROWS = 40


def numbered(folder: Path, model: Path, bands: Any = WITH_DROPOUT, **training: Any) -> LoadedRecipe:
    """Rows that say their own number, two of them in a micro-batch, two micro-batches in a step."""
    loaded = recipe_in(folder, model, {**PLAIN, **training}, adapters=bands)
    rows = [
        {"instruction": f"How many? row {number}", "output": f"{number}."} for number in range(1, NUM_ROWS + 1)
    ]
    write_rows(folder / "train.jsonl", rows)
    return loaded


class Poisoned(BandedTrainer):
    """In the second micro-batch of step 4 the loss, or the gradient of one parameter, is not a number."""

    where: str
    value: float
    seen: dict[str, Any]
    calls = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        type(self).calls += 1
        rows = re.findall(r"row (\d+)", self.processing_class.decode(inputs["input_ids"].flatten().tolist()))
        self.seen.setdefault(self.state.global_step + 1, []).append([f"train.jsonl {row}" for row in rows])
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        if self.calls != 8:
            return loss
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.seen["before"] = {name: parameter.detach().clone() for name, parameter in trained.items()}
        self.seen["after"] = trained
        if self.where == "loss":
            return loss * self.value
        parameter = next(p for name, p in trained.items() if "layers.5" in name)
        parameter.register_hook(lambda gradient: gradient * self.value)
        return loss


CASES = [
    ("loss", "nan", {}),
    ("gradient", "inf", {"packing": True, "packing_strategy": "bfd", "max_length": 48}),
    ("loss", "-inf", {"packing": True, "packing_strategy": "bfd", "max_length": 48}),
    ("gradient", "nan", {"max_grad_norm": 0.0}),
    ("gradient", "inf", {}),
]


@pytest.mark.parametrize(("where", "value", "training"), CASES, ids=str)
def test_the_step_is_not_taken(tmp_path, tiny_model_folder, monkeypatch, where, value, training):
    loaded = numbered(tmp_path, tiny_model_folder, **training)
    seen: dict[Any, Any] = {}
    trainer = type("PoisonedHere", (Poisoned,), {"where": where, "value": float(value), "seen": seen, "calls": 0})
    monkeypatch.setattr(session, "BandedTrainer", trainer)
    with pytest.raises(NonFiniteError, match=f"the {where}.* at step 4; the step was not taken") as caught:
        train(loaded)
    assert caught.value.exit_code == 1 and trainer.calls == 8
    assert all(torch.equal(parameter, seen["before"][name]) for name, parameter in seen["after"].items())
    assert list(steps_of(tmp_path / "run")) == [1, 2, 3] and status_of(tmp_path / "run") == "failed"
    (event,) = read_events(tmp_path / "run" / "events.jsonl", "non_finite")
    assert event["step"] == 4 and event["what"].startswith(where)
    assert event["value"] in ("nan", "inf", "-inf")  # as it was, not as the mean of others
    # The loss is that of a micro-batch; the gradients of both have been added.
    micro_batches = seen[4][-1:] if where == "loss" else seen[4]
    expected = [row for rows in micro_batches for row in rows]
    assert event["rows"] == expected and len(expected) >= (2 if where == "loss" else 4)
    if "packing" in training:
        assert max(len(rows) for rows in micro_batches) > 2, "nothing was packed"
    assert expected[0] in str(caught.value)
    packed = ", packed" if "packing" in training else ""
    record_figure(
        6, f"{value} in the {where}{packed}", "stopped before the optimizer step, adapter unchanged, rows named"
    )


def test_nothing_hides_a_nan(tmp_path):
    """transformers would show the mean of the last losses in its place."""
    assert training_arguments(make_recipe(training={"use_cpu": True}), tmp_path).logging_nan_inf_filter is False


# ---- spikes ----


def test_a_leap_is_told_with_its_rows(tmp_path, tiny_model_folder, monkeypatch):
    seen: dict[Any, Any] = {}

    class Leaping(Poisoned):
        calls = 0

        def compute_loss(self, model, inputs, **kwargs):
            loss = BandedTrainer.compute_loss(self, model, inputs, **kwargs)
            return 3 * loss if self.state.global_step + 1 == 28 else loss

    Leaping.seen = seen
    few = [{"layers": "top", "rank": 2}]  # to be quick
    loaded = numbered(tmp_path, tiny_model_folder, few, max_steps=30, learning_rate=1e-6)
    monkeypatch.setattr(session, "BandedTrainer", Leaping)
    train(loaded)
    (event,) = read_events(tmp_path / "run" / "events.jsonl", "loss_spike")
    steps = steps_of(tmp_path / "run")
    assert event["step"] == 28 and event["loss"] == steps[28]["loss"] > 2.5 * steps[27]["loss"]
    assert event["rows"] == [row for rows in seen[28] for row in rows]


def alerts(losses: np.ndarray) -> list[int]:
    watch = LossWatch()
    return [step for step, loss in enumerate(losses.tolist()) if watch.is_spike(loss)]


def falling(num_steps: int) -> np.ndarray:
    """As losses fall: fast at first, then ever slower."""
    return 0.8 + 3.0 / np.sqrt(1 + np.arange(num_steps) / 20)


def test_noise_is_no_spike():
    """10,000 steps for each seed, with the noise of small batches and of large ones."""
    normal = heavy = 0
    for seed in range(5):
        generator = np.random.default_rng(seed)
        scale = (0.3, 0.1, 0.02, 0.3, 0.1)[seed]
        normal += len(alerts(falling(10_000) + scale * generator.standard_normal(10_000)))
        heavy_losses = falling(10_000) + scale * generator.standard_t(4, 10_000)
        alerts_of_seed = len(alerts(heavy_losses))
        assert alerts_of_seed <= 10  # one in 1,000
        heavy += alerts_of_seed
    assert normal == 0
    record_figure(6, "alerts in 50,000 steps of normal noise", str(normal))
    record_figure(6, "alerts in 50,000 steps of Student's t noise, 4 degrees", f"{heavy} (50 are allowed)")


def test_a_leap_is_a_spike():
    told = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        losses = falling(3000) * np.exp(0.05 * generator.standard_normal(3000))
        leaps = sorted(generator.choice(np.arange(50, 3000, 40), 5, replace=False).tolist())
        losses[leaps] *= 3
        assert alerts(losses) == leaps
        told += len(leaps)
    record_figure(6, "leaps of the loss to three times its value", f"{told}/100 told, nothing else")


def test_a_loss_that_stays_high_is_not_told_for_ever():
    """It is the new usual: thousands of alerts would bury what matters, and each looks through all rows."""
    losses = np.concatenate([np.full(200, 1.0), np.full(3000, 4.0)])
    losses += 0.02 * np.random.default_rng(0).standard_normal(len(losses))
    told = alerts(losses)
    assert told[0] == 200 and len(told) <= 100
    losses[2000] = 12.0
    assert alerts(losses)[-1] == 2000


def test_the_log_takes_what_json_lacks(tmp_path):
    from qhybrid.training.events import EventLog

    events = EventLog(tmp_path / "events.jsonl")
    events.write("step", loss=float("nan"), others=[float("inf"), -float("inf")])
    events.close()
    record = json.loads((tmp_path / "events.jsonl").read_text())
    assert record["loss"] == "nan" and record["others"] == ["inf", "-inf"]
