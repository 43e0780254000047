"""Where a result goes: a new place with a harmless name, taken only when the result is whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from qhybrid.disk import whole_folder
from qhybrid.errors import ExportError


def require_free(out: Path) -> None:
    """Refuse a place where something is, or a name that shells and other programs stumble over. Changes nothing.

    Raises:
        ExportError: with what is wrong with it.
    """
    name = out.name
    if name in ("", "..") or name.startswith((".", "-")) or not name.isprintable() or "\\" in name:
        raise ExportError(
            f"{str(out)!r} is not a usable name for a result",
            hint="letters, digits, dots, dashes and underscores are; not a dot or a dash first",
        )
    try:
        if os.path.lexists(out):
            raise ExportError(f"{out} exists already", hint="choose another name; nothing was changed")
        parent = next(folder for folder in out.absolute().parents if folder.exists())
        if not parent.is_dir():
            raise ExportError(f"{out} cannot be made: {parent} is a file", hint="choose another place")
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be entered
        raise ExportError(f"{str(out)!r} cannot be made: {error}", hint="choose another place") from None


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends normally; else nothing is left of it.

    Raises:
        ExportError: as `require_free`.
        OSError: the disk is full or fails.
    """
    require_free(out)
    with whole_folder(out) as folder:
        yield folder
