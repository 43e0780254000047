"""From a file and overrides to a Recipe, with errors that name file, line and the nearest right name."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from qhybrid.errors import RecipeError
from qhybrid.recipe.aliases import (
    MEANT,
    SECTIONS,
    TOP_LEVEL,
    as_sources,
    own_name,
    rename_inside,
    settings_of,
    translate,
)
from qhybrid.recipe.excerpt import excerpt, excerpt_key, excerpt_list
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.shipped import find_shipped, shipped_names
from qhybrid.recipe.stages import resolved_stages
from qhybrid.recipe.training_fields import OWNED_ELSEWHERE, TrainingSection
from qhybrid.recipe.unfold import OVER_ALL_BANDS
from qhybrid.recipe.yaml_source import (
    MAX_BYTES,
    MAX_DEPTH,
    Source,
    dump_yaml,
    parse_scalar,
    parse_value,
    parse_yaml,
    too_large,
)
from qhybrid.recipe.yaml_source import Path as KeyPath
from qhybrid.redaction import redacted_values

OVERRIDE = "command line"
_MAX_PROBLEMS = 20  # told at once
_LONGEST_NAME = 100  # of a key that a similar one is looked for


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, the file it came from, and notices about names that were translated."""

    recipe: Recipe
    path: Path
    notices: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of the recipe file; relative data paths may start there."""
        return self.path.parent


def load_recipe(name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load the recipe file `name` (or the shipped recipe of that name) and apply `overrides`.

    Args:
        name: a path to a YAML file, or the name of a shipped recipe without `.yaml`.
        overrides: texts of the form `training.learning_rate=1e-4` or `adapters.top.rank=8`.

    Raises:
        RecipeError: no such file, not a recipe, or an override that names nothing.
    """
    path = _find(name)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"the file cannot be read: {error.strerror or error}", where=name) from None
    if len(raw) > MAX_BYTES:
        raise too_large(name)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError("the file is not UTF-8 text", where=f"{name}:{line}") from None
    recipe, notices = parse_recipe(text, name, overrides)
    return LoadedRecipe(recipe, path, tuple(notices))


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Validate the YAML `text`, called `name` in messages. Returns the recipe and notices."""
    source = parse_yaml(text, name)
    values, origins, notices = translate(source)
    overridden = [path for override in overrides for path in _apply_override(values, override, notices)]
    rename_inside(values, origins, notices, Source(OVERRIDE, values))
    try:
        return Recipe.model_validate(values), notices
    except ValidationError as error:
        raise _as_recipe_error(error, source, origins, overridden) from None


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with every value that follows from others written out: alpha, initial ranks, dtypes."""
    bands = []
    for band in recipe.adapters:
        # With a schedule every module has a rank, and an alpha, of its own.
        own = band.schedule is not None or recipe.schedule is not None or recipe.ranks is not None
        filled: dict[str, Any] = {"alpha": band.alpha if own else band.resolved_alpha}
        if band.kind == "adalora":
            filled["adalora"] = band.adalora_settings.model_copy(update={"init_rank": band.init_rank})
        else:
            filled["init"] = band.init or (None if recipe.ranks and recipe.ranks.initialise else "kaiming")
        bands.append(band.model_copy(update=filled))
    model = recipe.model.model_copy(update={"adapter_dtype": recipe.adapter_dtype})
    settled = {"model": model, "adapters": tuple(bands), "stages": resolved_stages(recipe)}
    return recipe.model_copy(update=settled)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `parse_recipe` reads it back to an equal recipe.

    But for what is redacted: secrets are gone, and paths below the home directory begin with "~".
    """
    values = recipe.model_dump(mode="json")
    if recipe.rank_budget is not None:  # which a band's rank would contradict
        for band in values["adapters"]:
            del band["rank"]
    training = type(recipe.training)
    # What another section owns is always at its default here, and refused when given.
    values["training"] = {
        key: value
        for key, value in values["training"].items()
        if value != training.model_fields[key].default or key not in OWNED_ELSEWHERE
    }
    return dump_yaml(redacted_values(values))  # before YAML folds a path with spaces into two lines


def _find(name: str) -> Path:
    # os.path says no where Path raises: a name too long, a folder without permission
    if os.path.isfile(name):
        return Path(name)
    if os.path.isdir(name):
        raise RecipeError(f"{name} is a folder, not a recipe file")
    if os.path.exists(name):
        raise RecipeError(f"{name} is a pipe or a device, not a recipe file")  # which may never end
    shipped = find_shipped(name)
    if shipped is not None:
        return shipped
    folder = Path(name).parent
    nearby = [str(file) for file in sorted(folder.glob("*.y*ml"))] if os.path.isdir(folder) else []
    nearest = difflib.get_close_matches(name, [*nearby, *shipped_names()], n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "qhybrid recipes list shows the shipped ones"
    raise RecipeError(
        f"there is no file {excerpt(name)}, and no recipe of that name comes with qhybrid", hint=hint
    )


def _apply_override(values: dict[str, Any], override: str, notices: list[str]) -> list[KeyPath]:
    """Set what `override` says in the translated `values`. Returns the paths that were set."""
    if len(override) > MAX_BYTES:
        raise too_large(OVERRIDE)
    key, separator, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not separator or not all(parts) or len(parts) > MAX_DEPTH or not key.isprintable():
        raise RecipeError(
            f"{excerpt(override)} is not an override",
            where=OVERRIDE,
            hint="write for example training.max_steps=100",
        )
    value = parse_value(text, OVERRIDE)
    try:
        foreign = None if parts[0] in SECTIONS else settings_of(key, value)
    except RecipeError as error:
        raise RecipeError(error.message, hint=error.hint, where=OVERRIDE) from None
    if parts[0] == "adapters":
        parts = _in_adapters(values, parts)
    model = values.get("model")
    if key == "bf16" and value is False and isinstance(model, dict) and model.get("dtype") == "float16":
        foreign = []  # no contradiction
    if foreign == []:
        notices.append(f"{OVERRIDE}: {key} has no effect")
    if foreign is None:
        return [_set(values, parts, value, override)]
    paths: list[KeyPath] = []
    for target, converted in foreign:
        notices.append(f"{OVERRIDE}: {key} is read as {'.'.join(target)}")
        if target[0] in ("adapters", "sources"):
            items = values.get("adapters") if target[0] == "adapters" else _sources(values)
            prefix = ["adapters"] if target[0] == "adapters" else ["data", "sources"]
            for index in range(len(items) if isinstance(items, list) else 0):
                paths.append(_set(values, [*prefix, str(index), target[1]], converted, override))
        else:
            paths.append(_set(values, list(target), converted, override))
    return paths


def _in_adapters(values: dict[str, Any], parts: list[str]) -> list[str]:
    """Where `adapters.schedule.budget` or `adapters.bands.top.rank` stand in translated values."""
    if len(parts) == 1:  # all that may be written inside adapters is replaced
        for name in OVER_ALL_BANDS:
            values.pop(name, None)
        return parts
    bands = values.get("adapters")
    names = [band.get("band") for band in bands if isinstance(band, dict)] if isinstance(bands, list) else []
    if parts[1] in names:
        return parts
    if parts[1] in OVER_ALL_BANDS:
        return parts[1:]
    return [parts[0], *parts[2:]] if parts[1] == "bands" and len(parts) > 2 else parts


def _sources(values: dict[str, Any]) -> Any:
    data = values.get("data")
    if not isinstance(data, dict):
        return None
    data["sources"] = as_sources(data.get("sources"))
    return data["sources"]


def _set(values: dict[str, Any], parts: list[str], value: Any, override: str) -> KeyPath:
    """Set one value; a band may be named by its name or its number, and keys by foreign names."""
    at: Any = values
    path: list[str | int] = []
    for depth, given in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(at, list):
            index = _list_index(at, given, override)
            path.append(index)
            if last:
                at[index] = value
            else:
                at = at[index]
        elif isinstance(at, dict):
            part = own_name(tuple(path), given)
            path.append(part)
            if last:
                at[part] = value
            else:
                if at.get(part) is None:
                    at[part] = {}
                at = at[part]
        else:
            raise RecipeError(
                f"{excerpt(override)}: {'.'.join(map(str, path))} is a single value and has no {excerpt(given)}",
                where=OVERRIDE,
            )
    return tuple(path)


def _list_index(items: list, part: str, override: str) -> int:
    # isdecimal() alone takes digits of any script, and int() refuses very many of them.
    if part.isascii() and part.isdecimal() and len(part) < 10 and int(part) < len(items):
        return int(part)
    names = [
        str(item.get("band", item.get("name", item.get("layers")))) if isinstance(item, dict) else str(item)
        for item in items
    ]
    derived = [f"band{index}" for index in range(len(items))]  # as the schema calls a band without a name
    if part in derived and part not in names:
        return derived.index(part)
    if part in names:
        return names.index(part)
    raise RecipeError(
        f"{excerpt(override)}: there is no {excerpt(part)} in the list",
        where=OVERRIDE,
        hint=f"use a number from 0 to {len(items) - 1}, or one of: {excerpt_list(names)}"
        if items
        else "the list is empty",
    )


def _as_recipe_error(
    error: ValidationError, source: Source, origins: dict[KeyPath, KeyPath], overridden: list[KeyPath]
) -> RecipeError:
    """All problems in one message, each with its line and hint; a single problem keeps its hint apart."""
    problems = error.errors(include_url=False)
    found: list[tuple[str, str | None]] = []
    seen: set[KeyPath] = set()
    for number, problem in enumerate(problems):
        if len(found) == _MAX_PROBLEMS:
            found.append((f"and {len(problems) - number:,} more problems", None))
            break
        inside = getattr((problem.get("ctx") or {}).get("error"), "path", ())  # of a check over several sections
        path = _without_tags((*problem["loc"], *inside))
        if path in seen:
            continue  # what another member of a union would have taken
        seen.add(path)
        if problem["type"] == "too_short" and any(
            len(other["loc"]) > len(path) and other["loc"][: len(path)] == path for other in problems
        ):
            continue  # a list looks empty when its items were refused
        message, hint = _describe(dict(problem), path)
        origin = _origin(path, origins)
        from_override = any(
            path[: len(start)] == start or (origin not in source.lines and start[: len(path)] == path)
            for start in overridden
        )
        where = OVERRIDE if from_override else source.where(origin)
        name = ".".join(map(excerpt_key, path))
        found.append((f"{where}: {name + ': ' if name else ''}{message}", hint))
    if len(found) == 1:
        return RecipeError(found[0][0], hint=found[0][1])
    return RecipeError("\n".join(f"{line} ({hint})" if hint else line for line, hint in found))


def _origin(path: KeyPath, origins: dict[KeyPath, KeyPath]) -> KeyPath:
    """Where `path` was written, if it or what it is part of was moved."""
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return (*origins[path[:length]], *path[length:])
    return path


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
            place = f"{name}[]" if name == "adapters" else name
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
