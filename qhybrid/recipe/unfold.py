"""Adapters written as one mapping, as the sections they stand for: in a recipe, and in the arms of a sweep."""

from __future__ import annotations

from qhybrid.errors import RecipeError
from qhybrid.recipe.yaml_source import Path, Source

OVER_ALL_BANDS = ("schedule", "ranks")  # top-level sections that may be written inside adapters


def unfold_arms(values: dict, origins: dict, source: Source) -> None:
    """The adapters of a sweep's arms are written as the recipe's own."""
    sweep = values.get("sweep")
    if not isinstance(sweep, dict) or not isinstance(sweep.get("arms"), list):
        return
    arms = [dict(arm) if isinstance(arm, dict) else arm for arm in sweep["arms"]]
    values["sweep"] = {**sweep, "arms": arms}
    for index, arm in enumerate(arms):
        if isinstance(arm, dict) and isinstance(arm.get("adapters"), dict):
            unfold_adapters(arm, ("sweep", "arms", index), origins, source)


def unfold_adapters(values: dict, at: Path, origins: dict, source: Source) -> None:
    """adapters: {schedule: …, bands: […]}, or {schedule: …, kind: …} for one band, as separate sections.

    `at` is where `values` stand in the recipe.
    """
    adapters, place = dict(values["adapters"]), (*at, "adapters")
    for key in OVER_ALL_BANDS:
        if key not in adapters:
            continue
        if values.get(key) is not None:
            raise RecipeError(
                f"{key} is given twice: inside adapters and beside it",
                where=source.where((*place, key)),
                hint="remove one of them",
            )
        values[key] = given = adapters.pop(key)
        origins[(*at, key)] = (*place, key)
        for inner in given if isinstance(given, dict) else ():
            origins[(*at, key, inner)] = (*place, key, inner)
    bands = adapters.pop("bands", None)
    if bands is None:  # one band needs no list
        values["adapters"] = [adapters]
        origins[(*place, 0)] = place
        for inner in adapters:
            origins[(*place, 0, inner)] = (*place, inner)
        return
    if adapters:
        key = next(iter(adapters))
        raise RecipeError(
            f"adapters has bands, and {key} beside them",
            where=source.where((*place, key)),
            hint=f"write {key} into each band, or leave bands out for a single band",
        )
    values["adapters"] = bands
    for index, band in enumerate(bands if isinstance(bands, list) else ()):
        origins[(*place, index)] = (*place, "bands", index)
        for inner in band if isinstance(band, dict) else ():
            origins[(*place, index, inner)] = (*place, "bands", index, inner)
