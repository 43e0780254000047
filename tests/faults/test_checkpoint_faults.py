"""Checkpoints on a machine that kills, fills its disk and flips bits: one whole checkpoint at every moment.

Files only; what a run does with them is tested elsewhere.
"""

from __future__ import annotations

import builtins
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_saver import LIMIT, SIZES, holds, save
from disk import REAL_OPEN, FullDisk
from helpers import record_figure

from qhybrid.errors import RunFolderError
from qhybrid.training.checkpoint import (
    MANIFEST,
    is_whole,
    newest_sealed,
    prune,
    recover,
    remove_leftovers,
    require_space,
    step_of,
    verify,
)

SAVER = Path(__file__).with_name("checkpoint_saver.py")
MIB = 2**20


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in folder.iterdir()}


# ---- killed at random moments ----


def launch(checkpoints: Path) -> subprocess.Popen:
    """A process that saves until it is killed, and reports every step."""
    return subprocess.Popen(
        [sys.executable, str(SAVER), "save", str(checkpoints)], stdout=subprocess.PIPE, text=True
    )


def launch_and_wait(checkpoints: Path) -> tuple[subprocess.Popen, str]:
    """The same after its first save, and what it said then."""
    child = launch(checkpoints)
    assert child.stdout is not None
    first = child.stdout.readline()
    assert first, "the process ended before its first save"
    return child, first


def test_killed_at_random_moments(tmp_path, everything):
    chance = random.Random(0)
    cut_short = 0
    for _ in range(50 if everything else 12):
        child, first = launch_and_wait(tmp_path)
        time.sleep(chance.uniform(0, 0.15))
        child.kill()
        reported = [int(step) for step in (first + child.communicate()[0]).split()]
        assert child.returncode == -signal.SIGKILL
        cut_short += any(name.startswith(".") for name in names(tmp_path))
        assert newest_sealed(tmp_path) is not None
        recover(tmp_path)
        newest = newest_sealed(tmp_path)
        assert newest is not None and holds(newest)
        # What was reported is there; what was not may be there already.
        assert reported[-1] <= step_of(newest) <= reported[-1] + 1
        remove_leftovers(tmp_path)
        left = list(tmp_path.iterdir())
        assert all(step_of(folder) > 0 and is_whole(folder) for folder in left)
        assert len(left) <= LIMIT + 1
    assert cut_short > 0, "no kill fell into a save"
    number = 50 if everything else 12
    record_figure(
        1, "SIGKILL of a process that saves", f"{number}/{number} whole, {cut_short} killed inside a save"
    )


def test_killed_before_the_first_save(tmp_path, everything):
    """Nothing is left that could be taken for a checkpoint."""
    chance = random.Random(1)
    for attempt in range(15 if everything else 4):
        folder = tmp_path / str(attempt)
        child = launch(folder)
        while not folder.exists():  # made by the first save
            assert child.poll() is None
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.004))
        child.kill()
        reported = child.communicate()[0]
        assert newest_sealed(folder) is not None or not reported
        remove_leftovers(folder)
        assert all(is_whole(item) and holds(item) for item in folder.iterdir())


def test_one_whole_checkpoint_at_every_moment(tmp_path, everything):
    """The process is halted at random moments, as what a kill would leave, and goes on."""
    chance = random.Random(2)
    child, _ = launch_and_wait(tmp_path)
    try:
        newest_so_far, under_way, looks = 1, 0, 0
        while looks < (400 if everything else 80) or newest_so_far <= 10:  # a slow disk takes longer
            looks += 1
            time.sleep(chance.uniform(0, 0.008))
            child.send_signal(signal.SIGSTOP)
            _, status = os.waitpid(child.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            newest = newest_sealed(tmp_path)
            assert newest is not None and holds(newest)
            # One may be aside, while it is replaced.
            assert step_of(newest) >= newest_so_far - any(name.endswith(".replaced") for name in names(tmp_path))
            newest_so_far = max(newest_so_far, step_of(newest))
            under_way += any(name.startswith(".") for name in names(tmp_path))
            child.send_signal(signal.SIGCONT)
        assert under_way > 10, "no look fell into a save"
    finally:
        child.kill()
        child.communicate()


# ---- killed before each call that changes the disk ----


# What the newest whole checkpoint may be after a kill, and what it is in the end: step and version.
AFTER = {
    "the first save": ({None, (1, 0)}, (1, 0)),
    "another step": ({(1, 0), (2, 1)}, (2, 1)),
    "replace": ({(2, 0), (2, 1)}, (2, 1)),
    "replace the only one": ({(1, 0), (1, 1)}, (1, 1)),
    "replace a damaged one": ({(1, 0), (2, 1)}, (2, 1)),
    "prune": ({(4, 0)}, (4, 0)),
    "recover": ({(2, 1)}, (2, 1)),
    "undo": ({(2, 0)}, (2, 0)),
    "undo in place": ({(2, 0)}, (2, 0)),
    "remove leftovers": ({(1, 0)}, (1, 0)),
}


def state_of(checkpoints: Path) -> tuple[int, int] | None:
    """Step and version of the newest whole checkpoint."""
    newest = newest_sealed(checkpoints)
    if newest is None:
        return None
    return step_of(newest), next(version for version in (0, 1) if holds(newest, version))


def test_killed_before_each_call(tmp_path):
    """Every prefix of what saving, replacing, pruning and recovering do to the disk."""
    subprocess.run([sys.executable, str(SAVER), "each-call", str(tmp_path)], check=True, timeout=120)
    for case, (allowed, final) in AFTER.items():
        folders = sorted((tmp_path / case).iterdir(), key=lambda folder: int(folder.name))
        assert len(folders) > 1, case
        for folder in folders:
            recover(folder)
            state = state_of(folder)
            assert state in allowed, (case, folder.name)
            remove_leftovers(folder)
            assert state_of(folder) == state
            assert all(step_of(item) > 0 for item in folder.iterdir()), (case, names(folder))
            assert all(is_whole(item) for item in folder.iterdir()) or case == "replace a damaged one"
        assert state == final, case


# ---- a full disk ----


@pytest.mark.parametrize("same_step", [False, True])
def test_the_disk_fills_at_any_byte(tmp_path, monkeypatch, same_step):
    saved = save(tmp_path, 1)
    untouched = fingerprint(saved)
    total = sum(SIZES.values()) + (saved / MANIFEST).stat().st_size
    survived = 0
    for number in range(20):
        disk = FullDisk(room=total * number // 20 if number < 19 else total - 1)
        monkeypatch.setattr(builtins, "open", disk.open)
        with pytest.raises(OSError) as caught:
            save(tmp_path, 1 if same_step else 2, version=1)
        monkeypatch.setattr(builtins, "open", REAL_OPEN)
        assert caught.value.errno == errno.ENOSPC and disk.room == 0
        assert names(tmp_path) == ["checkpoint-1"]
        survived += fingerprint(saved) == untouched and is_whole(saved)
    assert survived == 20
    what = "checkpoint files, the same step" if same_step else "checkpoint files, another step"
    record_figure(
        4, f"ENOSPC while writing ({what})", f"{survived}/20 previous checkpoints unchanged, no leftovers"
    )
    monkeypatch.setattr(builtins, "open", FullDisk(room=total).open)
    assert holds(save(tmp_path, 2, version=1), version=1)


@pytest.mark.parametrize("same_step", [False, True])
def test_any_call_of_a_save_fails(tmp_path, monkeypatch, same_step):
    """The disk is full or fails at a folder, a name, or when the data is brought to it."""
    in_place: list[bool] = []  # whether the new one is, when the call of that number fails
    failed = True
    while failed:
        checkpoints = tmp_path / str(len(in_place))
        old = save(checkpoints, 1)
        untouched = fingerprint(old)
        calls = iter(range(1000))

        def failing(real, calls=calls):
            def call(*args, **kwargs):
                if next(calls) == len(in_place):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patched:
            for name in ("mkdir", "rename", "fsync"):
                patched.setattr(os, name, failing(getattr(os, name)))
            try:
                save(checkpoints, 1 if same_step else 2, version=1)
                failed = False
            except OSError:
                pass
        recover(checkpoints)
        newest = newest_sealed(checkpoints)
        assert newest is not None and not any(name.startswith(".") for name in names(checkpoints))
        in_place.append(holds(newest, version=1))
        assert in_place[-1] or (newest == old and fingerprint(old) == untouched)
    # Only the last call, which brings the name to the disk, comes after the new one is in place.
    assert in_place == [False] * (len(in_place) - 2) + [True, True] and len(in_place) > 9


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount")
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this process may not mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    with pytest.raises(RunFolderError, match=r"has 1\.00 MiB free; a checkpoint takes 512\.00 KiB"):
        require_space(small_disk / "checkpoints", MIB // 2 + 1)
    require_space(small_disk / "checkpoints", MIB // 2)
    step = 0
    with pytest.raises(OSError) as caught:
        while step < 10:
            step += 1
            save(small_disk, step)
    assert caught.value.errno == errno.ENOSPC and step > 3
    assert names(small_disk) == [f"checkpoint-{s}" for s in range(1, step)]
    assert all(is_whole(folder) and holds(folder) for folder in small_disk.iterdir())
    with pytest.raises(OSError):  # nor is one lost that would be replaced
        save(small_disk, step - 1, version=1)
    assert holds(small_disk / f"checkpoint-{step - 1}")
    prune(small_disk, newest=step - 1, limit=LIMIT, keep=None)
    assert holds(save(small_disk, step))


# ---- corruption ----


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path, everything):
    folder = save(tmp_path, 1)
    files = [*SIZES, MANIFEST]
    chance = random.Random(3)
    num_flips, num_cuts = (200, 20) if everything else (40, 8)
    found = 0
    for number in range(num_flips + num_cuts):
        file = folder / files[number % len(files)]
        whole = file.read_bytes()
        if number < num_flips:
            damaged = bytearray(whole)
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        else:  # the last byte, all bytes, or some
            damaged = whole[
                : {0: len(whole) - 1, 1: 0}.get(number // len(files) % 3, chance.randrange(len(whole)))
            ]
        file.write_bytes(damaged)
        fault = verify(folder)
        found += fault is not None and fault.startswith(f"{file.name}: ")
        assert newest_sealed(tmp_path) is None
        file.write_bytes(whole)
        assert verify(folder) is None
    assert found == num_flips + num_cuts
    record_figure(
        7, "flips and truncations of a checkpoint's files", f"{found}/{num_flips + num_cuts} found and named"
    )


def test_every_bit_of_the_manifest_counts(tmp_path, everything):
    folder = save(tmp_path, 1)
    whole = (folder / MANIFEST).read_bytes()
    for bit in range(0, 8 * len(whole), 1 if everything else 13):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / MANIFEST).write_bytes(damaged)
        assert verify(folder) == f"{MANIFEST}: it is not as it was written"
