"""Memory that runs out in a step: fewer rows at once, and the very same training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import THREE_BANDS, record_figure
from rich.console import Console
from runs import assert_same, checkpoints_of, moved_to, recipe_in, status_of, steps_of, train
from safetensors.torch import load_file

from qhybrid.architecture.spec import read_spec
from qhybrid.errors import TrainingError
from qhybrid.planner.plan import Budget, make_plan
from qhybrid.recipe.load import dump_recipe, parse_recipe
from qhybrid.training import session
from qhybrid.training.events import read_events
from qhybrid.training.trainer import BandedTrainer

MICRO_BATCH, ACCUMULATION = 4, 2
TRAINING = {
    "max_steps": 34, "per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": ACCUMULATION,
    "eval_strategy": None, "eval_steps": None, "load_best_model_at_end": None, "metric_for_best_model": None,
    "greater_is_better": None, "save_steps": 20,
}  # fmt: skip
WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB. (injected)"


def failing(faults: dict[int, tuple[str, int]], seen: dict[int, list[int]], *, stop_before: int | None = None):
    """A trainer that lacks memory in some steps: in "forward" or in "backward", for more than so many rows.

    Args:
        faults: where memory runs out, and for how many rows it suffices, for each step.
        seen: takes the rows of every forward pass of each step.
    """

    class Failing(BandedTrainer):
        passes = 0

        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step + 1 == stop_before:
                raise KeyboardInterrupt
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(self, model, inputs, **kwargs):
            step, rows = self.state.global_step + 1, len(inputs["input_ids"])
            seen.setdefault(step, []).append(rows)
            place, enough = faults.get(step, ("", rows))
            # In the step's second micro-batch, when there are gradients of the first.
            fails = rows > enough and sum(seen[step][-2:]) > rows
            if fails and place == "forward":
                raise torch.OutOfMemoryError(WORDS)
            loss = super().compute_loss(model, inputs, **kwargs)
            if fails:  # the gradients of the layers above are there already
                trained = [p for name, p in model.named_parameters() if p.requires_grad and "layers.2." in name]
                handles = []

                def run_out(gradient: torch.Tensor) -> None:
                    for handle in handles:
                        handle.remove()
                    raise torch.OutOfMemoryError(WORDS)

                handles += [parameter.register_hook(run_out) for parameter in trained]
            return loss

    return Failing


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, tiny_model_folder):
    """Without dropout, which draws other numbers for other parts."""
    folder = tmp_path_factory.mktemp("memory")
    return recipe_in(folder, tiny_model_folder, TRAINING, rows=160, adapters=THREE_BANDS)


@pytest.fixture(scope="module")
def whole(loaded):
    return train(loaded).run.folder


def run_with(monkeypatch, loaded, folder: Path, faults, **options: Any) -> dict[int, list[int]]:
    seen: dict[int, list[int]] = {}
    stop_before = options.pop("stop_before", None)
    with monkeypatch.context() as patched:
        patched.setattr(session, "BandedTrainer", failing(faults, seen, stop_before=stop_before))
        try:
            train(moved_to(folder, loaded), **options)
        except KeyboardInterrupt:
            assert stop_before is not None
    return seen


@pytest.mark.parametrize(
    "faults",
    [
        {3: ("forward", 2), 30: ("backward", 1)},
        pytest.param({3: ("backward", 2), 30: ("forward", 1)}, marks=pytest.mark.slow),
        pytest.param({3: ("backward", 1), 30: ("forward", 0)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_same_training_with_fewer_rows_at_once(tmp_path, loaded, whole, monkeypatch, faults):
    expected, one_row_fails = steps_of(whole), faults[30][1] == 0
    if one_row_fails:  # that one is left to another test
        faults = {3: faults[3]}
    seen = run_with(monkeypatch, loaded, tmp_path / "run", faults)
    steps = steps_of(tmp_path / "run")
    assert list(steps) == list(expected) and status_of(tmp_path / "run") == "finished"
    worst = 0.0
    for number, record in steps.items():
        for name in ("learning_rates", "tokens", "live_ranks", "epoch"):
            assert record[name] == expected[number][name], (number, name)
        worst = max(worst, abs(record["loss"] - expected[number]["loss"]))
    assert worst <= 1e-5

    events = read_events(tmp_path / "run" / "events.jsonl", "out_of_memory")
    told = [(event["step"], event["rows"], event["rows_from_now_on"]) for event in events]
    halvings, rows = [], MICRO_BATCH
    for step, (_, enough) in faults.items():
        while rows > enough:
            halvings.append((step, rows, rows // 2))
            rows //= 2
    assert told == halvings and all(event["message"] == WORDS for event in events)
    for step, parts in seen.items():  # the rows of every step that was taken
        at_once = min([after for at, _, after in halvings if at <= step], default=MICRO_BATCH)
        whole_step = MICRO_BATCH * ACCUMULATION
        assert parts[-whole_step // at_once :] == [at_once] * (whole_step // at_once), step
    one, other = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (whole, tmp_path / "run"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
    places = ", ".join(f"step {step} in {place}" for step, (place, _) in faults.items())
    record_figure(
        14, f"out of memory: {places}",
        f"same steps, rates, tokens and ranks; loss within {worst:.1e} of a run without it (1e-5 is allowed)",
    )  # fmt: skip


def test_a_resumed_run_keeps_the_smaller_parts(tmp_path, loaded, monkeypatch):
    shorter = loaded.recipe.training.model_copy(update={"max_steps": 8, "save_steps": 4.0})
    short = type(loaded)(loaded.recipe.model_copy(update={"training": shorter}), loaded.path)
    faults = {3: ("forward", 2)}
    run_with(monkeypatch, short, tmp_path / "whole", faults)
    run_with(monkeypatch, short, tmp_path / "run", faults, stop_before=5)
    assert [folder.name for folder in checkpoints_of(tmp_path / "run")] == ["checkpoint-4"]
    seen = run_with(monkeypatch, short, tmp_path / "run", {}, resume=True)
    assert seen == {step: [2] * 4 for step in range(5, 9)}
    without_evaluation = steps_of(tmp_path / "whole")
    assert len(without_evaluation) == 8
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("place", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_at_one_row_there_is_nothing_to_split(tmp_path, tiny_model_folder, monkeypatch, place):
    loaded = recipe_in(
        tmp_path, tiny_model_folder,
        {**TRAINING, "per_device_train_batch_size": 1, "save_steps": 2, "max_steps": 6}, adapters=THREE_BANDS,
    )  # fmt: skip
    seen: dict[int, list[int]] = {}
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    with monkeypatch.context() as patched:
        patched.setattr(session, "BandedTrainer", failing({3: (place, 0)}, seen))
        with pytest.raises(TrainingError, match="out of memory; the plan expected") as caught:
            train(loaded, console=console)
    assert caught.value.exit_code == 1 and WORDS in str(caught.value)
    assert seen[3] == [1, 1], "it was tried again"
    assert not read_events(tmp_path / "run" / "events.jsonl", "out_of_memory")
    assert status_of(tmp_path / "run") == "failed" and "checkpoint-2 is whole" in caught.value.hint

    # The overrides that it names are a plan that takes less.
    overrides = re.search(r"try (.*?);", caught.value.hint)[1].split()
    smaller, _ = parse_recipe(dump_recipe(loaded.recipe), "r.yaml", overrides)
    spec = read_spec(Path(loaded.recipe.model.path))
    before, after = (make_plan(r, spec, Budget(None), device="cpu") for r in (loaded.recipe, smaller))
    assert overrides and after.needed < before.needed
    train(loaded, resume=True)  # once there is memory again
    assert status_of(tmp_path / "run") == "finished"
    record_figure(14, "out of memory at one row", f"no retry; exit code 1; named: {' '.join(overrides)}")
