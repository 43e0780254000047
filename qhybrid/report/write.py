"""Where a report is written: in one step, and never over a file of the user's own."""

from __future__ import annotations

import os
from pathlib import Path

from qhybrid.disk import write_atomically
from qhybrid.errors import ExportError
from qhybrid.report.page import is_report


def require_place(file: Path) -> None:
    """Refuse a place where something else is. Changes nothing.

    Raises:
        ExportError: it is not an .html file, something that is no report is there, or it cannot be written.
    """
    if file.suffix.lower() not in (".html", ".htm"):
        raise ExportError(f"{file} is no name for a report", hint="name it FILE.html")
    if os.path.lexists(file) and not (file.is_file() and not file.is_symlink() and is_report(file)):
        raise ExportError(
            f"{file} exists already, and is no report of qhybrid", hint="choose another name; nothing was changed"
        )
    parent = file.absolute().parent
    if not parent.is_dir():
        raise ExportError(f"there is no folder {file.parent} for the report")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"{file.parent} cannot be written", hint="-o FILE writes the report elsewhere")


def write_report(page: str, file: Path) -> int:
    """Write the page, and return its size in bytes.

    Raises:
        OSError: the disk is full or fails.
    """
    write_atomically(file, page)
    return file.stat().st_size
