"""The base model on the meta device: the module tree and the dtypes of `base.load`, without any weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from qhybrid.base.load import build_shell
from qhybrid.base.nf4 import ABSMAX_BLOCK_SIZE, BLOCK_SIZE
from qhybrid.errors import ModelError
from qhybrid.recipe.schema import Recipe


def meta_base(recipe: Recipe, config: dict[str, Any]) -> PreTrainedModel:
    """The recipe's base model as `load_base` gives it, with meta tensors for its weights.

    Args:
        config: the content of the model's config.json.

    Raises:
        ModelError: transformers cannot build a model of this configuration.
    """
    values = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        built = AutoConfig.for_model(config["model_type"], **values)
    except Exception as error:  # each configuration class checks its own values, and raises what it likes
        raise ModelError(f"not a valid {config.get('model_type')} configuration: {error}") from error
    built.dtype = getattr(torch, recipe.model.dtype)
    eager = recipe.model.attn_implementation == "eager"
    built._attn_implementation = "eager" if eager else "sdpa"  # `stand_ins` puts the right kernel behind it
    shell, quantizer = build_shell(built, recipe.model, recipe.quantization, torch.device("cpu"))
    for module in shell.modules():
        if isinstance(module, Linear4bit):
            _fill(module, built.dtype)
    shell.tie_weights()
    shell.eval()
    shell.requires_grad_(False)
    if quantizer is not None:
        shell.hf_quantizer = quantizer
        quantizer.postprocess_model(shell)
    return shell


def tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a model holds, with its name: parameters, buffers and the states of NF4 weights."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            nested = (state.offset, state.state2.absmax, state.state2.code) if state.nested else ()
            for part in (state.absmax, state.code, *nested):
                yield f"{name}.quant_state", part


def _fill(module: Linear4bit, dtype: torch.dtype) -> None:
    """As `base.nf4.fill_linear4bit`, for the shapes alone."""
    placeholder = module.weight
    num_weights = module.in_features * module.out_features
    num_blocks = -(-num_weights // BLOCK_SIZE)
    state = QuantState(
        absmax=torch.empty(num_blocks, device="meta"),
        shape=torch.Size((module.out_features, module.in_features)),
        dtype=dtype,
        blocksize=BLOCK_SIZE,
        code=torch.empty(16, device="meta"),
        quant_type="nf4",
    )
    if placeholder.compress_statistics:
        state.absmax = torch.empty(num_blocks, dtype=torch.uint8, device="meta")
        state.offset = torch.empty((), device="meta")
        state.state2 = QuantState(
            absmax=torch.empty(-(-num_blocks // ABSMAX_BLOCK_SIZE), device="meta"),
            code=torch.empty(256, device="meta"),
            blocksize=ABSMAX_BLOCK_SIZE,
            dtype=torch.float32,
        )
        state.nested = True
    module.weight = Params4bit(
        torch.empty(((num_weights + 1) // 2, 1), dtype=torch.uint8, device="meta"),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK_SIZE,
        compress_statistics=placeholder.compress_statistics,
        quant_type="nf4",
        quant_storage=placeholder.quant_storage,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state
