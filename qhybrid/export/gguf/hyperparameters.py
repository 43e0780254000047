"""A model's hyperparameters as llama.cpp reads them, and what of a configuration it cannot do."""

from __future__ import annotations

import math
from typing import Any

import gguf
import torch
from torch import Tensor

from qhybrid.errors import ExportError
from qhybrid.export.gguf.names import CONVERTER, GgufNames

# transformers' defaults of YaRN, which are llama.cpp's too.
_YARN_AS_IN_THE_PAPER = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


def add_hyperparameters(writer: gguf.GGUFWriter, names: GgufNames) -> None:
    """Write the sizes, the rotary embedding and the family's own numbers into the metadata.

    Raises:
        ExportError: the configuration asks for what llama.cpp computes otherwise.
    """
    config = names.config
    _require_plain(names)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(names.head_dim)
    writer.add_value_length(names.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(names.head_dim)
    _add_rope(writer, config.rope_parameters)
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    elif config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)


def notes_on(names: GgufNames) -> list[str]:
    """Where llama.cpp will compute otherwise than transformers, in words for the user."""
    window = getattr(names.config, "sliding_window", None)
    if names.config.model_type == "mistral" and window and window < names.config.max_position_embeddings:
        return [f"attention looks back {window} tokens here; llama.cpp looks at all of a longer context"]
    return []


def _require_plain(names: GgufNames) -> None:
    config = names.config

    def refuse(what: str) -> ExportError:
        return ExportError(f"{what}, which llama.cpp is not proven to compute the same", hint=CONVERTER)

    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in (names.family.activation, {"silu": "swish"}.get(names.family.activation)):
        raise refuse(f"the activation is {activation}")
    layers = getattr(config, "layer_types", None) or ()
    if config.model_type in ("qwen2", "qwen3", "smollm3", "olmo2") and "sliding_attention" in layers:
        raise refuse("some layers have a sliding window")
    if config.model_type == "gemma2":
        alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(len(layers))]
        if list(layers) != alternating or config.query_pre_attn_scalar != names.head_dim:
            raise refuse("its windows or its attention scale are not those of Gemma 2 2B and 9B")
        if not config.attn_logit_softcapping or not config.final_logit_softcapping:
            raise refuse("it has no soft caps")
    if config.model_type == "smollm3" and list(config.no_rope_layers) != [
        int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)
    ]:
        raise refuse("not every fourth layer is without rotary embedding")
    if config.rope_parameters.get("partial_rotary_factor", 1) != 1:
        raise refuse("only a part of each head is rotated")


def _add_rope(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        factor = float(rope["factor"])
        usual = {**_YARN_AS_IN_THE_PAPER, "attention_factor": 0.1 * math.log(factor) + 1}
        unusual = [key for key, value in usual.items() if rope.get(key, value) not in (value, None)]
        unusual += [key for key in ("mscale", "mscale_all_dim") if rope.get(key)]
        if unusual:
            raise ExportError(
                f"its YaRN sets {unusual[0]}, which llama.cpp is not proven to compute the same", hint=CONVERTER
            )
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind not in ("default", "llama3"):
        raise ExportError(
            f"its rotary embedding is scaled by {kind!r}, which llama.cpp is not proven to compute the same",
            hint=CONVERTER,
        )


def rope_divisors(names: GgufNames) -> Tensor | None:
    """By what Llama 3.1 divides the frequency of each pair (head_dim / 2,), in fp32; None for other scalings.

    Wavelengths beyond original/low_freq_factor tokens are stretched by `factor`, those below
    original/high_freq_factor not at all, and those between in proportion to original/wavelength
    (transformers, `_compute_llama3_parameters`).
    """
    rope = names.config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    exponents = torch.arange(0, names.head_dim, 2, dtype=torch.float64) / names.head_dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    turns = float(rope["original_max_position_embeddings"]) / wavelengths
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / factor)).float()
