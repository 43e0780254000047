"""EVA: ranks and A from the variance of the modules' inputs (Paischer et al., arXiv 2410.07170).

A starts as the right singular vectors of a module's centred inputs, B at zero. Ranks go to the directions, of all
modules together, that explain the largest share of their module's variance.

The paper updates a truncated decomposition batch by batch until it stops moving. Here the covariance (in, in) of
all tokens is summed, which is exact, and its leading eigenvectors are taken; modules with one input (q, k and v;
gate and up) share it. Sums are fp32 on the model's device, for as many inputs at once as `memory` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qhybrid.architecture.layout import LayoutRow
from qhybrid.architecture.schedules import Place
from qhybrid.data.tokenize import EncodedRow
from qhybrid.evaluation.forward import batches, padded
from qhybrid.ranks.groups import in_groups
from qhybrid.ranks.observe import tapped_inputs

_FP32_BYTES = 4
MAX_SHARE = 2.0  # ρ of the paper: of the reference rank


@dataclass(frozen=True)
class Directions:
    """The leading directions of a module's inputs."""

    vectors: Tensor  # (k, in) fp32, orthonormal rows
    shares: Tensor  # (k,) fp64: of the inputs' variance, descending


class _Covariance:
    """Sums of one input: the count, the mean and the products of the deviations from it, all mergeable."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.products = torch.zeros(size, size, device=device)

    def add(self, x: Tensor) -> None:
        """Take x (tokens, in) in. Chan, Golub and LeVeque (1979): no difference of large sums is ever formed."""
        x = x.float()
        mean = x.mean(0, dtype=torch.float64)
        centred = x - mean.float()
        self.products.addmm_(centred.T, centred)
        total = self.count + len(x)
        apart = mean - self.mean
        share = self.count * len(x) / total
        self.products.add_(torch.outer(apart, apart).float(), alpha=share)
        self.mean += apart * (len(x) / total)
        self.count = total

    def directions(self, number: int) -> Directions:
        """The leading eigenvectors."""
        values, vectors = torch.linalg.eigh(self.products)
        values, vectors = values.flip(0)[:number].double(), vectors.flip(1)[:, :number].T
        total = self.products.diagonal().sum(dtype=torch.float64)
        return Directions(vectors.contiguous().cpu(), (values / total).clamp_min(0).cpu())


def input_directions(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    modules: Sequence[LayoutRow],
    largest: Mapping[str, int],
    *,
    batch_size: int,
    memory: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Directions]:
    """The directions of all modules, as many as `largest` says.

    Args:
        rows: all their tokens count, trained or not.
        memory: bytes for covariances; one is always taken.
        progress: told how many of how many forward passes over the rows are done.
    """
    leaders = _leaders(model, rows[0], [row.module for row in modules])
    followers: dict[str, list[str]] = {}
    for module, leader in leaders.items():
        followers.setdefault(leader, []).append(module)
    sizes = {row.module: row.in_features for row in modules if row.module in followers}
    groups = list(in_groups({name: size**2 * _FP32_BYTES for name, size in sizes.items()}, memory))
    found: dict[str, Directions] = {}
    for done, group in enumerate(groups):
        progress(done, len(groups))
        sums = {module: _Covariance(sizes[module], model.device) for module in group}
        with torch.no_grad():
            for batch in batches(rows, batch_size, model):
                ids, _, mask = (each.to(model.device) for each in padded(batch))
                real = mask.bool()

                def add(name: str, x: Tensor, sums=sums, real=real) -> None:
                    sums[name].add(x[real])

                with tapped_inputs(model, group, add):
                    model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        for module in group:
            directions = sums.pop(module).directions(max(largest[each] for each in followers[module]))
            for each in followers[module]:
                number = largest[each]
                found[each] = Directions(directions.vectors[:number], directions.shares[:number])
    progress(len(groups), len(groups))
    return found


def _leaders(model: PreTrainedModel, row: EncodedRow, modules: Sequence[str]) -> dict[str, str]:
    """For each module the first one that gets the very same input: q for k and v, gate for up."""
    leaders: dict[str, str] = {}
    last: list[tuple[Tensor, str]] = []  # holds the tensor, or another could come to lie where it was

    def note(name: str, x: Tensor) -> None:
        same = last and last[0][0].data_ptr() == x.data_ptr() and last[0][0].shape == x.shape
        leaders[name] = last[0][1] if same else name
        if not same:
            last[:] = [(x, name)]

    ids, _, mask = (each.to(model.device) for each in padded([row]))
    with torch.no_grad(), tapped_inputs(model, modules, note):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return leaders


def ranks_of_directions(directions: Sequence[Directions], places: Sequence[Place], budget: int) -> list[int]:
    """Take directions by their share of variance, the largest first, until the budget Σ r·(in + out) is spent.

    Every place has its lowest rank first; the paper counts directions instead of parameters, and may leave none.
    """
    ranks = [place.lowest for place in places]
    left = budget - sum(place.lowest * place.cost for place in places)
    wanted = sorted(
        (-float(share), index)
        for index, each in enumerate(directions)
        for share in each.shares[places[index].lowest : places[index].highest]
    )
    closed: set[int] = set()  # too dear by now, and its next directions explain less
    for _, index in wanted:
        if index in closed:
            continue
        if places[index].cost <= left:
            ranks[index] += 1
            left -= places[index].cost
        else:
            closed.add(index)
    return ranks
