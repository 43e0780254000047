#!/usr/bin/env python
"""The tables of SmolLM2 in docs/evidence.md: prints docs/data/evidence/TASK_rankRANK/ in Markdown.

gsm8k_first_grid_rank8 is what gsm8k_rank8 was before seven of its arms got one more rate.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

from qhybrid.sweep.results import ArmResult, SweepResults, read_results
from qhybrid.sweep.text import legend

DATA = Path(__file__).resolve().parents[2] / "docs" / "data" / "evidence"


def cell(results: SweepResults, name: str, metric: str) -> str:
    """The difference to the control with its interval, or the control's own mean."""
    arm = arm_of(results, name)
    if arm is None or metric not in arm.metrics:
        return arm.status if arm else "–"
    if arm.is_control:
        return f"{arm.metrics[metric].mean:.4f}"
    one = arm.differences[metric]
    return f"{one.mean:+.4f} ({one.low:+.4f} to {one.high:+.4f}){' ●' * one.is_clear}"


def show(task: str, by_rank: dict[int, SweepResults]) -> None:
    """One table for each metric: arms by ranks."""
    ranks = sorted(by_rank)
    first = by_rank[ranks[0]]
    names = dict.fromkeys(arm.name for rank in ranks for arm in by_rank[rank].arms)
    for metric in first.metrics:
        print(f"\n**{task}, {metric}**\n\n| arm | {' | '.join(f'rank {rank}' for rank in ranks)} |")
        print(f"|---{'|---' * len(ranks)}|")
        for name in names:
            print(f"| {name} | {' | '.join(cell(by_rank[rank], name, metric) for rank in ranks)} |")
    print(f"\n| arm | {' | '.join(f'rate, seconds, MiB at rank {rank}' for rank in ranks)} |")
    print(f"|---{'|---' * len(ranks)}|")
    for name in names:
        print(f"| {name} | {' | '.join(cost(arm_of(by_rank[rank], name)) for rank in ranks)} |")
    for rank in ranks:
        print(f"\nrank {rank}: {legend(by_rank[rank])}")
    accuracies = [
        run.metrics["accuracy"] for found in by_rank.values() for run in found.runs if run.metrics.get("accuracy")
    ]
    if accuracies:
        most, times = Counter(accuracies).most_common(1)[0]
        print(f"\naccuracy is {most:g} in {times} of {len(accuracies)} runs, and {max(accuracies):g} at most")


def arm_of(results: SweepResults, name: str) -> ArmResult | None:
    """The arm of that name, if it was swept."""
    return next((arm for arm in results.arms if arm.name == name), None)


def cost(arm: ArmResult | None) -> str:
    """What the arm took, at which rate."""
    if arm is None:
        return "–"
    if arm.best_learning_rate is None or arm.seconds is None or arm.peak_bytes is None:
        return arm.status
    edge = " !" if arm.is_best_at_edge else ""
    return f"{arm.best_learning_rate:g}{edge}, {arm.seconds:.0f}, {arm.peak_bytes / 2**20:.0f}"


def main() -> None:
    found: dict[str, dict[int, SweepResults]] = defaultdict(dict)
    for folder in sorted(DATA.iterdir()):
        if match := re.fullmatch(r"(\w+)_rank(\d+)", folder.name):
            found[match[1]][int(match[2])] = read_results(folder)
    for task, by_rank in found.items():
        show(task, by_rank)


if __name__ == "__main__":
    main()
