"""Checkpoints that can be trusted: staged and sealed with a manifest, then renamed; chosen by what verifies.

Names inside the folder of checkpoints; those that begin with a dot are never resumed from:

checkpoint-120            a checkpoint, whole if `verify` finds no fault
.checkpoint-120.partial   being written by `staged`
.checkpoint-120.replaced  an earlier one of the same step, until its successor is in place; `recover` knows it
.checkpoint-120.old       being deleted

At most one process at a time may change a folder of checkpoints; the caller sees to that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qhybrid.disk import remove, sync_file, sync_folder, write_bytes
from qhybrid.errors import RunFolderError
from qhybrid.units import format_bytes

MANIFEST = "manifest.json"
_MANIFEST_BEING_WRITTEN = f".{MANIFEST}.tmp"
_PARTIAL, _REPLACED, _OLD = "partial", "replaced", "old"
_MAX_MANIFEST_BYTES = 10_000_000  # about a hundred for each file; more was not written by `seal`


# ---- writing ----


@contextmanager
def staged(checkpoints: Path, step: int) -> Iterator[Path]:
    """A folder to write the checkpoint of `step` into; it becomes checkpoint-`step` when the block ends normally.

    Then every file is on the disk, the manifest was written last, and an earlier checkpoint of that step, damaged
    or not, is replaced. A process killed at any moment leaves the old one or the new one for `recover` and
    `newest_sealed`. On any exception the folder is removed, and the exception goes on; what was there stays.

    Raises:
        OSError: the disk is full or fails, here or inside the block.
    """
    assert step >= 0, f"there is no step {step}"
    if not checkpoints.is_dir():
        checkpoints.mkdir(parents=True, exist_ok=True)
        sync_folder(checkpoints.parent)
    recover(checkpoints)  # before anything of the same step is removed
    staging = _hidden(checkpoints, step, _PARTIAL)
    remove(staging)  # of a killed process
    try:
        staging.mkdir()
        yield staging
        seal(staging)
        _publish(staging, checkpoints, step)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # a second error must not hide the first
        raise


def seal(folder: Path) -> None:
    """Bring every file of `folder` to the disk, then write the manifest: their sizes in bytes, and SHA-256.

    Raises:
        OSError: the disk is full or fails; the folder then has no new manifest.
    """
    own = {folder / MANIFEST, folder / _MANIFEST_BEING_WRITTEN}
    content = sorted(item for item in folder.rglob("*") if item not in own)
    files = {}
    for item in content:
        assert not item.is_symlink(), f"{item} is a link: what it leads to is not part of the checkpoint"
        if item.is_file():
            sync_file(item)
            files[item.relative_to(folder).as_posix()] = {"bytes": item.stat().st_size, "sha256": _sha256(item)}
    assert files, f"{folder} has no files to seal"
    for item in content:
        if item.is_dir():
            sync_folder(item)
    temporary = folder / _MANIFEST_BEING_WRITTEN
    write_bytes(temporary, _manifest_text(files))
    sync_file(temporary)
    sync_folder(folder)  # the files' names are on the disk before the manifest that lists them
    os.rename(temporary, folder / MANIFEST)
    sync_folder(folder)


def _publish(staging: Path, checkpoints: Path, step: int) -> None:
    """Give the sealed folder its name, in place of what has that name."""
    final, aside = checkpoints / f"checkpoint-{step}", _hidden(checkpoints, step, _REPLACED)
    try:
        if os.path.lexists(final):
            os.rename(final, aside)
        os.rename(staging, final)
    except BaseException:  # an error, or a signal between the two
        if os.path.lexists(aside) and not os.path.lexists(final):
            os.rename(aside, final)
        raise
    sync_folder(checkpoints)
    shutil.rmtree(aside, ignore_errors=True)  # what stays is `recover`'s; the new checkpoint is whole


# ---- choosing ----


@dataclass(frozen=True)
class Choice:
    """The newest whole checkpoint, if there is one, and each newer one that was passed over, with its fault."""

    folder: Path | None
    passed_over: list[tuple[Path, str]]


def choose(checkpoints: Path) -> Choice:
    """Verify checkpoints from the highest step down, until one is whole."""
    passed_over = []
    for folder in sorted(_with_step(checkpoints), key=step_of, reverse=True):
        fault = verify(folder)
        if fault is None:
            return Choice(folder, passed_over)
        passed_over.append((folder, fault))
    return Choice(None, passed_over)


def newest_sealed(checkpoints: Path) -> Path | None:
    """The checkpoint of the highest step that is whole, or None."""
    return choose(checkpoints).folder


def verify(folder: Path) -> str | None:
    """The first fault of a checkpoint, with the name of the file; None if it is as it was when it was sealed.

    Every size is looked at before the first hash. Files that the manifest does not list are no fault: nothing
    reads them.
    """
    if folder.is_symlink() or not folder.is_dir():
        return f"{folder.name}: it is not a folder"
    name = MANIFEST
    try:
        files = _read_manifest(folder / MANIFEST)
        for check in (_check_entry, _check_hash):
            for name, facts in files.items():
                check(folder, name, facts)
    except FileNotFoundError:
        return f"{name}: it is missing"
    except OSError as error:
        return f"{name}: it cannot be read ({error.strerror or error})"
    except ValueError as error:  # of the checks; or of Python, for a name with a null byte
        return f"{name}: {error}"
    return None


def is_whole(folder: Path) -> bool:
    """Whether the manifest is there and every file is as it was when it was sealed."""
    return verify(folder) is None


def step_of(folder: Path) -> int:
    """The optimizer step of "checkpoint-120", or -1 for another name."""
    match = re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", folder.name, re.ASCII)
    return int(match[1]) if match else -1


def _with_step(checkpoints: Path) -> list[Path]:
    return [folder for folder in checkpoints.glob("checkpoint-*") if step_of(folder) >= 0]


def _manifest_text(files: Mapping[str, Any]) -> bytes:
    """With a hash of its own: a bit that flips in it must not put the blame on a file that it lists."""
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256": own}, indent=2) + "\n").encode()


def _read_manifest(file: Path) -> dict[str, Any]:
    """What `seal` wrote. Raises ValueError if it is not just that, byte for byte."""
    if not stat.S_ISREG(os.lstat(file).st_mode):
        raise ValueError("it is not a regular file")
    with open(file, "rb") as stream:
        text = stream.read(_MAX_MANIFEST_BYTES)
    try:
        files = json.loads(text)["files"]
        as_written = isinstance(files, dict) and len(files) > 0 and _manifest_text(files) == text
    except (ValueError, LookupError, TypeError, RecursionError):
        as_written = False
    if not as_written or not all(
        isinstance(facts, dict) and type(facts.get("bytes")) is int and isinstance(facts.get("sha256"), str)
        for facts in files.values()
    ):
        raise ValueError("it is not as it was written")
    return files


def _check_entry(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Raise ValueError if the name or the size of a file is wrong; its content is not read."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError("the manifest leads out of the folder")
    if any((folder / inner).is_symlink() for inner in (*path.parents, path)):
        raise ValueError("it lies behind a symbolic link")
    status = os.lstat(folder / path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size != facts["bytes"]:
        raise ValueError(f"it has {status.st_size} bytes, the manifest says {facts['bytes']}")


def _check_hash(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    if _sha256(folder / name) != facts["sha256"]:
        raise ValueError("its hash is not the manifest's")


# ---- retention, and what killed processes left ----


def prune(folder: Path, *, newest: int, limit: int | None, keep: Path | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but never `keep` (the best one).

    Those after step `newest`, which was just sealed, do not count: they were damaged when the run was resumed.

    Raises:
        OSError: a folder cannot be renamed.
    """
    if limit is None or not (folder / f"checkpoint-{newest}" / MANIFEST).is_file():
        return  # without the newest one, an older one may be all there is
    found = sorted((c for c in _with_step(folder) if step_of(c) <= newest), key=step_of)
    kept = [c for c in found if keep is not None and c.resolve() == keep.resolve()]
    others = [c for c in found if c not in kept]
    for old in others[: max(0, len(found) - max(limit, 1 + len(kept)))]:
        _discard(old)


def recover(checkpoints: Path) -> None:
    """Finish or undo a replacement that was cut short, so that one whole checkpoint has its name again.

    Raises:
        OSError: a folder cannot be renamed or deleted.
    """
    for aside, step in _hidden_ones(checkpoints, _REPLACED):
        final, staging = checkpoints / f"checkpoint-{step}", _hidden(checkpoints, step, _PARTIAL)
        if not os.path.lexists(final):  # killed between the two renames
            os.rename(staging if is_whole(staging) else aside, final)
        elif not is_whole(final) and is_whole(aside):
            _discard(final)
            os.rename(aside, final)
        sync_folder(checkpoints)
        remove(aside)


def remove_leftovers(checkpoints: Path) -> list[str]:
    """Remove what killed processes left half written or half deleted, after `recover`; returns the names.

    Only for the process that holds the run: another one's staging folder would be removed too.

    Raises:
        OSError: a folder cannot be renamed or deleted.
    """
    recover(checkpoints)
    leftovers = [folder for kind in (_PARTIAL, _OLD) for folder, _ in _hidden_ones(checkpoints, kind)]
    for folder in leftovers:
        remove(folder)
    return [folder.name for folder in leftovers]


def _hidden(checkpoints: Path, step: int, kind: str) -> Path:
    return checkpoints / f".checkpoint-{step}.{kind}"


def _hidden_ones(checkpoints: Path, kind: str) -> list[tuple[Path, int]]:
    """The hidden folders of one kind, each with its step."""
    candidates = sorted(checkpoints.glob(f".checkpoint-*.{kind}"))
    steps = [step_of(Path(folder.name[1:].removesuffix(f".{kind}"))) for folder in candidates]
    return [(folder, step) for folder, step in zip(candidates, steps, strict=True) if step >= 0]


def _discard(folder: Path) -> None:
    """Delete a checkpoint. It loses its name first: half of one must never look like one."""
    doomed = _hidden(folder.parent, step_of(folder), _OLD)
    remove(doomed)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what stays is `remove_leftovers`'; no reason to stop a run


# ---- the disk ----


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a run on a file system with less than twice the size of a checkpoint, `needed_bytes`, free.

    `folder`, where the checkpoints will be, need not exist yet.

    Raises:
        RunFolderError: there is less space.
    """
    try:
        place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        usage = shutil.disk_usage(place)
    except OSError:
        return  # a folder that cannot be looked at is refused where it is claimed, with the reason
    if usage.total == 0:  # some network file systems do not tell
        return
    if usage.free < 2 * needed_bytes:
        raise RunFolderError(
            f"the disk of {folder} has {format_bytes(usage.free)} free; a checkpoint takes "
            f"{format_bytes(needed_bytes)}, and the old one goes only when the new one is whole",
            hint=f"have {format_bytes(2 * needed_bytes)} free there, or choose an output_dir on another disk",
        )


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
