"""The memory that a recipe takes, by component and moment, in closed form: no weights, no network, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from qhybrid.architecture.bands import parse_layers
from qhybrid.architecture.layout import Layout, LayoutRow
from qhybrid.architecture.spec import ModelSpec
from qhybrid.planner.decoder import Adapter, Attention, Pass, layer_cost
from qhybrid.planner.head import Loss, head_cost
from qhybrid.planner.optimizers import rule_of, state_bytes
from qhybrid.planner.tape import FP32
from qhybrid.recipe.schema import Recipe

Device = Literal["cuda", "cpu"]
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
_TOKEN = 8  # bytes of a token's number, a label and a mask's entry
_NF4_BLOCK, _SCALE_BLOCK = 64, 256  # weights of a scale, and scales of a second-level scale
_MIB = 2**20
_UNKNOWN_LENGTH = 1024  # tokens of a row where neither the recipe nor the model says


@dataclass(frozen=True)
class Prediction:
    """Bytes of one process's training, as torch's allocator counts them."""

    peak: int
    moment: str  # when the peak occurs
    components: dict[str, int]  # what is alive at the peak; they sum up to it
    moments: dict[str, int]  # the most that is alive in each part of a run
    bands: dict[str, int]  # of "adapters", by band
    unified: int  # paged optimizer states, which the driver moves between the GPU and the host
    assumptions: tuple[str, ...]


def checkpointed_layers(recipe: Recipe, num_layers: int) -> frozenset[int]:
    """The layers whose activations are computed a second time in the backward pass.

    Raises:
        LayoutError: memory.checkpoint_layers names no layers of the model.
    """
    training = recipe.training
    enabled = training.activation_checkpointing  # transformers' new name goes first
    if not (training.gradient_checkpointing if enabled is None else enabled):
        return frozenset()
    named = recipe.memory.checkpoint_layers
    if named is None:
        every = _checkpointing_settings(recipe).get("every_n_layers", 1)
        return frozenset(range(0, num_layers, every if isinstance(every, int) and every > 0 else 1))
    layers: set[int] = set()
    bands = {band.band: band.layers for band in recipe.adapters}
    for word in named.split("+"):
        text = bands.get(word.strip(), word)
        layers.update(parse_layers(text, num_layers, "memory.checkpoint_layers"))
    return frozenset(layers)


def _checkpointing_settings(recipe: Recipe) -> dict[str, Any]:
    training = recipe.training
    for given in (training.activation_checkpointing_kwargs, training.gradient_checkpointing_kwargs):
        if isinstance(given, dict):
            return given
    return {}


def row_length(recipe: Recipe, spec: ModelSpec, longest: int | None = None) -> int:
    """Tokens of the longest row that a batch can hold, padding included."""
    training = recipe.training
    length = longest or training.max_length or spec.max_position_embeddings or _UNKNOWN_LENGTH
    multiple = training.pad_to_multiple_of
    if isinstance(multiple, int) and multiple > 1:
        length = -(-length // multiple) * multiple
    return length


def how_it_runs(
    recipe: Recipe,
    spec: ModelSpec,
    device: Device,
    *,
    evaluating: bool = False,
    longest: int | None = None,
    padded: bool | None = None,
) -> Pass:
    """How a micro-batch of training, or of an evaluation, goes through the model."""
    training, model = recipe.training, recipe.model
    batch = training.per_device_eval_batch_size if evaluating else training.per_device_train_batch_size
    length = row_length(recipe, spec, longest)
    packing = training.packing if training.eval_packing is None or not evaluating else training.eval_packing
    one_row = training.padding_free or (packing and training.packing_strategy == "bfd")
    if padded is None:
        padded = batch > 1 and not packing
    if one_row:
        batch, length = 1, batch * length
    flash = model.attn_implementation.startswith("flash")
    windowed = spec.sliding_window is not None and length >= spec.sliding_window
    masked = not flash and (padded or one_row or windowed)
    attention: Attention = "eager"
    if model.attn_implementation != "eager":
        attention = "cpu" if device == "cpu" else ("efficient" if masked else "flash")
    width = WIDTHS[model.dtype]
    return Pass(
        batch=batch,
        length=length,
        width=width,
        adapter_width=WIDTHS[model.resolved_adapter_dtype],
        autocast=width < FP32 and training.bf16 is not False,
        nf4=recipe.quantization.method == "nf4",
        nested=recipe.quantization.double_quant,
        attention=attention,
        masked=masked,
        device=device,
        fused_layers=training.use_liger_kernel and device == "cuda",
    )


def loss_of(recipe: Recipe) -> Loss:
    """trl's chunked loss, or the full logits that label smoothing needs."""
    return "full" if recipe.training.label_smoothing_factor > 0 else "chunked"


def predict(
    recipe: Recipe,
    spec: ModelSpec,
    layout: Layout,
    *,
    device: Device = "cuda",
    longest: int | None = None,
    padded: bool | None = None,
) -> Prediction:
    """The memory of training `recipe`, whose layout on this model is `layout`, in one process.

    Args:
        device: whose kernels and rounding.
        longest: tokens of the longest row, where the data is known; training.max_length otherwise.
        padded: whether batches have padding; taken to be so for more than one row that is not packed.
    """
    rounding = 512 if device == "cuda" else 1
    how = how_it_runs(recipe, spec, device, longest=longest, padded=padded)
    base = base_weights(spec, nf4=how.nf4, nested=how.nested, width=how.width, rounding=rounding)
    trained = adapter_bytes(layout, how.adapter_width, rounding)
    optimizer = rule_of(recipe.training.optim)
    on_device, unified = _optimizer_states(layout, how.adapter_width, optimizer, rounding, device)
    gradients = sum(trained.values())
    static = {
        "base weights": base[0],
        "unquantised weights": base[1],
        "adapters": gradients,
        "optimizer states": on_device,
        "AdaLoRA scores": _scores(layout, rounding),
        "DoRA norms": _dora_norms(layout, rounding),
    }
    resting = sum(static.values())
    moments, parts = _moments(recipe, spec, layout, how, gradients)
    if recipe.training.eval_strategy != "no":
        evaluating = how_it_runs(recipe, spec, device, evaluating=True, longest=longest, padded=padded)
        peak = _evaluation(spec, layout, evaluating)
        moments["evaluation"] = peak
        parts["evaluation"] = {"activations": peak}
    copies = optimizer.copies_in_step if device == "cuda" else 0
    moments["optimizer step"] = gradients + copies * gradients
    parts["optimizer step"] = {"gradients": gradients, "optimizer's copies": copies * gradients}
    moment = max(moments, key=lambda name: moments[name])
    components = {**static, **parts[moment]}
    totals = {"model and states": resting, **{name: resting + peak for name, peak in moments.items()}}
    return Prediction(
        peak=resting + moments[moment],
        moment=moment,
        components={name: value for name, value in components.items() if value},
        moments=totals,
        bands=trained,
        unified=unified,
        assumptions=_assumptions(recipe, spec, optimizer.known),
    )


@lru_cache(maxsize=256)
def base_weights(spec: ModelSpec, *, nf4: bool, nested: bool, width: int, rounding: int) -> tuple[int, int]:
    """Bytes of the quantised linears with their scales, and of everything that is not quantised."""

    def rounded(num_bytes: float) -> int:
        return -(-int(num_bytes) // rounding) * rounding

    quantized = plain = 0
    for linear in spec.linears:
        num_weights = linear.in_features * linear.out_features
        if nf4:
            blocks = -(-num_weights // _NF4_BLOCK)
            scales = rounded(blocks * (1 if nested else FP32))
            if nested:  # second-level scales, their code of 256 values, and the offset
                scales += rounded(-(-blocks // _SCALE_BLOCK) * FP32) + rounded(256 * FP32) + rounded(FP32)
            quantized += rounded((num_weights + 1) // 2) + scales + rounded(16 * FP32)
        else:
            plain += rounded(num_weights * width)
        if linear.bias:
            plain += rounded(linear.out_features * width)
    quantized *= spec.num_layers
    plain *= spec.num_layers
    plain += rounded(spec.vocab_size * spec.hidden_size * width) * (1 if spec.tie_word_embeddings else 2)
    plain += spec.num_norm_parameters * width + 2 * rounded(spec.head_dim // 2 * FP32)
    return quantized, plain


def unsplit_remainders(spec: ModelSpec, *, nf4: bool, width: int) -> int:
    """What CUDA's allocator counts as allocated beyond the sizes of the base weights.

    From 10 MiB on a tensor gets a segment of its own, in steps of 2 MiB, and a remainder of up to 1 MiB is not
    split off (c10/cuda/CUDACachingAllocator.cpp, should_split).
    """
    sizes = []
    for linear in spec.linears:
        num_weights = linear.in_features * linear.out_features
        sizes += [(num_weights + 1) // 2 if nf4 else num_weights * width] * spec.num_layers
    sizes += [spec.vocab_size * spec.hidden_size * width] * (1 if spec.tie_word_embeddings else 2)
    total = 0
    for size in sizes:
        left = -size % (2 * _MIB)
        if size >= 10 * _MIB and left <= _MIB:
            total += left
    return total


def parameters_of(row: LayoutRow, adapter_width: int) -> list[tuple[int, int]]:
    """The trained tensors of one module: (number of values, bytes of one)."""
    tensors = [(row.rank * row.in_features, adapter_width), (row.rank * row.out_features, adapter_width)]
    if row.kind == "dora":
        tensors.append((row.out_features, FP32))
    elif row.kind == "adalora":
        tensors.append((row.rank, FP32))
    return tensors


def adapter_bytes(layout: Layout, adapter_width: int, rounding: int) -> dict[str, int]:
    """Bytes of the trained parameters, by band."""
    bands = dict.fromkeys(layout.bands, 0)
    for row in layout:
        for size, width in parameters_of(row, adapter_width):
            bands[row.band] += -(-size * width // rounding) * rounding
    return bands


def _optimizer_states(layout: Layout, adapter_width: int, rule, rounding: int, device: Device) -> tuple[int, int]:
    on_device = unified = 0
    for row in layout:
        for size, width in parameters_of(row, adapter_width):
            here, there = state_bytes(rule, size, width, rounding, on_cuda=device == "cuda")
            on_device += here
            unified += there
    return on_device, unified


def _scores(layout: Layout, rounding: int) -> int:
    """Importance and uncertainty in fp32 for every value of P, Q and Λ, and the masks."""
    total = 0
    for row in layout.of_kind("adalora"):
        for size, _ in parameters_of(row, FP32):
            total += 2 * (-(-size * FP32 // rounding) * rounding)
        total += -(-row.rank // rounding) * rounding
    return total


def _dora_norms(layout: Layout, rounding: int) -> int:
    """Row norms of W, and those of W + s·B·A that are kept until the next optimizer step, in fp32."""
    return sum(2 * (-(-row.out_features * FP32 // rounding) * rounding) for row in layout.of_kind("dora"))


def _adapters_by_layer(layout: Layout) -> dict[int, dict[str, Adapter]]:
    layers: dict[int, dict[str, Adapter]] = {}
    for row in layout:
        name = row.module.split(".", 3)[3]
        layers.setdefault(row.layer, {})[name] = Adapter(row.kind, row.rank, row.dropout > 0)
    return layers


def _moments(
    recipe: Recipe, spec: ModelSpec, layout: Layout, how: Pass, gradients: int
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """The most that is alive in each part of a step, beside what rests, and what it consists of."""
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
    accumulates = recipe.training.gradient_accumulation_steps > 1
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
        }
        candidates.append((sum(parts.values()), name, parts))

    before = gradients if accumulates else 0
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
        grads = before or done + by_layer[layer]
        consider("backward", kept, checkpoints, cost.backward_peak, cost.backward_weights, grads)
        done += by_layer[layer]
    moments: dict[str, int] = {}
    parts: dict[str, dict[str, int]] = {}
    for total, name, pieces in candidates:
        if total > moments.get(name, -1):
            moments[name], parts[name] = total, pieces
    return moments, parts


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
    return tokens + angles, mask


def _evaluation(spec: ModelSpec, layout: Layout, how: Pass) -> int:
    """The most that is alive in a forward pass that keeps nothing."""
    adapters = _adapters_by_layer(layout)
    peaks = [
        layer_cost(
            spec, tuple(sorted(adapters.get(layer, {}).items())), how, checkpointed=True, input_needs_grad=True
        ).forward_peak
        for layer in range(spec.num_layers)
    ]
    return sum(shared_inputs(spec, how)) + max(*peaks, head_cost(spec, how, "chunked").forward_peak)


def _assumptions(recipe: Recipe, spec: ModelSpec, optimizer_known: bool) -> tuple[str, ...]:
    found = []
    if recipe.training.max_length is None:
        found.append(f"training.max_length is not given: rows of {row_length(recipe, spec)} tokens are assumed")
    if recipe.training.activation_offloading or _checkpointing_settings(recipe).get("offload"):
        found.append("activations are counted on the GPU, although the recipe moves them to the host")
    if recipe.training.torch_compile:
        found.append("torch.compile is not modelled: the plan is that of the eager model")
    if recipe.training.neftune_noise_alpha is not None:
        found.append("NEFTune's noise is not counted")
    if not optimizer_known:
        found.append(f"the states of {recipe.training.optim} are not known: two fp32 values are assumed")
    return tuple(found)
