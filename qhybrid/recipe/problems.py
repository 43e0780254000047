"""What pydantic found wrong with a recipe, in words: file and line, the key, and the nearest right name."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from qhybrid.errors import RecipeError
from qhybrid.recipe.aliases import MEANT, TOP_LEVEL
from qhybrid.recipe.excerpt import excerpt, excerpt_key
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.tasks import told_at
from qhybrid.recipe.training_fields import OWNED_ELSEWHERE, TrainingSection
from qhybrid.recipe.yaml_source import Path as KeyPath
from qhybrid.recipe.yaml_source import Source, parse_scalar

OVERRIDE = "command line"
_MAX_PROBLEMS = 20  # told at once
_LONGEST_NAME = 100  # of a key that a similar one is looked for


@dataclass(frozen=True)
class Places:
    """Where a recipe says what.

    Attributes:
        origins: where the file says what was read under another name.
        overridden: the paths that the command line set.
        values: what was validated.
    """

    source: Source
    origins: dict[KeyPath, KeyPath]
    overridden: list[KeyPath]
    values: dict[str, Any]

    def where(self, path: KeyPath) -> str:
        """The file with the line, or the command line."""
        path = told_at(self.values, path)
        origin = _origin(path, self.origins)
        from_override = path != () and any(
            path[: len(start)] == start or (origin not in self.source.lines and start[: len(path)] == path)
            for start in self.overridden
        )
        return OVERRIDE if from_override else self.source.where(origin)


def as_recipe_error(error: ValidationError, places: Places) -> RecipeError:
    """All problems in one message, each with its line and hint; a single problem keeps its hint apart."""
    problems = error.errors(include_url=False)
    found: list[tuple[str, str | None]] = []
    seen: set[KeyPath] = set()
    for number, problem in enumerate(problems):
        if len(found) == _MAX_PROBLEMS:
            found.append((f"and {len(problems) - number:,} more problems", None))
            break
        inside = getattr((problem.get("ctx") or {}).get("error"), "path", ())  # of a check over several sections
        full = _without_tags((*problem["loc"], *inside))
        path = told_at(places.values, full)
        if path in seen:
            continue  # what another member of a union would have taken
        seen.add(path)
        if problem["type"] == "too_short" and any(
            len(other["loc"]) > len(path) and other["loc"][: len(path)] == path for other in problems
        ):
            continue  # a list looks empty when its items were refused
        message, hint = _describe(dict(problem), path)
        name = ".".join(map(excerpt_key, path))
        where = places.where(path or _named_first(message))
        task = ""
        if inside and full[:1] == ("tasks",) != path[:1] and full[1]:  # good for the first task, and not for this
            task = f"task {places.values['tasks'][full[1]].get('name')}: "
        found.append((f"{where}: {task}{name + ': ' if name else ''}{message}", hint))
    if len(found) == 1:
        return RecipeError(found[0][0], hint=found[0][1])
    return RecipeError("\n".join(f"{line} ({hint})" if hint else line for line, hint in found))


def _origin(path: KeyPath, origins: dict[KeyPath, KeyPath]) -> KeyPath:
    """Where `path` was written, if it or what it is part of was moved."""
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return (*origins[path[:length]], *path[length:])
    return path


def _named_first(message: str) -> KeyPath:
    """The key that a check over several sections begins with: "training.bf16 needs …"."""
    path = tuple(message.split(maxsplit=1)[0].rstrip(":").split("."))
    model = _model_at(path[:-1])
    return path if model is not None and path[-1] in model.model_fields else ()


def _without_tags(location: tuple[int | str, ...]) -> KeyPath:
    """pydantic's location without the names of union members, which are no keys of ours."""
    path: list[str | int] = []
    for part in location:
        if isinstance(part, str) and path and not isinstance(_model_at(tuple(path)), type):
            break
        path.append(part)
    return tuple(path)


def _model_at(path: KeyPath) -> type[BaseModel] | None:
    """The section class that stands at `path`, if one does."""
    model: type[BaseModel] | None = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part)) if model else None
        model = _section_in(field.annotation) if field else None
    return model


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = _section_in(argument)
        if found:
            return found
    return None


def _describe(problem: dict[str, Any], path: KeyPath) -> tuple[str, str | None]:
    """One problem in words, and a hint."""
    kind, given, context = problem["type"], problem.get("input"), problem.get("ctx") or {}
    if path and path[-1] == "trust_remote_code":  # in whichever section it is looked for
        return (
            f"cannot be set here: {OWNED_ELSEWHERE['trust_remote_code']}",
            "leave it out; models of the families that transformers knows need no code of their own",
        )
    if kind == "extra_forbidden":
        return _unknown_key(path)
    if kind == "missing":
        return "is missing", f"add {path[-1]}"
    if kind == "literal_error":
        named = path[:-1] if isinstance(path[-1], int) else path  # of a list's item the list is the field
        model = _model_at(named[:-1])
        field = model.model_fields.get(str(named[-1])) if model else None
        choices = list(dict.fromkeys(str(choice) for choice in _choices(field.annotation))) if field else []
        nearest = _nearest(given, choices, cutoff=0.6) if isinstance(given, str) else None
        shown = ", ".join(choices) if len(choices) <= 16 else ", ".join(choices[:16]) + ", …"
        return f"{excerpt(given)} is not one of: {shown}", f"did you mean {nearest!r}?" if nearest else None
    if kind == "value_error":
        error = context.get("error", problem["msg"])
        return str(error), getattr(error, "hint", None)
    if kind == "model_type":
        return (
            f"must be a mapping of keys, not {excerpt(given)}",
            f"indent its keys below {path[-1]}:" if path else None,
        )
    message = problem["msg"].removeprefix("Input ").replace("Value error, ", "")
    message = message.replace("tuple", "list").replace("Tuple", "the list").replace("dictionary", "mapping")
    if isinstance(given, (str, int, float)):
        message += f", not {excerpt(given)}"
    hint = None
    if isinstance(given, str) and kind in ("float_type", "int_type", "bool_type"):
        hint = "remove the quotes" if isinstance(parse_scalar(given), (int, float)) else None
        if kind == "bool_type" and given.lower() in ("yes", "no", "on", "off", "y", "n"):
            hint = "write true or false"  # YAML 1.2 knows no other words
    return message, hint


def _choices(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for argument in typing.get_args(annotation) for choice in _choices(argument)]


def _unknown_key(path: KeyPath) -> tuple[str, str | None]:
    """Say which known key is nearest: in the same section first, then anywhere in the recipe."""
    section, key = path[:-1], str(path[-1])
    message = "unknown key"
    meant = MEANT.get(key) or ".".join(TOP_LEVEL.get(key, ()))
    if meant:
        return message, f"did you mean {meant}?"
    model = _model_at(section) or Recipe
    names = _offered(model)
    nearest = _nearest(key, names, cutoff=0.7)
    if nearest:
        return message, f"did you mean {nearest!r}?"
    for name, field in Recipe.model_fields.items():
        other = _section_in(field.annotation)
        if other is None or other is model:
            continue
        found = _nearest(key, _offered(other), cutoff=0.8)
        if found:
            place = f"{name}[]" if name in ("adapters", "tasks") else name
            return message, f"did you mean {place}.{found}?"
    nearest = _nearest(key, names, cutoff=0.55)
    if nearest:
        return message, f"did you mean {nearest!r}?"
    return message, f"known here: {', '.join(names[:12])}"


def _offered(section: type[BaseModel]) -> list[str]:
    """The keys of a section that can be set there."""
    hidden = OWNED_ELSEWHERE if section is TrainingSection else {}
    return [name for name in section.model_fields if name not in hidden]


def _nearest(word: str, names: Sequence[str], *, cutoff: float) -> str | None:
    """The one of `names` that is most like `word`, by difflib. Long words, slow to compare, are like none."""
    near = difflib.get_close_matches(word, names, n=1, cutoff=cutoff) if len(word) <= _LONGEST_NAME else []
    return near[0] if near else None
