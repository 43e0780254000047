"""The names that models are asked for by: of each adapter, as the user gives it, and of the base model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qhybrid.errors import ServingError

_LONGEST = 64
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{_LONGEST - 1}}}")


def named_adapters(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """Names and folders of what the user writes as FOLDER or NAME=FOLDER; a folder gives its own name.

    The folder "adapter" inside a run folder has the run's name.

    Raises:
        ServingError: a name that is not safe to show and to ask for, or is given twice.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        before, equals, after = argument.partition("=")
        if equals and "/" not in before:
            name, folder = before, Path(after)
        else:
            folder = Path(argument)
            whole = folder.absolute()
            name = whole.parent.name if whole.name == "adapter" else whole.name
        if not _NAME.fullmatch(name):
            raise ServingError(
                f"{name[:80]!r} cannot be the name of an adapter",
                hint=f"give it one, as in NAME={folder}: at most {_LONGEST} letters, digits, dots, dashes and "
                "underscores, and no dot or dash first",
            )
        if name in found:
            raise ServingError(
                f"two adapters have the name {name}: {found[name]} and {folder}",
                hint=f"give one of them another, as in {name}-2={folder}",
            )
        found[name] = folder
    return list(found.items())


def base_name(path: str) -> str:
    """A name for the base model, from where it lies: "SmolLM2-135M" of "HuggingFaceTB/SmolLM2-135M@main"."""
    name = re.sub(r"\.gguf$", "", path.rstrip("/").partition("@")[0].rpartition("/")[2], flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")[:_LONGEST] or "base"
