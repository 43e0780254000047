"""A disk that fills while a run saves, or that was too small from the start: nothing that was there is lost."""

from __future__ import annotations

import builtins
import os
import shutil
from types import SimpleNamespace

import pytest
from disk import REAL_OPEN, FullDisk
from helpers import THREE_BANDS, record_figure
from runs import (
    assert_same,
    checkpoints_of,
    evaluations_of,
    files_of,
    forget_repeats,
    moved_to,
    recipe_in,
    status_of,
    steps_of,
    train,
)

from qhybrid.adapters.folder import save_adapter
from qhybrid.architecture.layout import Layout
from qhybrid.errors import RunFolderError, TrainingError
from qhybrid.training import session
from qhybrid.training.events import EventLog, read_events
from qhybrid.training.planning import checkpoint_bytes
from qhybrid.training.trainer import BandedTrainer


@pytest.fixture
def filling(monkeypatch):
    """Gives the disk so much room for the checkpoint of step 4, and no more; None for enough."""

    def fill(room: int | None) -> None:
        monkeypatch.undo()
        if room is None:
            return
        write = BandedTrainer._write_checkpoint

        def written(self, *args):
            if self.state.global_step == 4:
                builtins.open = FullDisk(room).open
            try:
                write(self, *args)
            finally:
                builtins.open = REAL_OPEN

        monkeypatch.setattr(BandedTrainer, "_write_checkpoint", written)

    return fill


def test_the_disk_fills_at_any_byte(tmp_path, uninterrupted, filling, everything):
    loaded, whole = uninterrupted
    again = moved_to(tmp_path / "run", loaded)
    size = sum(len(content) for content in files_of(whole / "checkpoints" / "checkpoint-4").values())
    offsets = [size * number // 20 for number in range(19)] + [size - 200]
    offsets = offsets if everything else offsets[::5]
    untouched, survived = None, 0
    for offset in offsets:
        filling(offset)
        with pytest.raises(TrainingError, match=r"the disk is full: .* could not be written") as caught:
            train(again, resume=True)
        assert caught.value.exit_code == 1 and "checkpoint-2 is whole: go on with --resume auto" in str(
            caught.value
        )
        assert status_of(tmp_path / "run") == "failed"
        (left,) = checkpoints_of(tmp_path / "run")  # and nothing else beside it
        assert left.name == "checkpoint-2"
        untouched = untouched or files_of(left)
        survived += files_of(left) == untouched
    assert survived == len(offsets)
    filling(None)
    train(again, resume=True)
    forget_repeats(tmp_path / "run")
    assert_same(tmp_path / "run", whole)
    record_figure(
        4, "ENOSPC while a run saves",
        f"{survived}/{len(offsets)} previous checkpoints unchanged, nothing left over; exit code 1; same result",
    )  # fmt: skip


def test_the_disk_fills_while_the_adapter_is_written(tmp_path, uninterrupted, monkeypatch):
    loaded, whole = uninterrupted
    again = moved_to(tmp_path / "run", loaded)

    def save(*args):
        monkeypatch.setattr(builtins, "open", FullDisk(1000).open)
        save_adapter(*args)

    with monkeypatch.context() as patched:
        patched.setattr(session, "save_adapter", save)
        with pytest.raises(TrainingError, match=r"the disk is full: .* could not be written") as caught:
            train(again)
    monkeypatch.undo()
    assert "checkpoint-10 is whole: go on with --resume auto" in str(caught.value)
    assert not list((tmp_path / "run").glob("*adapter*"))
    train(again, resume=True)
    assert_same(tmp_path / "run", whole)


def test_the_event_log_cannot_be_written(tmp_path, uninterrupted, monkeypatch):
    """One message all the same, and what was cut off does not swallow what comes after it."""
    loaded, whole = uninterrupted
    again = moved_to(tmp_path / "run", loaded)
    real = EventLog.write

    def write(self, event, **facts):
        if event == "step" and facts["step"] == 3:
            # As a disk that takes a part of a line, and then nothing more
            os.write(self._file.fileno(), b'{"event": "step", "ti')
            self._file = open("/dev/full", "a")  # noqa: SIM115
        real(self, event, **facts)

    with monkeypatch.context() as patched:
        patched.setattr(EventLog, "write", write)
        with pytest.raises(TrainingError, match="the disk is full"):
            train(again)
    assert status_of(tmp_path / "run") == "failed"
    train(again, resume=True)
    assert len(read_events(tmp_path / "run" / "events.jsonl", "plan")) == 2
    assert list(steps_of(tmp_path / "run")) == list(range(1, 11))
    assert evaluations_of(tmp_path / "run") == evaluations_of(whole)


# ---- before the start ----


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(total=10**12, used=0, free=free))


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, uninterrupted, monkeypatch):
    loaded, whole = uninterrupted
    needed = checkpoint_bytes(loaded.recipe, Layout.from_json((whole / "layout.json").read_text()))
    with_free(monkeypatch, 2 * needed - 1)
    new = moved_to(tmp_path / "run", loaded)
    with pytest.raises(RunFolderError, match="free; a checkpoint takes") as caught:
        train(new)
    assert caught.value.exit_code == 2 and "have " in caught.value.hint
    assert not list(tmp_path.glob("run/*"))
    earlier = moved_to(tmp_path / "earlier", loaded, whole)
    before = files_of(tmp_path / "earlier")
    with pytest.raises(RunFolderError, match="free; a checkpoint takes"):
        train(earlier, overwrite=True)
    assert files_of(tmp_path / "earlier") == before
    with_free(monkeypatch, 2 * needed)
    train(new)
    record_figure(4, "a disk with less than twice a checkpoint's size", "refused, exit code 2, nothing written")


KINDS = {
    "three bands": THREE_BANDS,
    "lora": [{"rank": 16}],
    "dora": [{"kind": "dora", "rank": 4}],
    "adalora": [{"kind": "adalora", "rank": 8}],
}


@pytest.mark.parametrize(
    ("kind", "optim"),
    [
        ("three bands", "adamw_torch"),
        ("three bands", "adamw_bnb_8bit"),
        ("adalora", "adafactor"),
        ("dora", "sgd"),
        pytest.param("three bands", "lion_8bit", marks=pytest.mark.slow),
        pytest.param("three bands", "adafactor", marks=pytest.mark.slow),
        pytest.param("adalora", "paged_adamw_32bit", marks=pytest.mark.slow),
        pytest.param("lora", "schedule_free_adamw", marks=pytest.mark.slow),
        pytest.param("lora", "adamw_torch", marks=pytest.mark.slow),
        pytest.param("dora", "rmsprop", marks=pytest.mark.slow),
    ],
)
def test_the_estimate_of_a_checkpoint_is_near_its_size(tmp_path, tiny_model_folder, kind, optim):
    training = {"max_steps": 4, "save_steps": 4, "optim": optim, "eval_strategy": None, "eval_steps": None}
    training |= dict.fromkeys(["load_best_model_at_end", "metric_for_best_model", "greater_is_better"])
    if optim.startswith("schedule_free"):
        training["lr_scheduler_type"] = "constant"
    loaded = recipe_in(tmp_path, tiny_model_folder, training, adapters=KINDS[kind])
    train(loaded)
    (saved,) = checkpoints_of(tmp_path / "run")
    real = sum(len(content) for content in files_of(saved).values())
    layout = Layout.from_json((tmp_path / "run" / "layout.json").read_text())
    ratio = checkpoint_bytes(loaded.recipe, layout) / real
    assert 0.8 <= ratio <= 2
    record_figure(4, f"estimate of a checkpoint's size, {kind}, {optim}", f"{ratio:.2f} of the real size")
