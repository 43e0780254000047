"""The parts of a training step, and the most that is alive in each of them beside what always is."""

from __future__ import annotations

from dataclasses import dataclass

from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import ModelSpec
from qhybrid.planner.decoder import Adapter, layer_cost
from qhybrid.planner.head import head_cost
from qhybrid.planner.holdings import parameters_of
from qhybrid.planner.workload import Loss, Pass, checkpointed_layers, loss_of
from qhybrid.recipe.schema import Recipe

_TOKEN = 8  # bytes of a token's number, a label and a mask's entry


@dataclass(frozen=True)
class Gradients:
    """The gradients of the adapters, in bytes."""

    before: int  # there before the backward pass: of earlier micro-batches
    after: int  # at its end
    passing: dict[str, int]  # what else the forward and backward pass of several processes take
    by_layer: bool  # they come one layer after the other


def _adapters_by_layer(layout: Layout) -> dict[int, dict[str, Adapter]]:
    layers: dict[int, dict[str, Adapter]] = {}
    for row in layout:
        name = row.module.split(".", 3)[3]
        layers.setdefault(row.layer, {})[name] = Adapter(row.kind, row.rank, row.dropout > 0)
    return layers


def moments_of(
    recipe: Recipe, spec: ModelSpec, layout: Layout, how: Pass, gradients: Gradients
) -> dict[str, dict[str, int]]:
    """The parts of a step, and what is alive when each is at its most, beside what rests."""
    checkpointed = checkpointed_layers(recipe, spec.num_layers)
    adapters = _adapters_by_layer(layout)
    needs_grad = bool(checkpointed)  # the embeddings' output is then made to need a gradient
    costs = []
    loss = loss_of(recipe)
    for layer in range(spec.num_layers):
        own = tuple(sorted(adapters.get(layer, {}).items()))
        costs.append(layer_cost(spec, own, how, checkpointed=layer in checkpointed, input_needs_grad=needs_grad))
        needs_grad = needs_grad or bool(own)
    head = head_cost(spec, how, loss)
    by_layer = _gradients_by_layer(layout, how.adapter_width, spec.num_layers)
    shared, mask = shared_inputs(spec, how)

    candidates: list[tuple[int, str, dict[str, int]]] = []

    def consider(name: str, kept: int, checkpoints: int, working: int, weights: int, grads: int) -> None:
        what = "loss" if name.startswith("loss") else "working memory of a layer"
        parts = {
            "inputs": shared + (mask if checkpointed or not name.endswith("backward") else 0),
            "activations": kept,
            "checkpoints": checkpoints,
            what: working - weights,
            "dequantised weights": weights,
            "gradients": grads,
            **gradients.passing,
        }
        candidates.append((sum(parts.values()), name, parts))

    before = gradients.before
    kept = cached = 0
    # The embeddings' output is a leaf of the graph then, which keeps it beside what its layer keeps.
    is_kept_twice = 0 not in checkpointed or spec.family.embedding_scale
    checkpoints = how.tokens * spec.hidden_size * how.width if checkpointed and is_kept_twice else 0
    # Autocast keeps its copies of fp32 adapters to the end of the forward pass.
    copies = how.width / how.adapter_width if how.autocast and how.adapter_width > how.width else 0
    stack = []
    for layer, cost in enumerate(costs):
        consider("forward", kept + cached, checkpoints, cost.forward_peak, cost.forward_weights, before)
        stack.append((kept, checkpoints))
        if layer in checkpointed:
            checkpoints += cost.kept
            cached += int(by_layer[layer] * copies)
        else:
            kept += cost.kept
    consider("loss, forward", kept + cached, checkpoints, head.forward_peak, 0, before)
    if loss == "full":  # the batch is scored once more for the metrics, while everything is kept
        layer = max(costs, key=lambda cost: cost.forward_peak)
        peak, weights = layer.forward_peak, layer.forward_weights
        consider("second forward", kept + head.kept, checkpoints, peak, weights, before)
    consider("loss, backward", kept, checkpoints, head.backward_peak, 0, before)
    done = 0
    for layer in reversed(range(spec.num_layers)):
        cost = costs[layer]
        if not cost.backward_peak:
            break
        kept, checkpoints = stack[layer]
        grads = done + by_layer[layer] if gradients.by_layer else gradients.after
        consider("backward", kept, checkpoints, cost.backward_peak, cost.backward_weights, grads)
        done += by_layer[layer]
    moments: dict[str, dict[str, int]] = {}
    for total, name, parts in candidates:
        if name not in moments or total > sum(moments[name].values()):
            moments[name] = parts
    return moments


def _gradients_by_layer(layout: Layout, adapter_width: int, num_layers: int) -> list[int]:
    layers = [0] * num_layers
    for row in layout:
        layers[row.layer] += sum(size * width for size, width in parameters_of(row, adapter_width))
    return layers


def shared_inputs(spec: ModelSpec, how: Pass) -> tuple[int, int]:
    """What all layers share: token numbers, labels and rotary angles; and the attention mask."""
    tokens = 3 * _TOKEN * how.tokens
    angles = 2 * how.length * spec.head_dim * how.width
    mask = how.batch * how.length**2 if how.masked else 0
    if how.attention == "eager":
        mask = how.batch * how.length**2 * how.width
    return tokens + angles, mask * (2 if spec.family.alternates_windows else 1)


def evaluation_peak(spec: ModelSpec, layout: Layout, how: Pass, loss: Loss) -> int:
    """The most that is alive in a forward pass that keeps nothing."""
    adapters = _adapters_by_layer(layout)
    peaks = [
        layer_cost(
            spec, tuple(sorted(adapters.get(layer, {}).items())), how, checkpointed=True, input_needs_grad=True
        ).forward_peak
        for layer in range(spec.num_layers)
    ]
    return sum(shared_inputs(spec, how)) + max(*peaks, head_cost(spec, how, loss).forward_peak)
