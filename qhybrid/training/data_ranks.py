"""Ranks that the training data decides, once, before the first step; a checkpoint has them with its layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from qhybrid.architecture.layout import Layout
from qhybrid.disk import write_atomically
from qhybrid.ranks.decide import InitialValues, decide_ranks
from qhybrid.recipe.schema import Recipe
from qhybrid.training.processes import agree
from qhybrid.training.run import Run


def rank_by_data(
    recipe: Recipe,
    layout: Layout,
    base: PreTrainedModel,
    data: Dataset,
    run: Run,
    report: Callable[..., None],
) -> tuple[Layout, InitialValues]:
    """The layout that the recipe's `ranks` section leads to, and what adapters start with.

    Of several processes the first decides for all. The run's layout.json is written anew.

    Args:
        layout: the uniform one that was planned with.
        report: takes the name of an event and its facts.
    """
    section = recipe.ranks
    assert section is not None

    def progress(done: int, total: int) -> None:
        if done < total:
            report("ranks_pass", method=section.method, number=done + 1, total=total)

    decision = agree(lambda: decide_ranks(base, recipe, layout, data, progress))
    agree(lambda: write_atomically(run.layout_file, decision.layout.to_json()))
    report(
        "ranks",
        method=section.method,
        rows=min(section.rows, len(data)),
        budget=decision.budget,
        parameters=decision.layout.num_parameters,
        ranks={row.module: row.rank for row in decision.layout},
        importance=decision.importance,
    )
    return decision.layout, decision.initial


def told_ranks(facts: dict[str, Any]) -> str:
    """The decision in one line: means by module type and by third of the depth."""
    ranks: dict[str, int] = facts["ranks"]
    targets: dict[str, list[int]] = {}
    for module, rank in ranks.items():
        targets.setdefault(module.rpartition(".")[2].removesuffix("_proj"), []).append(rank)
    in_order = list(ranks.values())
    third = len(in_order) / 3
    thirds = [in_order[round(i * third) : round((i + 1) * third)] for i in range(3)]
    named = [*targets.items(), *zip(("bottom", "middle", "top"), thirds, strict=True)]
    means = ", ".join(f"{name} {sum(some) / len(some):.1f}" for name, some in named if some)
    return (
        f"ranks    {facts['method']} from {facts['rows']} rows: {min(in_order)} to {max(in_order)}, "
        f"{facts['parameters']:,} parameters; on average {means}"
    )
