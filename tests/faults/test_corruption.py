"""Files of an interrupted run that changed: each is found before the first step, and nothing is made up for it."""

from __future__ import annotations

import random
import shutil

import pytest
from helpers import record_figure
from rich.console import Console
from runs import QUIET, assert_same, files_of, forget_repeats, moved_to, recipe_in, steps_of, train

from qhybrid.errors import QhybridError
from qhybrid.training import session, sft

IN_CHECKPOINT = (
    "adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "trainer_state.json",
    "allocators.safetensors", "layout.json", "manifest.json",
)  # fmt: skip
BASE = "model.safetensors"


class Begun(Exception):
    """The run would take its first step now."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, tiny_model_folder, uninterrupted):
    """A run with a model of its own, as a kill after its second checkpoint leaves it."""
    folder = tmp_path_factory.mktemp("interrupted")
    model = shutil.copytree(tiny_model_folder, folder / "model")
    loaded = recipe_in(folder, model, {"load_best_model_at_end": False})
    stop = session.BandedTrainer.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return stop(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(session.BandedTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(loaded)
    assert sorted(item.name for item in (folder / "run" / "checkpoints").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    return loaded, folder


def damaged(whole: bytes, chance: random.Random, cut: int | None) -> bytes:
    """With one bit flipped; or cut off at the last byte, the first, or some."""
    if cut is not None:
        return whole[: (len(whole) - 1, 0, chance.randrange(len(whole)))[cut % 3]]
    changed = bytearray(whole)
    changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def begin(loaded, monkeypatch: pytest.MonkeyPatch) -> tuple[str | None, str]:
    """Resume it up to the first step. Returns the checkpoint's name, and what was said, error or notes."""
    console = Console(record=True, width=500, file=open("/dev/null", "w"))  # noqa: SIM115
    started: list[str | None] = []

    def train_nothing(self, model):
        started.append(None if self.run.resume_from is None else self.run.resume_from.name)
        raise Begun

    with monkeypatch.context() as patched:
        patched.setattr(sft, "load_base", lambda *args, **kwargs: None)
        patched.setattr(session.Session, "build", train_nothing)
        try:
            train(loaded, resume=True, console=console)
        except Begun:
            assert started[0] is not None, "it would have begun anew"
            return started[0], console.export_text()
        except QhybridError as error:
            assert error.exit_code in (1, 2) and error.hint
            return None, str(error)
    raise AssertionError("it ended without a word")


def test_every_damage_is_found_before_the_first_step(interrupted, monkeypatch, everything):
    loaded, folder = interrupted
    assert begin(loaded, monkeypatch)[0] == "checkpoint-4"
    newest = folder / "run" / "checkpoints" / "checkpoint-4"
    files = [newest / name for name in IN_CHECKPOINT] + [folder / "model" / BASE]
    num_flips, num_cuts = (200, 20) if everything else (18, 9)
    chance = random.Random(7)
    found = 0
    for number in range(num_flips + num_cuts):
        file = files[number % len(files)]
        whole = file.read_bytes()
        file.write_bytes(damaged(whole, chance, None if number < num_flips else number // len(files)))
        resumed_from, said = begin(loaded, monkeypatch)
        file.write_bytes(whole)
        if file.parent == newest:
            assert resumed_from == "checkpoint-2", (file.name, said)
            assert f"note: checkpoint-4 is not whole and passed over: {file.name}: " in said
        else:
            assert resumed_from is None and f"{BASE}: " in said, said
        found += 1
    assert begin(loaded, monkeypatch)[0] == "checkpoint-4"
    record_figure(
        7, "flipped bits and truncations of an interrupted run's files",
        f"{found}/{num_flips + num_cuts} found before the first step, the file named",
    )  # fmt: skip


def test_with_no_whole_checkpoint_left_nothing_begins_anew(interrupted, monkeypatch, tmp_path):
    loaded, folder = interrupted
    again = moved_to(tmp_path / "run", loaded, folder / "run")
    for number, name in ((2, "optimizer.safetensors"), (4, "adapter.safetensors")):
        file = tmp_path / "run" / "checkpoints" / f"checkpoint-{number}" / name
        file.write_bytes(damaged(file.read_bytes(), random.Random(number), None))
    before = files_of(tmp_path / "run")
    resumed_from, said = begin(again, monkeypatch)
    assert resumed_from is None and "of the newest, checkpoint-4, adapter.safetensors: " in said
    assert before == files_of(tmp_path / "run")


def test_missing_and_added_base_files_are_found(interrupted, monkeypatch):
    """As a sharded model in the place of one that was not, or with a shard more."""
    loaded, folder = interrupted
    model = folder / "model"
    (model / BASE).rename(model / "aside")
    shutil.copy(model / "aside", model / "other.safetensors")
    resumed_from, said = begin(loaded, monkeypatch)
    assert resumed_from is None and ".safetensors" in said
    (model / "other.safetensors").unlink()
    (model / "aside").rename(model / BASE)


def test_what_is_passed_over_is_trained_again(interrupted, tmp_path):
    """From the older checkpoint the run comes to the same end as if nothing had happened."""
    loaded, folder = interrupted
    whole = moved_to(tmp_path / "whole", loaded, folder / "run")
    train(whole, resume=True)
    again = moved_to(tmp_path / "run", loaded, folder / "run")
    file = tmp_path / "run" / "checkpoints" / "checkpoint-4" / "rng.safetensors"
    file.write_bytes(damaged(file.read_bytes(), random.Random(1), 0))
    result = train(again, resume=True, console=QUIET)
    assert result.run.resume_from is not None and result.run.resume_from.name == "checkpoint-2"
    forget_repeats(tmp_path / "run")
    assert list(steps_of(tmp_path / "run")) == list(range(1, 11))
    assert_same(tmp_path / "run", tmp_path / "whole")
