"""The layout of two adapters that add up in the same modules, as one adapter with scaling 1."""

from __future__ import annotations

from dataclasses import replace

from qhybrid.architecture.layout import Layout, LayoutRow


def concatenate(first: Layout, second: Layout) -> Layout:
    """One row for every module of either: A = [A₁; A₂], B = [s₁·B₁, s₂·B₂], so that B·A = s₁·B₁·A₁ + s₂·B₂·A₂.

    A module that only one of them adapts has a row as well. The bands are those of `second` where it has any.

    Args:
        first, second: of kinds lora and rslora, for one model.
    """
    of_first = {row.module: row for row in first}
    of_second = {row.module: row for row in second}
    rows = [
        _joined([rows[module] for rows in (of_first, of_second) if module in rows])
        for module in (of_first | of_second)
    ]
    return Layout(tuple(sorted(rows, key=lambda row: row.layer)))


def _joined(rows: list[LayoutRow]) -> LayoutRow:
    rank = sum(row.rank for row in rows)
    return replace(
        rows[-1],
        kind="lora",
        rank=rank,
        target_rank=rank,
        alpha=float(rank),
        scaling=1.0,
        dropout=max(row.dropout for row in rows),
        init="none",
        loraplus_lr_ratio=1.0,
        lr_ratio=1.0,
    )
