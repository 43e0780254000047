"""How a recipe's micro-batch goes through a model: its shape, its dtypes, its kernels, what is recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qhybrid.architecture.bands import parse_layers
from qhybrid.architecture.spec import ModelSpec
from qhybrid.errors import LayoutError
from qhybrid.recipe.schema import Recipe, checkpointing_settings

Device = Literal["cuda", "cpu"]
Attention = Literal["flash", "efficient", "eager", "cpu"]
Loss = Literal["chunked", "full"]
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes
_UNKNOWN_LENGTH = 1024  # tokens of a row where neither the recipe nor the model says


@dataclass(frozen=True)
class Pass:
    """How one micro-batch goes through a layer."""

    batch: int  # rows
    length: int  # tokens of a row, padding included
    width: int  # bytes of an activation and of an unquantised weight
    adapter_width: int  # bytes of an adapter's value
    autocast: bool  # fp32 adapters are rounded for the products
    nf4: bool
    nested: bool  # double quantisation
    attention: Attention
    masked: bool  # an attention mask is built
    device: Literal["cuda", "cpu"]
    fused_layers: bool = False  # Liger's kernels for norms, rotary embedding and MLP

    @property
    def tokens(self) -> int:
        return self.batch * self.length


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
        every = checkpointing_settings(recipe.training).get("every_n_layers", 1)
        return frozenset(range(0, num_layers, every if isinstance(every, int) and every > 0 else 1))
    layers: set[int] = set()
    bands = {band.band: band.layers for band in recipe.adapters}
    for word in named.split("+"):
        text = bands.get(word.strip(), word)
        try:
            layers.update(parse_layers(text, num_layers, word.strip()))
        except LayoutError as error:
            message = error.message.replace(f"band {word.strip()!r}: ", "")
            known = f"; or a band: {', '.join(bands)}"
            raise LayoutError(
                f"memory.checkpoint_layers: {message}",
                hint=(error.hint or "layers") + known,
                at=("memory", "checkpoint_layers"),
            ) from None
    return frozenset(layers)


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
        adapter_width=WIDTHS[recipe.adapter_dtype],
        autocast=width < WIDTHS["float32"] and training.bf16 is not False,
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


def assumptions_of(recipe: Recipe, spec: ModelSpec, optimizer_known: bool) -> tuple[str, ...]:
    """What the plan takes for granted, or leaves out."""
    found = []
    if recipe.training.max_length is None:
        found.append(f"training.max_length is not given: rows of {row_length(recipe, spec)} tokens are assumed")
    if recipe.training.activation_offloading or checkpointing_settings(recipe.training).get("offload"):
        found.append("activations are counted on the GPU, although the recipe moves them to the host")
    if recipe.training.torch_compile:
        found.append("torch.compile is not modelled: the plan is that of the eager model")
    if recipe.training.neftune_noise_alpha is not None:
        found.append("NEFTune's noise is not counted")
    if not optimizer_known:
        found.append(f"the states of {recipe.training.optim} are not known: two fp32 values are assumed")
    return tuple(found)
