"""A folder that takes long to write: whole or not there, and what is finished of it survives a kill.

It grows as ".NAME.partial" beside its place, with a record of the files that are finished and their hashes. The
same job goes on from there; another one begins anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qhybrid.disk import remove, sync_file, sync_folder, write_atomically
from qhybrid.errors import ExportError, QhybridError
from qhybrid.export.output import require_free
from qhybrid.units import format_bytes

FINISHED = "finished.json"


def partial_of(folder: Path) -> Path:
    """Where `folder` grows."""
    return folder.with_name(f".{folder.name}.partial")


class PartialFolder:
    """What is there of the folder.

    Attributes:
        folder: where to write.
        finished: facts of the finished files by name, "sha256" and "bytes" among them.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self.folder = folder
        self._job = job
        self.finished = _read(folder / FINISHED, job)
        self.remove_unfinished()

    def remove_unfinished(self) -> None:
        """Remove all but the finished files."""
        for item in self.others():
            remove(item)

    def others(self) -> list[Path]:
        """What is there beside the finished files and their record."""
        kept = (*self.finished, FINISHED) if self.finished else ()
        return [item for item in self.folder.iterdir() if item.name not in kept]

    def is_finished(self, name: str) -> bool:
        """Whether the file is there and has its hash. One that has not is forgotten."""
        if name not in self.finished:
            return False
        file = self.folder / name
        with contextlib.suppress(OSError):
            if not file.is_symlink() and sha256_of(file) == self.finished[name]["sha256"]:
                return True
        del self.finished[name]
        remove(file)
        return False

    def finish(self, name: str, facts: dict[str, Any]) -> None:
        """Record a file that is on the disk.

        Raises:
            OSError: the disk is full or fails.
        """
        files = {**self.finished, name: facts}
        record = {"job": self._job, "files": files}
        write_atomically(self.folder / FINISHED, json.dumps(record, indent=1) + "\n")
        self.finished = files

    def require_space(self, num_bytes: int) -> None:
        """Refuse to begin what cannot end: of `num_bytes` in all, the unfinished part must fit on the disk.

        Raises:
            OSError: it does not.
        """
        needed = num_bytes - sum(facts["bytes"] for facts in self.finished.values())
        usage = shutil.disk_usage(self.folder)
        if usage.total and usage.free < needed:  # some network file systems do not tell
            free = f"{format_bytes(usage.free)} are free and {format_bytes(needed)} are needed"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free}")


@contextlib.contextmanager
def resumable_folder(folder: Path, job: str) -> Iterator[PartialFolder]:
    """A folder to write into that becomes `folder` when the block ends normally.

    After an error that the same job would meet again, which is every QhybridError, nothing is left. After anything
    else (a kill, a full disk, Ctrl-C) the finished files stay for the next attempt.

    Args:
        folder: where nothing is.
        job: a text that is equal for equal results.

    Raises:
        ExportError: as `require_free`; another process writes this folder; or the disk is full or fails.
    """
    require_free(folder)
    staging = partial_of(folder)
    try:
        if staging.is_symlink() or not staging.is_dir():
            remove(staging)
            staging.mkdir(parents=True)
        with _locked(staging, folder):
            partial = PartialFolder(staging, job)
            with _kept_if_worthwhile(partial):
                yield partial
                _complete(staging, folder)
    except OSError as error:
        kept = staging.is_dir()
        raise ExportError(
            f"{folder} cannot be written: {error.strerror or error}",
            hint=f"what is finished stays in {staging}, and the same command goes on from there" if kept else None,
        ) from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when the block ends normally; else nothing is left of it.

    Raises:
        ExportError: as `resumable_folder`.
    """
    with resumable_folder(folder, "nothing to go on from") as partial:
        yield partial.folder


@contextlib.contextmanager
def _kept_if_worthwhile(partial: PartialFolder) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if isinstance(error, QhybridError) or not partial.finished:
            shutil.rmtree(partial.folder, ignore_errors=True)  # a second error must not hide the first
        else:
            with contextlib.suppress(OSError):
                partial.remove_unfinished()  # on a full disk, room for something
        raise


def _complete(staging: Path, folder: Path) -> None:
    for item in [*staging.rglob("*"), staging]:
        (sync_folder if item.is_dir() else sync_file)(item)
    staging.rename(folder)
    (folder / FINISHED).unlink(missing_ok=True)
    sync_folder(folder.parent)


@contextlib.contextmanager
def _locked(staging: Path, folder: Path) -> Iterator[None]:
    """Hold the folder until the block or the process ends, in whatever way."""
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExportError(f"another process is writing {folder}", hint="wait for it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _read(record: Path, job: str) -> dict[str, dict[str, Any]]:
    """The finished files of the same job; none if the record is of another, or cannot be read."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        if content["job"] != job:
            return {}
        return {name: facts for name, facts in content["files"].items() if type(facts["bytes"]) is int}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        OSError: it cannot be read.
    """
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
