"""SIGTERM and SIGINT at any moment: the run saves, leaves, and goes on later as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import record_figure
from runs import (
    assert_same,
    checkpoints_of,
    evaluations_of,
    files_of,
    moved_to,
    recipe_in,
    status_of,
    steps_of,
    train,
)

from qhybrid.training import checkpoint, run, session, sft, signals, state, trainer_checkpoints
from qhybrid.training.checkpoint import step_of
from qhybrid.training.signals import Interrupted
from qhybrid.training.trainer import BandedTrainer

PLACES: dict[str, tuple[Any, str]] = {
    "a micro-batch": (BandedTrainer, "training_step"),
    "the end of a step": (BandedTrainer, "_get_grad_norm"),
    "an evaluation": (BandedTrainer, "prediction_step"),
    "a save": (trainer_checkpoints, "save_weights"),
    "the rest of a save": (state, "write_tensors"),
    "the end of a save": (checkpoint, "seal"),
    "the result": (session, "save_adapter"),
    "the status": (run.Run, "write_status"),
    "the model's loading": (sft, "load_base"),
    "the data": (session, "prepare_data"),
    "the claim": (session, "begin"),
    "the first files": (run, "write_atomically"),
}
# Ten steps of two micro-batches, five evaluations of four batches, five saves of the adapter and two files more.
MOMENTS = [
    ("an evaluation", 6), ("a save", 3), ("a micro-batch", 6),
    ("an evaluation", 18), ("the end of a step", 5), ("the end of a save", 2),
    ("a micro-batch", 1), ("a micro-batch", 2), ("a micro-batch", 9),
    ("a micro-batch", 15), ("a micro-batch", 20),
    ("the end of a step", 4), ("the end of a step", 10),
    ("an evaluation", 1), ("an evaluation", 4), ("an evaluation", 11), ("an evaluation", 20),
    ("a save", 1), ("the rest of a save", 10), ("the end of a save", 5),
]  # fmt: skip
BY_DEFAULT = 6
SLOW = pytest.mark.slow


def id_of(moment: tuple[str, int]) -> str:
    return f"{moment[0]}, {moment[1]}"


class Sent:
    """Sends signals to this process at chosen calls, and counts what the run does after the first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *moments: tuple[str, int], number: int = signal.SIGTERM):
        self.num_sent = self.num_steps_after = self.num_saves_after = 0
        self._left, self._number = list(moments), number
        for place, (owner, name) in PLACES.items():
            self._watch(monkeypatch, owner, name, place)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, place: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)
        calls = 0

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if self._left and self._left[0] == (place, calls):
                self._left.pop(0)
                self.num_sent += 1
                os.kill(os.getpid(), self._number)
            elif self.num_sent:
                self.num_steps_after += place == "the end of a step"
                self.num_saves_after += place == "the end of a save"
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)


def interrupt(loaded, monkeypatch: pytest.MonkeyPatch, *moments: tuple[str, int], **options: Any):
    """Run it until signals of those moments end it. Returns what was sent, and what ended it, if they did."""
    number = options.pop("number", signal.SIGTERM)
    ended = None
    with monkeypatch.context() as patched:
        sent = Sent(patched, *moments, number=number)
        try:
            train(loaded, **options)
        except Interrupted as error:
            ended = error
    assert sent.num_sent == len(moments), "a signal was not sent"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handlers were left behind"
    return sent, ended


def assert_nothing_lost(folder: Path) -> None:
    """The newest checkpoint is whole, and of the last step that was taken."""
    assert status_of(folder) == "interrupted"
    assert step_of(checkpoints_of(folder)[-1]) == max(steps_of(folder))


def test_a_signal_at_any_moment(tmp_path, uninterrupted, monkeypatch, everything):
    loaded, whole = uninterrupted
    exact = 0
    moments = MOMENTS if everything else MOMENTS[:BY_DEFAULT]
    for number, moment in enumerate(moments):
        again = moved_to(tmp_path / str(number), loaded)
        sent, ended = interrupt(again, monkeypatch, moment)
        folder = Path(again.recipe.output_dir)
        assert sent.num_steps_after <= 1 and sent.num_saves_after <= 1, moment
        if ended is None:  # nothing was left to be done but to write the result
            assert max(steps_of(folder)) == 10 and status_of(folder) == "finished", moment
        else:
            assert ended.exit_code == 143, moment
            assert_nothing_lost(folder)
            train(again, resume=True)
        assert_same(folder, whole)
        exact += 1
    record_figure(5, "SIGTERM in a step, an evaluation or a save", f"{exact}/{len(moments)} saved, left, went on")


EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_steps": None, "save_steps": None}


@pytest.mark.parametrize(
    ("moment", "last_step"),
    [
        (("a micro-batch", 5), 3),  # in mid-epoch nothing is evaluated, then or when it goes on
        pytest.param(("the end of a step", 5), 5, marks=SLOW),
        pytest.param(("an evaluation", 2), 5, marks=SLOW),
        pytest.param(("the end of a step", 10), 10, marks=SLOW),
        (("an evaluation", 7), 10),
    ],
    ids=str,
)
def test_a_signal_where_epochs_are_evaluated(tmp_path, epochs, monkeypatch, moment, last_step):
    loaded, whole = epochs
    again = moved_to(tmp_path / "run", loaded)
    sent, ended = interrupt(again, monkeypatch, moment)
    assert ended is not None and sent.num_saves_after <= 1
    assert_nothing_lost(tmp_path / "run")
    assert max(steps_of(tmp_path / "run")) == last_step
    train(again, resume=True)
    assert_same(tmp_path / "run", whole)


@pytest.fixture(scope="module")
def epochs(tmp_path_factory, tiny_model_folder):
    loaded = recipe_in(tmp_path_factory.mktemp("epochs"), tiny_model_folder, EPOCHS)
    return loaded, train(loaded).run.folder


@pytest.mark.parametrize("save", [1, 2])
def test_a_signal_between_the_last_checkpoint_of_an_epoch_and_its_evaluation(
    tmp_path, tiny_model_folder, monkeypatch, save
):
    """The evaluation is made once, when the run goes on; at the end of the run, too."""
    changes = {**EPOCHS, "save_strategy": "steps", "save_steps": 5, "load_best_model_at_end": False}
    loaded = recipe_in(tmp_path, tiny_model_folder, changes)
    whole = train(loaded).run.folder
    again = moved_to(tmp_path / "again", loaded)
    sent, ended = interrupt(again, monkeypatch, ("the end of a save", save))
    assert ended is not None and sent.num_saves_after == 0
    assert_nothing_lost(tmp_path / "again")
    assert len(evaluations_of(tmp_path / "again")) == save - 1
    train(again, resume=True)
    assert_same(tmp_path / "again", whole)


@SLOW
def test_a_signal_again_and_again(tmp_path, uninterrupted, monkeypatch):
    """Each resumption is stopped too: in the evaluation that it makes up for, and in the save after that."""
    loaded, whole = uninterrupted
    again = moved_to(tmp_path / "run", loaded)
    interrupt(again, monkeypatch, ("an evaluation", 3))
    for moment in (("an evaluation", 1), ("the end of a save", 1), ("a micro-batch", 1)):
        _, ended = interrupt(again, monkeypatch, moment, resume=True)
        assert ended is not None
        assert_nothing_lost(tmp_path / "run")
    train(again, resume=True)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "moment", [("a micro-batch", 6), pytest.param(("an evaluation", 1), marks=SLOW)], ids=id_of
)
def test_early_stopping_counts_on(tmp_path, tiny_model_folder, monkeypatch, moment):
    """The evaluation that was cut short is the one that stops the run."""
    changes = {"greater_is_better": True, "early_stopping_patience": 2, "eval_on_start": moment[1] == 1}
    loaded = recipe_in(tmp_path, tiny_model_folder, changes)
    whole = train(loaded).run.folder
    assert max(steps_of(whole)) < 10
    again = moved_to(tmp_path / "again", loaded)
    _, ended = interrupt(again, monkeypatch, moment)
    assert ended is not None
    train(again, resume=True)
    assert_same(tmp_path / "again", whole)


SECOND = [
    (("a micro-batch", 6), ("the end of a save", 2)),
    (("an evaluation", 6), ("the rest of a save", 4)),
    pytest.param((("a micro-batch", 6), ("the status", 2)), marks=SLOW),
    pytest.param((("a save", 2), ("the rest of a save", 4)), marks=SLOW),
]


@pytest.mark.parametrize("moments", SECOND, ids=lambda moments: " and ".join(map(id_of, moments)))
def test_a_second_sigterm_corrupts_nothing(tmp_path, uninterrupted, monkeypatch, moments):
    loaded, whole = uninterrupted
    again = moved_to(tmp_path / "run", loaded)
    _, ended = interrupt(again, monkeypatch, *moments)
    assert ended is not None and ended.exit_code == 143
    assert step_of(checkpoints_of(tmp_path / "run")[-1]) == max(steps_of(tmp_path / "run"))
    train(again, resume=True)
    assert_same(tmp_path / "run", whole)
    record_figure(5, f"a second SIGTERM ({' and '.join(map(id_of, moments))})", "corrupted nothing")


@pytest.mark.parametrize("seconds", [pytest.param(2.9, marks=SLOW), 3.1])
def test_a_second_sigint(tmp_path, uninterrupted, monkeypatch, seconds):
    """Within three seconds it is the same press; later it ends the run at once, in the middle of a save."""
    loaded, whole = uninterrupted
    again = moved_to(tmp_path / "run", loaded)
    clock = iter([1000.0, 1000.0 + seconds])
    with monkeypatch.context() as patched:
        patched.setattr(signals.time, "monotonic", lambda: next(clock))
        moments = ("a micro-batch", 6), ("the rest of a save", 3)  # the second checkpoint's optimizer
        _, ended = interrupt(again, patched, *moments, number=signal.SIGINT)
    assert ended is not None and ended.exit_code == 130
    newest = checkpoints_of(tmp_path / "run")[-1]
    if seconds < 3:
        assert_nothing_lost(tmp_path / "run")
    else:
        assert step_of(newest) == 2 and status_of(tmp_path / "run") == "interrupted"
        lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
        kept = [line for line in lines if json.loads(line).get("step") != 3]  # which is taken again
        (tmp_path / "run" / "events.jsonl").write_text("\n".join(kept) + "\n")
    train(again, resume=True)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(("the data", 1), marks=SLOW),
        pytest.param(("the claim", 1), marks=SLOW),
        ("the first files", 2),
        pytest.param(("the model's loading", 1), marks=SLOW),
    ],
    ids=id_of,
)
def test_a_signal_before_training(tmp_path, uninterrupted, monkeypatch, moment):
    """The folder can be used again without leave, and a run that was to be replaced is back."""
    loaded, whole = uninterrupted
    again = moved_to(tmp_path / "run", loaded)
    _, ended = interrupt(again, monkeypatch, moment)
    assert ended is not None and ended.exit_code == 143
    replacing = moved_to(tmp_path / "earlier", loaded, whole)
    before = files_of(tmp_path / "earlier")
    interrupt(replacing, monkeypatch, moment, overwrite=True)
    assert files_of(tmp_path / "earlier") == before
    train(again)
    assert_same(tmp_path / "run", whole)


def test_a_signal_while_the_result_is_written(tmp_path, uninterrupted, monkeypatch):
    """There is no step left to stop after: the result is written whole."""
    loaded, whole = uninterrupted
    again = moved_to(tmp_path / "run", loaded)
    _, ended = interrupt(again, monkeypatch, ("the result", 1))
    assert ended is None
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_exit_codes_of_the_command(tmp_path, tiny_model_folder, launcher, number):
    loaded = recipe_in(tmp_path, tiny_model_folder, {"max_steps": 1000})
    command = launcher.start(loaded, command=True)
    command.wait_for("stepped 3")
    os.kill(command.pid, number)
    assert command.ended() == 128 + number
    assert_nothing_lost(tmp_path / "run")
    assert [step for step, _ in evaluations_of(tmp_path / "run")][:1] == [2]
