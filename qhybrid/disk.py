"""What is on the disk whole or not at all, whatever kills the process."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qhybrid.redaction import redacted


def write_bytes(file: Path, *parts: bytes | memoryview) -> None:
    """Write `parts` one after the other, through `open`: a full disk is an OSError, and the umask counts.

    Raises:
        OSError: the disk is full or fails. A part of the file may be there.
    """
    with open(file, "wb") as stream:
        for part in parts:
            stream.write(part)


def write_atomically(file: Path, text: str) -> None:
    """Write `text`, redacted, so that a reader sees the old content or the new, never a part."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a killed process; or a link, which must not be followed
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(redacted(text))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:  # a full disk, or a signal
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, beside `folder`, that takes its name and place when the block ends normally.

    Every file is on the disk before that. On any exception nothing is left of it, and what had the name stays. A
    killed process leaves ".NAME.partial", which is never mistaken for the folder and goes with the next attempt.

    Raises:
        OSError: the disk is full or fails, here or inside the block.
    """
    staging, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    if old.is_dir() and not os.path.lexists(folder):  # killed between the two renames below
        old.rename(folder)
    remove(staging)
    remove(old)
    staging.mkdir(parents=True)
    try:
        yield staging
        for item in [*staging.rglob("*"), staging]:
            (sync_folder if item.is_dir() else sync_file)(item)
        if os.path.lexists(folder):
            folder.rename(old)
        staging.rename(folder)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(folder):
            old.rename(folder)
        shutil.rmtree(staging, ignore_errors=True)  # a second error must not hide the first
        raise
    sync_folder(folder.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, if it is there; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def sync_file(file: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)
