"""From a recipe's `ranks` section and rows of its training data to the layout and the adapters' first values."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from qhybrid.architecture.bands import with_rank
from qhybrid.architecture.layout import Layout, LayoutRow
from qhybrid.architecture.schedules import Place, spread
from qhybrid.base.load import keep_exact_on_cpu
from qhybrid.data.tokenize import EncodedRow
from qhybrid.ranks import eva, gora
from qhybrid.recipe.ranks import DataRanksSection
from qhybrid.recipe.schema import Recipe
from qhybrid.units import parse_bytes

Losses = Callable[[PreTrainedModel, Sequence[EncodedRow], int], Iterator[Tensor]]  # as `gora.token_losses`
InitialValues = Mapping[str, tuple[Tensor, Tensor]]  # by module: A (r, in) and B (out, r), fp32


@dataclass(frozen=True)
class Decision:
    """What the data decided."""

    layout: Layout
    initial: InitialValues  # empty where the recipe asks for ranks only
    importance: dict[str, float]  # by module: gora mean |W ⊙ G|, eva the variance share of the taken directions
    budget: int  # parameters: Σ r·(in + out) is at most this


def decide_ranks(
    model: PreTrainedModel,
    recipe: Recipe,
    layout: Layout,
    data: Dataset,
    progress: Callable[[int, int], None] = lambda done, total: None,
    losses: Losses = gora.token_losses,
) -> Decision:
    """Run the method that `recipe.ranks` names. The model is the bare base; it is frozen, and not changed.

    Args:
        layout: the uniform one of `build_layout`, whose budget is spread anew.
        data: the training rows, `input_ids` and `labels`.
        progress: told how many of how many passes over the chosen rows are done.
        losses: gora: of the model on some rows, so many at a time, the parts that sum to what is to be minimised.
    """
    section = recipe.ranks
    assert section is not None
    keep_exact_on_cpu(model)
    model.requires_grad_(False)  # as attaching adapters will do; embeddings and norms would collect gradients
    budget = section.budget or sum(row.rank * _cost(row) for row in layout)
    places = _places(section, layout, budget)
    rows = _choose(data, section.rows, recipe.training.seed)
    largest = {row.module: place.highest for row, place in zip(layout, places, strict=True)}
    batch_size, memory = recipe.training.per_device_train_batch_size, parse_bytes(section.memory)
    initial: dict[str, tuple[Tensor, Tensor]] = {}
    if section.method == "gora":
        probes = gora.probe_gradients(
            model,
            lambda: losses(model, rows, batch_size),
            layout.rows,
            largest,
            memory=memory,
            seed=recipe.training.seed,
            progress=progress,
        )
        importance = {name: probe.importance for name, probe in probes.items()}
        decided = _with_ranks(recipe, layout, spread(gora.wishes(probes, layout.rows), places, budget))
        if section.initialise:
            gamma = section.gamma or gora.GAMMA
            initial = {row.module: gora.initial_values(probes[row.module], row, gamma) for row in decided}
    else:
        found = eva.input_directions(
            model, rows, layout.rows, largest, batch_size=batch_size, memory=memory, progress=progress
        )
        directions = [found[row.module] for row in layout]
        decided = _with_ranks(recipe, layout, eva.ranks_of_directions(directions, places, budget))
        importance = {row.module: float(found[row.module].shares[: row.rank].sum()) for row in decided}
        if section.initialise:
            initial = {
                row.module: (found[row.module].vectors[: row.rank], torch.zeros(row.out_features, row.rank))
                for row in decided
            }
    return Decision(decided, initial, importance, budget)


def _cost(row: LayoutRow) -> int:
    return row.in_features + row.out_features


def _places(section: DataRanksSection, layout: Layout, budget: int) -> list[Place]:
    average = budget / sum(_cost(row) for row in layout)
    share = gora.MAX_SHARE if section.method == "gora" else eva.MAX_SHARE
    lowest = max(1, round(gora.MIN_SHARE * average)) if section.method == "gora" else 1
    places = []
    for row in layout:
        side = min(row.in_features, row.out_features)
        highest = min(side, section.max_rank or max(1, round(share * average)))
        places.append(Place(row.layer, row.target, _cost(row), min(section.min_rank or lowest, highest), highest))
    return places


def _choose(data: Dataset, number: int, seed: int) -> list[EncodedRow]:
    """Rows at random, in a fixed order."""
    chosen = sorted(random.Random(seed).sample(range(len(data)), min(number, len(data))))
    return [EncodedRow(np.asarray(data[i]["input_ids"]), np.asarray(data[i]["labels"])) for i in chosen]


def _with_ranks(recipe: Recipe, layout: Layout, ranks: Sequence[int]) -> Layout:
    bands = {band.band: band for band in recipe.adapters}
    rows = (with_rank(row, bands[row.band], rank) for row, rank in zip(layout, ranks, strict=True))
    return Layout(tuple(rows))
