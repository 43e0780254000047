"""Where a result may go: a new place with a harmless name."""

from __future__ import annotations

import os
from pathlib import Path

from qhybrid.errors import ExportError

_LONGEST = 200  # file systems take 255, and some files get longer names


def require_free(out: Path) -> None:
    """Refuse a place where something is, or a name that shells and other programs stumble over. Changes nothing.

    Raises:
        ExportError: with what is wrong with it.
    """
    name = out.name
    if len(os.fsencode(name)) > _LONGEST:
        raise ExportError(f"the name {name[:20]}… is longer than {_LONGEST} bytes", hint="choose a shorter one")
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
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ExportError(f"{out} cannot be made: {parent} cannot be written", hint="choose another place")
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be entered
        raise ExportError(f"{str(out)!r} cannot be made: {error}", hint="choose another place") from None
