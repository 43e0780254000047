"""Checkpoints on disk: staging, the manifest, choosing, retention, recovery."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from qhybrid.disk import write_bytes
from qhybrid.training import checkpoint
from qhybrid.training.checkpoint import (
    MANIFEST,
    choose,
    is_whole,
    newest_sealed,
    prune,
    recover,
    remove_leftovers,
    seal,
    staged,
    step_of,
    verify,
)


def save(checkpoints: Path, step: int, content: bytes = b"weights") -> Path:
    with staged(checkpoints, step) as folder:
        write_bytes(folder / "adapter.safetensors", content)
        (folder / "ranks").mkdir()
        write_bytes(folder / "ranks" / "rng-0.json", content[::-1])
    return checkpoints / f"checkpoint-{step}"


def content_of(folder: Path) -> bytes:
    return (folder / "adapter.safetensors").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


# ---- staging ----


def test_a_checkpoint_appears_whole(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    with staged(checkpoints, 7) as folder:
        write_bytes(folder / "adapter.safetensors", b"wei", b"ghts")
        assert names(checkpoints) == [folder.name] and folder.name.startswith(".")
        assert newest_sealed(checkpoints) is None
    assert names(checkpoints) == ["checkpoint-7"]
    assert newest_sealed(checkpoints) == checkpoints / "checkpoint-7"
    assert content_of(checkpoints / "checkpoint-7") == b"weights"
    assert names(checkpoints / "checkpoint-7") == ["adapter.safetensors", MANIFEST]


def test_every_file_is_on_the_disk_before_the_manifest_and_the_manifest_before_the_name(tmp_path, monkeypatch):
    calls = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor):
        calls.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        real_sync(descriptor)

    def rename(source, target):
        calls.append(f"→ {os.path.relpath(target, tmp_path)}")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 3)
    staging = ".checkpoint-3.partial"
    assert calls == [
        f"{staging}/adapter.safetensors",
        f"{staging}/ranks/rng-0.json",
        f"{staging}/ranks",
        f"{staging}/.manifest.json.tmp",
        staging,
        f"→ {staging}/manifest.json",
        staging,
        "→ checkpoint-3",
        ".",
    ]


def test_an_earlier_one_of_the_step_is_replaced(tmp_path):
    save(tmp_path, 3, b"first")
    save(tmp_path, 3, b"second")
    (tmp_path / "checkpoint-3" / "adapter.safetensors").write_bytes(b"damaged")
    save(tmp_path, 3, b"third")
    assert names(tmp_path) == ["checkpoint-3"]
    assert is_whole(tmp_path / "checkpoint-3") and content_of(tmp_path / "checkpoint-3") == b"third"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("no"), KeyboardInterrupt()])
def test_an_exception_while_saving_changes_nothing(tmp_path, error):
    save(tmp_path, 3)
    with pytest.raises(type(error)), staged(tmp_path, 3) as folder:
        write_bytes(folder / "adapter.safetensors", b"new")
        raise error
    assert names(tmp_path) == ["checkpoint-3"] and content_of(tmp_path / "checkpoint-3") == b"weights"


def test_an_error_between_the_two_renames_puts_the_old_one_back(tmp_path, monkeypatch):
    save(tmp_path, 3)
    real = os.rename

    def rename(source, target):
        if Path(target).name == "checkpoint-3" and Path(source).name.endswith(".partial"):
            raise OSError(errno.EIO, "the disk failed")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="the disk failed"):
        save(tmp_path, 3, b"new")
    assert names(tmp_path) == ["checkpoint-3"] and content_of(tmp_path / "checkpoint-3") == b"weights"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path, monkeypatch, number):
    real = os.fsync

    def sync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    assert is_whole(save(tmp_path, 3))


def test_a_disk_that_fails_while_syncing_does_not(tmp_path, monkeypatch):
    def sync(descriptor):
        raise OSError(errno.EIO, "the disk failed")

    save(tmp_path, 2)
    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="the disk failed"):
        save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-2"]


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 3)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    for file in (folder / "adapter.safetensors", folder / MANIFEST):
        assert file.stat().st_mode & 0o777 == 0o640


# ---- the manifest ----


def write_manifest(folder: Path, name: str) -> None:
    """A manifest that is as it was written, and names one more file."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    files[name] = {"bytes": 7, "sha256": files["adapter.safetensors"]["sha256"]}
    (folder / MANIFEST).write_bytes(checkpoint._manifest_text(files))


def cut(file: Path, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:-num_bytes])


def replace(path: Path, target: Path) -> None:
    """Move what is at `path` to `target`, and leave a link to it."""
    path.rename(target)
    path.symlink_to(target)


FAULTS = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json: it is missing"),
    "empty manifest": (lambda f: (f / MANIFEST).write_bytes(b""), "manifest.json: it is not as it was written"),
    "manifest without its last byte": (
        lambda f: cut(f / MANIFEST, 1),
        "manifest.json: it is not as it was written",
    ),
    "manifest is a list": (
        lambda f: (f / MANIFEST).write_text("[]"),
        "manifest.json: it is not as it was written",
    ),
    "manifest of no files": (
        lambda f: (f / MANIFEST).write_bytes(checkpoint._manifest_text({})),
        "manifest.json: it is not as it was written",
    ),
    "deep manifest": (
        lambda f: (f / MANIFEST).write_text("[" * 100_000),
        "manifest.json: it is not as it was written",
    ),
    "manifest is a link": (
        lambda f: replace(f / MANIFEST, f / "m.json"),
        "manifest.json: it is not a regular file",
    ),
    "missing": (lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors: it is missing"),
    "short": (
        lambda f: cut(f / "adapter.safetensors", 2),
        "adapter.safetensors: it has 5 bytes, the manifest says 7",
    ),
    "changed": (
        lambda f: (f / "ranks" / "rng-0.json").write_bytes(b"Sthgiew"),
        "ranks/rng-0.json: its hash is not the manifest's",
    ),
    "file is a link": (
        lambda f: replace(f / "adapter.safetensors", f / "a"),
        "adapter.safetensors: it lies behind a symbolic link",
    ),
    "folder is a link": (
        lambda f: replace(f / "ranks", f / "r"),
        "ranks/rng-0.json: it lies behind a symbolic link",
    ),
    "pipe": (
        lambda f: ((f / "ranks" / "rng-0.json").unlink(), os.mkfifo(f / "ranks" / "rng-0.json")),
        "ranks/rng-0.json: it is not a regular file",
    ),
    "absolute": (lambda f: write_manifest(f, "/etc/passwd"), "/etc/passwd: the manifest leads out of the folder"),
    "upwards": (lambda f: write_manifest(f, "../a"), "../a: the manifest leads out of the folder"),
    "upwards within": (lambda f: write_manifest(f, "ranks/../../a"), "ranks/../../a: the manifest leads out"),
    "no name": (lambda f: write_manifest(f, ""), ": the manifest leads out of the folder"),
    "null byte": (lambda f: write_manifest(f, "a\0b"), "a\0b: embedded null byte"),
    "long name": (lambda f: write_manifest(f, "a" * 300), "a" * 300 + ": it cannot be read (File name too long)"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_the_first_fault_is_named(tmp_path, kind):
    folder = save(tmp_path, 3)
    (tmp_path / "a").write_bytes(b"weights")
    assert verify(folder) is None
    damage, fault = FAULTS[kind]
    damage(folder)
    assert (verify(folder) or "").startswith(fault)
    assert not is_whole(folder)


def test_files_that_nobody_lists_are_no_fault(tmp_path):
    folder = save(tmp_path, 3)
    (folder / "note.txt").write_text("mine")
    assert is_whole(folder)


def test_what_is_not_a_folder_is_no_checkpoint(tmp_path):
    save(tmp_path / "elsewhere", 4)
    (tmp_path / "checkpoint-4").symlink_to(tmp_path / "elsewhere" / "checkpoint-4")
    (tmp_path / "checkpoint-5").write_text("")
    assert verify(tmp_path / "checkpoint-4") == "checkpoint-4: it is not a folder"
    assert verify(tmp_path / "checkpoint-5") == "checkpoint-5: it is not a folder"
    assert newest_sealed(tmp_path) is None


def test_sealing_again_lists_what_is_there_now(tmp_path):
    folder = save(tmp_path, 3)
    (folder / "ranks" / MANIFEST).write_text("one of its own")
    (folder / ".manifest.json.tmp").write_text("of a killed process")
    seal(folder)
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert list(listed) == ["adapter.safetensors", "ranks/manifest.json", "ranks/rng-0.json"]
    assert is_whole(folder)


# ---- choosing and retention ----


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-0", 0), ("checkpoint-120", 120), ("checkpoint-", -1), ("checkpoint-007", -1),
        ("checkpoint-²", -1), ("checkpoint-١", -1), ("checkpoint-12.old", -1), (".checkpoint-12.old", -1),
        ("checkpoint--1", -1), ("adapter", -1),
    ],
)  # fmt: skip
def test_step_of_a_name(name, step):
    assert step_of(Path("runs") / name) == step


def test_the_newest_that_verifies_and_those_passed_over(tmp_path):
    for step in (9, 80, 100, 120):
        save(tmp_path, step)
    (tmp_path / "checkpoint-9" / MANIFEST).unlink()  # older than the newest whole one: not looked at
    (tmp_path / "checkpoint-100" / "adapter.safetensors").write_bytes(b"wEights")
    (tmp_path / "checkpoint-120" / MANIFEST).unlink()
    assert newest_sealed(tmp_path) == choose(tmp_path).folder == tmp_path / "checkpoint-80"
    assert choose(tmp_path).passed_over == [
        (tmp_path / "checkpoint-120", "manifest.json: it is missing"),
        (tmp_path / "checkpoint-100", "adapter.safetensors: its hash is not the manifest's"),
    ]


def test_nothing_to_choose_from(tmp_path):
    assert newest_sealed(tmp_path / "nowhere") is None
    assert choose(tmp_path / "nowhere").passed_over == []
    recover(tmp_path / "nowhere")
    assert remove_leftovers(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, None, [1, 2, 3, 4, 9]),
        (3, None, [2, 3, 4, 9]),
        (1, None, [4, 9]),
        (0, None, [4, 9]),
        (2, 1, [1, 4, 9]),
        (1, 2, [2, 4, 9]),
    ],
)
def test_pruning_by_step(tmp_path, limit, keep, left):
    for step in (3, 1, 4, 2, 9):
        save(tmp_path, step)
    best = None if keep is None else tmp_path / f"checkpoint-{keep}"
    prune(tmp_path, newest=4, limit=limit, keep=best)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_pruning_waits_for_the_newest(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    prune(tmp_path, newest=3, limit=1, keep=None)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_pruning_takes_the_name_first(tmp_path, monkeypatch):
    """Killed while deleting: what is left half is hidden, and removed by the next process."""
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / ".checkpoint-1.old").mkdir()  # of an earlier kill
    (tmp_path / ".checkpoint-1.old" / "adapter.safetensors").write_bytes(b"half")
    real, seen = shutil.rmtree, []

    def rmtree(path, **kwargs):
        seen.append(names(tmp_path))
        real(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    prune(tmp_path, newest=2, limit=1, keep=None)
    assert seen[-1] == [".checkpoint-1.old", "checkpoint-2"]
    assert names(tmp_path) == ["checkpoint-2"]


# ---- recovery ----


def replacing(tmp_path: Path, *, placed: bool) -> None:
    """As a process leaves it that is killed while it replaces checkpoint-3, before or after the second rename."""
    save(tmp_path, 3, b"old")
    save(tmp_path / "new", 3, b"new")
    (tmp_path / "checkpoint-3").rename(tmp_path / ".checkpoint-3.replaced")
    name = "checkpoint-3" if placed else ".checkpoint-3.partial"
    (tmp_path / "new" / "checkpoint-3").rename(tmp_path / name)
    (tmp_path / "new").rmdir()


@pytest.mark.parametrize("placed", [False, True])
def test_a_replacement_is_finished(tmp_path, placed):
    replacing(tmp_path, placed=placed)
    recover(tmp_path)
    assert names(tmp_path) == ["checkpoint-3"] and content_of(tmp_path / "checkpoint-3") == b"new"


@pytest.mark.parametrize("placed", [False, True])
def test_a_replacement_by_a_damaged_one_is_undone(tmp_path, placed):
    replacing(tmp_path, placed=placed)
    new = tmp_path / ("checkpoint-3" if placed else ".checkpoint-3.partial")
    (new / "adapter.safetensors").write_bytes(b"NEW")
    assert remove_leftovers(tmp_path) == ([] if placed else [".checkpoint-3.partial"])
    assert names(tmp_path) == ["checkpoint-3"] and content_of(tmp_path / "checkpoint-3") == b"old"


def test_saving_recovers_first(tmp_path):
    replacing(tmp_path, placed=False)
    with pytest.raises(ValueError, match="no"), staged(tmp_path, 3):
        raise ValueError("no")
    assert names(tmp_path) == ["checkpoint-3"] and content_of(tmp_path / "checkpoint-3") == b"new"


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    save(tmp_path, 3)
    for name in (".checkpoint-4.partial", ".checkpoint-1.old", ".checkpoint-x.old", ".mine", "checkpoint-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter.safetensors").write_bytes(b"half")
    assert remove_leftovers(tmp_path) == [".checkpoint-4.partial", ".checkpoint-1.old"]
    assert names(tmp_path) == [".checkpoint-x.old", ".mine", "checkpoint-3", "checkpoint-4"]
