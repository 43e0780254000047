"""The recipes that come with qhybrid: where they lie, their names and their first line."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def shipped_folder() -> Path:
    """The folder of the shipped recipes: inside an installed package, at the top of a source checkout."""
    installed = _PACKAGE / "shipped_recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def shipped_names() -> list[str]:
    """The names of all shipped recipes, sorted."""
    return sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def find_shipped(name: str) -> Path | None:
    """The file of the shipped recipe `name` (with or without `.yaml`), or None."""
    stem = name.removesuffix(".yaml")
    return shipped_folder() / f"{stem}.yaml" if stem in shipped_names() else None


def title(path: Path) -> str:
    """The recipe's first comment line, without the sign."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
