"""Draws what scripts/evidence/planted_ranks.py found: the maps beside the truth, and what each arm is worth.

python scripts/evidence/plot_planted_ranks.py [RESULTS] [OUTPUT]
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

DOCS = Path(__file__).resolve().parents[2] / "docs"
NUM_TYPES = 7
COLOURS = {"truth": "#adb5bd", "adalora": "#9d4edd", "gora": "#2a9d8f", "eva": "#f4a261"}
TITLES = {"by_module": "by module type"}


def means_by_layer(ranks: list[list[int]]) -> np.ndarray:
    """Means over seeds and a layer's modules (layers,)."""
    return np.array(ranks).reshape(len(ranks), -1, NUM_TYPES).mean(axis=(0, 2))


def means_by_true_rank(ranks: list[list[int]], truth: list[list[int]]) -> tuple[list[int], list[float]]:
    """The true ranks, and the mean rank that was found where they are."""
    groups: dict[int, list[int]] = defaultdict(list)
    for true, found in zip(np.ravel(truth), np.ravel(ranks), strict=True):
        groups[int(true)].append(found)
    return sorted(groups), [float(np.mean(groups[true])) for true in sorted(groups)]


def draw_maps(axes: Any, name: str, plant: dict[str, Any]) -> None:
    """Mean ranks along the depth or, where the depth says nothing, against the true ranks."""
    for method, colour in COLOURS.items():
        style = {"color": colour, "linewidth": 5 if method == "truth" else 1.8, "label": method}
        ranks = plant["ranks"][method]
        if name == "by_module":
            axes.plot(*means_by_true_rank(ranks, plant["ranks"]["truth"]), **style)
        else:
            axes.plot(means_by_layer(ranks), **style)
    axes.set_xlabel("true rank" if name == "by_module" else "layer")
    axes.set_ylim(0, None)


def draw_arms(axes: Any, plant: dict[str, Any]) -> None:
    """What is left of the teacher's change beyond the uniform arm, in percent points, with intervals."""
    arms = {arm: each["against_uniform"] for arm, each in plant["arms"].items() if each["against_uniform"]}
    for row, against in enumerate(arms.values()):
        low, mean, high = (100 * against[key] for key in ("low", "mean", "high"))
        axes.plot([low, high], [row, row], color="#33658a", linewidth=1.8)
        axes.plot(mean, row, "o", color="#33658a", markersize=4.5)
    axes.axvline(0, color="#adb5bd", linewidth=1, zorder=0)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.invert_yaxis()
    axes.set_xlabel("left, against uniform (points)")


def main() -> None:
    """Read the results and write the picture."""
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "data" / "evidence" / "planted_ranks.json"
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else DOCS / "images" / "planted_ranks.png"
    variant = next(iter(json.loads(results.read_text(encoding="utf-8"))["variants"].values()))
    plants = variant["plants"]
    figure, axes = plt.subplots(2, len(plants), figsize=(2.7 * len(plants), 5.6), squeeze=False)
    for column, (name, plant) in enumerate(plants.items()):
        axes[0, column].set_title(TITLES.get(name, name), fontsize=10)
        draw_maps(axes[0, column], name, plant)
        draw_arms(axes[1, column], plant)
        if column:
            axes[1, column].set_yticklabels([])
    axes[0, 0].set_ylabel("mean rank")
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
