"""From a recipe's bands and a ModelSpec to the Layout: which module gets which adapter, and of which rank."""

from __future__ import annotations

import bisect
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qhybrid.architecture.layout import Layout, LayoutRow
from qhybrid.architecture.schedules import Place, scheduled_ranks
from qhybrid.architecture.spec import Linear, ModelSpec
from qhybrid.errors import LayoutError, found_at
from qhybrid.recipe.band import BandSection
from qhybrid.recipe.ranks import BudgetSection, ScheduleSection
from qhybrid.recipe.schema import Recipe

_THIRDS = {"bottom": (0, 1), "middle": (1, 2), "top": (2, 3)}


_UNIFORM = ScheduleSection(name="uniform")


def build_layout(recipe: Recipe, spec: ModelSpec) -> Layout:
    """Give every module that a band names its adapter.

    Where data decides the ranks (`recipe.ranks`), this is the layout that they are planned with: uniform, at the
    same budget.

    Raises:
        LayoutError: a layer out of range, an empty band, a pattern that matches nothing, two bands that claim the
            same module, or a budget below the lowest ranks.
    """
    init = recipe.ranks.method if recipe.ranks and recipe.ranks.initialise else None
    schedule = recipe.schedule or (_UNIFORM if recipe.rank_budget is not None else None)
    limits = recipe.schedule or recipe.ranks
    members = _members(recipe.adapters, spec)
    if schedule is not None and limits is not None:
        with found_at("schedule" if recipe.schedule else "ranks"):
            ranks = _scheduled(schedule, limits, members, recipe.rank_budget)
    else:
        ranks = _own_ranks(recipe.adapters, members)
    return Layout(tuple(_row(member, spec, rank, init) for member, rank in zip(members, ranks, strict=True)))


def layout_of_bands(bands: Sequence[BandSection], spec: ModelSpec) -> Layout:
    """As `build_layout`, for bands that share no schedule."""
    members = _members(bands, spec)
    ranks = _own_ranks(bands, members)
    return Layout(tuple(_row(member, spec, rank, None) for member, rank in zip(members, ranks, strict=True)))


def _members(bands: Sequence[BandSection], spec: ModelSpec) -> list[_Member]:
    """Every module that a band names, in the order of the layers."""
    owner: dict[str, str] = {}
    members: list[_Member] = []
    for band in bands:
        with found_at("adapters", band.band, "layers"):
            layers = parse_layers(band.layers, spec.num_layers, band.band)
        with found_at("adapters", band.band, "target_modules"):
            linears = match_targets(band, spec)
        for layer in layers:
            for linear in linears:
                module = spec.module_name(layer, linear)
                if module in owner:
                    raise LayoutError(
                        f"bands {owner[module]!r} and {band.band!r} both claim {module}",
                        hint="a module belongs to one band: make the layers or the target_modules disjoint",
                        at=("adapters", band.band),
                    )
                owner[module] = band.band
                members.append(_Member(band, layer, linear))
    order = {linear.name: index for index, linear in enumerate(spec.linears)}
    members.sort(key=lambda member: (member.layer, order[member.linear.name]))
    return members


@dataclass(frozen=True)
class _Member:
    """A linear of a layer, and the band that has it."""

    band: BandSection
    layer: int
    linear: Linear

    @property
    def cost(self) -> int:
        """Parameters of one rank."""
        return self.linear.in_features + self.linear.out_features

    def place(self, limits: BudgetSection) -> Place:
        """As what a schedule reckons with."""
        highest = largest_rank(self.band, self.linear)
        if limits.max_rank is not None:
            highest = min(highest, limits.max_rank)
        lowest = limits.min_rank or 1
        if lowest > highest:
            raise LayoutError(
                f"min_rank {lowest} is above {highest}, the largest rank of {self.linear.target}",
                at=("min_rank",),
            )
        return Place(self.layer, self.linear.target, self.cost, lowest, highest)


def _own_ranks(bands: Sequence[BandSection], members: list[_Member]) -> list[int]:
    """The rank of every member by its band alone; AdaLoRA's at the end."""
    ranks = [member.band.rank for member in members]
    for band in bands:
        if band.schedule is not None:
            own = [index for index, member in enumerate(members) if member.band is band]
            with found_at("adapters", band.band, "schedule"):
                found = _scheduled(band.schedule, band.schedule, [members[index] for index in own], None)
            for index, rank in zip(own, found, strict=True):
                ranks[index] = rank
    return ranks


def _scheduled(
    schedule: ScheduleSection, limits: BudgetSection, members: list[_Member], budget: int | None
) -> list[int]:
    if budget is None:
        budget = sum(member.band.rank * member.cost for member in members)
    places = [member.place(limits) for member in members]
    if limits.budget is not None:
        _require_room(places, limits.budget)
    return scheduled_ranks(schedule, places, budget)


def _require_room(places: Sequence[Place], budget: int) -> None:
    most = sum(place.highest * place.cost for place in places)
    if budget >= most + max(place.cost for place in places):
        raise LayoutError(
            f"a budget of {budget:,} parameters is above what the largest ranks cost: {most:,} for "
            f"{len(places)} modules",
            hint=f"give at most {most:,}, raise max_rank, or adapt more modules",
        )


def largest_rank(band: BandSection, linear: Linear) -> int:
    """The largest rank whose matrices are no larger than the weight; AdaLoRA's at the end."""
    side = min(linear.in_features, linear.out_features)
    if band.kind != "adalora":
        return side
    return max(1, bisect.bisect_right(range(1, side + 1), side, key=band.init_rank_of))


def parse_layers(text: str, num_layers: int, band: str) -> tuple[int, ...]:
    """The layers that `text` means: "0-9", "0,3,5-7", "30%-70%", "bottom", "middle", "top" or "all".

    Percentages and thirds cut the depth at round(p·L): neighbouring bands "0%-30%" and "30%-100%" meet
    without a gap or an overlap. A range of numbers includes its end.

    Raises:
        LayoutError: not one of these forms, out of range, or empty; the message names `band`.
    """
    word = text.strip().lower()
    if word == "all":
        return tuple(range(num_layers))
    if word in _THIRDS:
        start, end = (round(num_layers * third / 3) for third in _THIRDS[word])
        return _not_empty(range(start, end), text, num_layers, band)
    percent = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%\s*-\s*([0-9]+(?:\.[0-9]+)?)%", word)
    if percent:
        low, high = float(percent[1]), float(percent[2])
        if not low < high <= 100:
            raise LayoutError(f"band {band!r}: {text!r} must rise and end at 100% or below")
        cut = [math.floor(num_layers * p / 100 + 0.5) for p in (low, high)]
        return _not_empty(range(*cut), text, num_layers, band)
    layers: list[int] = []
    for part in word.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:\s*-\s*([0-9]+))?\s*", part)
        if match is None:
            nearest = difflib.get_close_matches(word, [*_THIRDS, "all"], n=1)
            raise LayoutError(
                f"band {band!r}: {text!r} does not name layers",
                hint=f"did you mean {nearest[0]!r}?"
                if nearest
                else "write 0-9, 0,3,5-7, 30%-70%, bottom, middle, top or all",
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise LayoutError(f"band {band!r}: {part.strip()!r} runs backwards")
        if last >= num_layers:
            raise LayoutError(
                f"band {band!r}: layer {last} is out of range",
                hint=f"the model has {num_layers} layers, 0 to {num_layers - 1}",
            )
        layers.extend(range(first, last + 1))
    if len(set(layers)) < len(layers):
        raise LayoutError(f"band {band!r}: {text!r} names a layer twice")
    return tuple(sorted(layers))


def _not_empty(layers: range, text: str, num_layers: int, band: str) -> tuple[int, ...]:
    if not layers:
        raise LayoutError(f"band {band!r}: {text!r} of {num_layers} layers is no layer at all")
    return tuple(layers)


def match_targets(band: BandSection, spec: ModelSpec) -> tuple[Linear, ...]:
    """The linears of a layer that the band's target_modules name.

    A target is "all-linear", "attention", "mlp", a module's name ("q_proj", "self_attn.q_proj"), or
    "re:" and a regular expression for the whole name below the layer.

    Raises:
        LayoutError: a target that matches no linear of the model; the message names the band.
    """
    chosen: set[str] = set()
    for target in band.target_modules:
        matched = [linear.name for linear in spec.linears if _matches(target, linear)]
        if not matched:
            known = [linear.target for linear in spec.linears]
            nearest = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
            raise LayoutError(
                f"band {band.band!r}: target_modules {target!r} matches no linear module",
                hint=(f"did you mean {nearest[0]!r}? " if nearest else "")
                + f"this model has {', '.join(known)} (or: all-linear, attention, mlp)",
            )
        chosen.update(matched)
    return tuple(linear for linear in spec.linears if linear.name in chosen)


def _matches(target: str, linear: Linear) -> bool:
    if target in ("all-linear", "all"):
        return True
    if target == "attention":
        return linear.name.startswith("self_attn.")
    if target == "mlp":
        return linear.name.startswith("mlp.")
    if target.startswith("re:"):
        return re.fullmatch(target[3:], linear.name) is not None
    return target in (linear.name, linear.target)


def _row(member: _Member, spec: ModelSpec, target_rank: int, init: str | None) -> LayoutRow:
    band, layer, linear = member.band, member.layer, member.linear
    rank, alpha = band.init_rank_of(target_rank), band.alpha_of(target_rank)
    largest = min(linear.in_features, linear.out_features)
    if rank > largest:
        raise LayoutError(
            f"band {band.band!r}: rank {rank} is above {largest}, the smaller side of {linear.target} "
            f"({linear.out_features} x {linear.in_features})",
            hint=f"choose a rank of at most {largest}",
            at=("adapters", band.band, "rank"),
        )
    return LayoutRow(
        module=spec.module_name(layer, linear),
        layer=layer,
        target=linear.target,
        in_features=linear.in_features,
        out_features=linear.out_features,
        band=band.band,
        kind=band.kind,
        rank=rank,
        target_rank=target_rank,
        alpha=alpha,
        scaling=scaling(band.kind, alpha, rank),
        dropout=band.dropout,
        init="adalora" if band.kind == "adalora" else init or band.init or "kaiming",
        loraplus_lr_ratio=band.loraplus_lr_ratio,
        lr_ratio=band.lr_ratio,
    )


def with_rank(row: LayoutRow, band: BandSection, rank: int) -> LayoutRow:
    """The row of a module with another rank, at the alpha that its band gives that rank."""
    alpha = band.alpha_of(rank)
    return replace(row, rank=rank, target_rank=rank, alpha=alpha, scaling=scaling(row.kind, alpha, rank))


def scaling(kind: str, alpha: float, rank: int) -> float:
    """s in W + s·B·A: alpha/r, and alpha/sqrt(r) for rsLoRA (arXiv 2312.03732).

    AdaLoRA divides by the initial rank all through the run, so that pruning leaves the function alone.
    """
    return alpha / math.sqrt(rank) if kind == "rslora" else alpha / rank
