"""From a file and overrides to a Recipe, with errors that name file, line and the nearest right name."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qhybrid.errors import QhybridError, RecipeError
from qhybrid.recipe.aliases import (
    SECTIONS,
    as_sources,
    own_name,
    rename_inside,
    settings_of,
    translate,
)
from qhybrid.recipe.excerpt import excerpt, excerpt_list
from qhybrid.recipe.problems import OVERRIDE, Places, as_recipe_error
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.shipped import find_shipped, shipped_names
from qhybrid.recipe.stages import resolved_stages
from qhybrid.recipe.tasks import (
    OWN_SECTIONS,
    adapter_recipes,
    take_over,
    task_recipes,
    with_adapter_recipes,
    without_effect,
)
from qhybrid.recipe.training_fields import OWNED_ELSEWHERE
from qhybrid.recipe.unfold import OVER_ALL_BANDS
from qhybrid.recipe.yaml_source import (
    MAX_BYTES,
    MAX_DEPTH,
    Source,
    dump_yaml,
    parse_value,
    parse_yaml,
    too_large,
)
from qhybrid.recipe.yaml_source import Path as KeyPath
from qhybrid.redaction import redacted_values


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, the file it came from, and notices about names that were translated."""

    recipe: Recipe
    path: Path
    notices: tuple[str, ...] = ()
    places: Places | None = None  # None for a recipe that is not as the file has it

    @property
    def folder(self) -> Path:
        """The folder of the recipe file; relative data paths may start there."""
        return self.path.parent

    @contextlib.contextmanager
    def placing(self) -> Iterator[None]:
        """Give errors of the block that are at a place in the recipe its file and line."""
        try:
            yield
        except QhybridError as error:
            if error.at and self.places is not None:
                place = self.places.where(_numbered(self.recipe, error.at))
                error.where, error.at = place if error.where is None else f"{error.where}: {place}", ()
            raise


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
    recipe, notices, places = _parse(text, name, overrides)
    return LoadedRecipe(recipe, path, tuple(notices), places)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Validate the YAML `text`, called `name` in messages. Returns the recipe and notices."""
    return _parse(text, name, overrides)[:2]


def _parse(text: str, name: str, overrides: Sequence[str]) -> tuple[Recipe, list[str], Places]:
    source = parse_yaml(text, name)
    values, origins, notices = translate(source)
    unused = without_effect(values)
    if unused is not None:
        message = f"{'.'.join(unused)} has no effect: every task has its own"
        raise RecipeError(message, where=source.where(origins.get(unused, unused)), hint="remove it")
    overridden = [path for override in overrides for path in _apply_override(values, override, notices)]
    rename_inside(values, origins, notices, Source(OVERRIDE, values))
    places = Places(source, origins, overridden, values)
    try:
        return Recipe.model_validate(values), notices, places
    except ValidationError as error:
        raise as_recipe_error(error, places) from None


def _numbered(recipe: Recipe, at: KeyPath) -> KeyPath:
    """A place in the recipe with numbers for the names of bands, stages and tasks, as far as it is there."""
    here: Any = recipe
    path: list[str | int] = []
    for part in at:
        if isinstance(here, tuple):
            names = [getattr(item, "band", None) or getattr(item, "name", None) for item in here]
            number = names.index(part) if part in names else part
            if not isinstance(number, int):
                break
            path.append(number)
            here = here[number]
        else:
            path.append(part)
            here = getattr(here, str(part), None)
    return tuple(path)


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with every value that follows from others written out: alpha, initial ranks, dtypes."""
    if recipe.tasks:
        resolved = {name: resolve(own) for name, own in adapter_recipes(recipe).items()}
        return with_adapter_recipes(recipe, resolved)
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
    return dump_yaml(redacted_values(_values(recipe)))  # before YAML folds a path with spaces into two lines


def _values(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", exclude={"tasks"})
    if recipe.shared is None:
        del values["shared"]
    if recipe.tasks:
        for section in OWN_SECTIONS:
            del values[section]
        values["tasks"] = []
        for task, own in zip(recipe.tasks, map(_values, task_recipes(recipe).values()), strict=True):
            sections = {section: own[section] for section in OWN_SECTIONS}
            values["tasks"].append({"name": task.name, "weight": task.weight, **sections})
        return values
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
    return values


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
        parts = _in_adapters(values, values, parts)
    elif parts[0] == "tasks" and parts[2:3] == ["adapters"] and isinstance(values.get("tasks"), list):
        task = values["tasks"][_list_index(values["tasks"], parts[1], override)]
        if isinstance(task, dict):
            parts = [*parts[:2], *_in_adapters(task, values, parts[2:])]
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


def _in_adapters(values: dict[str, Any], for_all: dict[str, Any], parts: list[str]) -> list[str]:
    """Where `adapters.schedule.budget` or `adapters.bands.top.rank` stand in translated values.

    Args:
        values: of the recipe, or of one of its tasks.
        for_all: of the recipe.
    """
    if len(parts) == 1:  # all that may be written inside adapters is replaced
        for name in OVER_ALL_BANDS:
            values.pop(name, None)
        return parts
    bands = values.get("adapters", for_all.get("adapters"))
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
                    found = take_over(values, tuple(path))
                    at[part] = {} if found is None else found
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
        str(item.get("band", item.get("name", item.get("layers", "all")))) if isinstance(item, dict) else str(item)
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
