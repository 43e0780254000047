"""What is looked at before torch is imported, so that a slip of the pen is answered at once."""

from __future__ import annotations

from pathlib import Path

from qhybrid.errors import AdapterError


def adapter_folder(name: str) -> Path:
    """The folder of an adapter that a command was given.

    Raises:
        AdapterError: it is not there.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise AdapterError(f"there is no folder {name}", hint="name an adapter folder or a run folder")
    return folder
