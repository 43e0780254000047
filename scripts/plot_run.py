#!/usr/bin/env python
"""Draws a run from its event log: the loss, and where AdaLoRA's ranks went. Usage: plot_run.py RUN PICTURE.png"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from qhybrid.architecture.layout import Layout
from qhybrid.training.events import read_events

INK, GRID, ACCENT, SECOND = "#1f2933", "#d9dee3", "#1f6feb", "#d1480f"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws a run: the loss, and where AdaLoRA's ranks went.")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args()
    run, picture = options.run, options.picture
    steps = read_events(run / "events.jsonl", "step")
    layout = Layout.from_json((run / "layout.json").read_text(encoding="utf-8"))
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": GRID, "axes.labelcolor": INK, "text.color": INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=[1, 1.35], layout="constrained")

    x = [record["step"] for record in steps]
    left.plot(x, [record["loss"] for record in steps], color=ACCENT, linewidth=1.8)
    left.set_yscale("log")
    left.set_xlabel("optimizer step")
    left.set_ylabel("training loss (log scale)", color=ACCENT)
    left.set_title("Loss, and AdaLoRA's budget", fontsize=10, loc="left", weight="bold")
    left.grid(color=GRID, linewidth=0.6)
    if "live_ranks" in steps[0]:
        ranks = left.twinx()
        ranks.step(x, [sum(r["live_ranks"].values()) for r in steps], where="post", color=SECOND, linewidth=1.4)
        ranks.set_ylabel("live ranks", color=SECOND)
        ranks.set_ylim(bottom=0)
        ranks.spines[:].set_color(GRID)

    live = steps[-1].get("live_ranks", {})
    targets = list(dict.fromkeys(row.target for row in layout))
    layers = list(dict.fromkeys(row.layer for row in layout))
    grid = np.full((len(targets), len(layers)), np.nan)
    for row in layout:
        grid[targets.index(row.target), layers.index(row.layer)] = live.get(row.module, row.rank)
    image = right.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=np.nanmax(grid) * 1.15, origin="lower")
    right.set_yticks(range(len(targets)), targets)
    right.set_xlabel("layer")
    right.set_title("Rank of every module at the end", fontsize=10, loc="left", weight="bold", pad=22)
    for band in layout.bands:
        rows = layout.of_band(band)
        first, last = layers.index(rows[0].layer), layers.index(rows[-1].layer)
        right.axvline(last + 0.5, color="white", linewidth=2.5)
        label = f"{band}: {rows[0].kind}"
        right.text((first + last) / 2, len(targets) - 0.3, label, ha="center", va="bottom", fontsize=9)
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            dark = value > np.nanmax(grid) * 0.6
            right.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color="white" if dark else INK)
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    figure.colorbar(image, ax=right, shrink=0.85, label="rank").outline.set_visible(False)
    figure.savefig(picture, dpi=160)
    print(f"wrote {picture}")
    if live:
        means = {
            target: np.mean([rank for module, rank in live.items() if module.endswith(f".{target}")])
            for target in targets
        }
        print("mean rank at the end: " + ", ".join(f"{target} {mean:.1f}" for target, mean in means.items()))


if __name__ == "__main__":
    main()
