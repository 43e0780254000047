"""Correlations, intervals and tables of planted ranks: for scripts/evidence/planted_ranks.py."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from qhybrid.sweep.statistics import RATIO, compare

RankMap = Mapping[str, float]  # by module
MAPS = ("adalora", "adalora scores", "gora", "gora importance", "eva")
CONTROL = "uniform"
OPPOSITE = ("increasing", "decreasing")
COLUMNS = ("modules", "layers", "functional")


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The correlation of ranks, ties at their mean; None where one of the two is the same everywhere."""
    a, b = (_placed(values) for values in (one, other))
    length = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / length if length else None


def _placed(values: Sequence[float]) -> np.ndarray:
    """Places from the smallest, about their mean."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse] - (len(inverse) + 1) / 2


def by_layer(found: RankMap) -> list[float]:
    """Means over the modules of each layer."""
    return _means(found, lambda module: int(module.split(".")[2]))


def by_type(found: RankMap) -> list[float]:
    """Means over the layers for each type of module."""
    return _means(found, lambda module: module.split(".")[-1])


def _means(found: RankMap, key) -> list[float]:
    groups = defaultdict(list)
    for module, value in found.items():
        groups[key(module)].append(value)
    return [sum(values) / len(values) for values in groups.values()]


def correlations(found: RankMap, truth: RankMap, functional: RankMap) -> dict[str, float | None]:
    """Spearman's ρ of one map with the truth, over modules and over means, and with the functional truth."""
    modules = list(truth)
    return {
        "modules": spearman([found[each] for each in modules], [truth[each] for each in modules]),
        "layers": spearman(by_layer(found), by_layer(truth)),
        "types": spearman(by_type(found), by_type(truth)),
        "functional": spearman([found[each] for each in modules], [functional[each] for each in modules]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _rounded(value: Any, digits: int = 4) -> Any:
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, Mapping):
        return {key: _rounded(each, digits) for key, each in value.items()}
    return [_rounded(each, digits) for each in value] if isinstance(value, (list, tuple)) else value


def summary(
    tries: Sequence[tuple[dict[str, Any], dict[str, Any]]], found: Mapping[tuple[str, str, int], dict[str, Any]]
) -> dict[str, Any]:
    """AdaLoRA's settings, and by variant and plant what is left in each arm, and how the maps correlate.

    Args:
        tries: settings, and the result of one run with them.
        found: by variant, plant and seed.
    """
    grouped: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for (variant, plant, _), result in found.items():
        grouped[variant][plant].append(result)
    return {
        "adalora_settings": [
            {
                **settings,
                "left": round(float(np.mean(result["left"])), 4),
                "spearman": _rounded(spearman(list(result["ranks"].values()), list(result["truth"].values()))),
            }
            for settings, result in tries
        ],
        "variants": {
            variant: {
                "plants": {plant: _of_plant(seeds) for plant, seeds in plants.items()},
                "own_profile": _own_profile(plants),
            }
            for variant, plants in grouped.items()
        },
    }


def _of_plant(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {
        arm: {
            seed: np.array([[left, 1.0] for left in result["arms"][arm]["left"]])
            for seed, result in enumerate(seeds)
        }
        for arm in seeds[0]["arms"]
    }
    compared = compare(RATIO, rows, CONTROL if CONTROL in rows else next(iter(rows)))
    return {
        "start_nats": [round(result["start"], 4) for result in seeds],
        "arms": {
            arm: {
                "left": _rounded(asdict(figures.own)),
                "against_uniform": _rounded(asdict(figures.difference)) if figures.difference else None,
                "parameters": round(float(np.mean([result["arms"][arm]["parameters"] for result in seeds]))),
            }
            for arm, figures in compared.items()
        },
        "spearman": {
            name: _by_seed([correlations(each["maps"][name], each["truth"], each["functional"]) for each in seeds])
            for name in MAPS
        },
        "functional": _by_seed([correlations(each["functional"], each["truth"], each["truth"]) for each in seeds]),
        "ranks": {
            "truth": [list(each["truth"].values()) for each in seeds],
            **{name: [list(each["maps"][name].values()) for each in seeds] for name in ("adalora", "gora", "eva")},
        },
    }


def _own_profile(plants: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """How far the maps of two opposite plants are alike: what they say of the base and not of the teacher."""
    if not plants.keys() >= set(OPPOSITE):
        return {}
    one, other = (plants[name] for name in OPPOSITE)
    return {
        name: _of_seeds(
            [
                spearman(list(a["maps"][name].values()), list(b["maps"][name].values()))
                for a, b in zip(one, other, strict=True)
            ]
        )
        for name in MAPS
    }


def _by_seed(found: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    return {over: _of_seeds([each[over] for each in found]) for over in found[0]}


def _of_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    mean = float(np.mean(known)) if len(known) == len(values) else None
    return {"mean": _rounded(mean), "seeds": _rounded(list(values))}


def tables(facts: dict[str, Any]) -> str:
    """All results in markdown."""
    parts = []
    for variant, found in facts["variants"].items():
        plants = found["plants"]
        parts.append(f"### Terms of equal {variant}")
        parts.append(
            _table(
                ["left of KL, %", *plants],
                [
                    [arm, *(_left(plant["arms"].get(arm)) for plant in plants.values())]
                    for arm in next(iter(plants.values()))["arms"]
                ],
            )
        )
        parts.append(
            _table(
                ["Spearman's ρ: modules / layers / functional", *plants, "increasing with decreasing"],
                [
                    [
                        name,
                        *(
                            " / ".join(_number(plant["spearman"][name][over]["mean"]) for over in COLUMNS)
                            for plant in plants.values()
                        ),
                        _number(found["own_profile"].get(name, {"mean": None})["mean"]),
                    ]
                    for name in MAPS
                ],
            )
        )
    settings = facts["adalora_settings"]
    names = list(dict.fromkeys(name for each in settings for name in each))
    names = [name for name in names if name not in ("left", "spearman")] + ["left", "spearman"]
    parts.append("### AdaLoRA's settings")
    parts.append(_table(names, [[str(each.get(name, "")) for name in names] for each in settings]))
    parts.append("### Learning rates: what is left, %")
    searches = facts["learning_rates"]["tried"]
    rates = list(next(iter(searches.values())))
    parts.append(
        _table(
            ["arm", *map(str, rates)],
            [[arm, *(f"{100 * tried[rate]:.1f}" for rate in rates)] for arm, tried in searches.items()],
        )
    )
    return "\n\n".join(parts)


def _left(arm: dict[str, Any] | None) -> str:
    if arm is None:
        return ""
    text = f"{100 * arm['left']['mean']:.1f}"
    if (against := arm["against_uniform"]) is not None:
        text += " ({mean:+.1f}, {low:+.1f} to {high:+.1f})".format(**{k: 100 * v for k, v in against.items()})
    return text


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
