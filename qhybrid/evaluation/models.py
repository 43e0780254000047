"""Loads what is to be evaluated: a base model, or an adapter on the base it was trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qhybrid.adapters.attach import attach, attach_plain
from qhybrid.adapters.folder import load_weights, read_plain, read_principal_parts
from qhybrid.adapters.info import INFO, AdapterInfo, read_adapter
from qhybrid.adapters.peft_folder import CONFIG as PEFT_CONFIG
from qhybrid.adapters.plain import require_untouched_base
from qhybrid.architecture.layout import first_fault
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.base.locate import refuse_links_out
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.errors import AdapterError
from qhybrid.recipe.schema import ModelSection, QuantizationSection


def load_base_for_inference(
    model: ModelSection, quantization: QuantizationSection
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model and its tokenizer, computing exactly as in training."""
    loaded = load_base(model, quantization)
    keep_exact_on_cpu(loaded)
    return loaded, load_tokenizer(model)


def load_adapter_for_inference(
    folder: Path, base: str | None = None, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, AdapterInfo]:
    """An adapter on its base model, the tokenizer that it was trained with, and what is known of it.

    Args:
        folder: an adapter folder of qhybrid, or what else `read_plain` reads.
        base: where the base model lies, if not where the adapter says.
        attn_implementation: another one than in training, say on a machine without flash attention.

    Raises:
        AdapterError: not an adapter, or its tensors do not fit its layout.
        ModelError: the base model cannot be loaded, or lacks modules of the layout; or a file of the adapter is a
            link to another place.
    """
    without = None
    if (folder / PEFT_CONFIG).is_file() and not (folder / INFO).is_file():
        plain = read_plain(folder)
        require_untouched_base(plain)
        info = plain.info
    else:
        plain = None
        if folder.is_dir():
            refuse_links_out(folder)
        layout, info = read_adapter(folder)
        without = read_principal_parts(folder, layout)
    section, quantization = sections_of(info, folder, base, attn_implementation)
    model = load_base(section, quantization, without=without)
    dtype = getattr(torch, info.adapter_dtype)
    if plain is None:
        model = attach(model, layout, dtype=dtype)
        load_weights(model, layout, folder)
        model.requires_grad_(False)
    else:
        model = attach_plain(model, plain.modules, dtype=dtype)
    return model.eval(), tokenizer_of(folder, section), info


def sections_of(
    info: AdapterInfo, folder: Path, base: str | None = None, attn_implementation: str | None = None
) -> tuple[ModelSection, QuantizationSection]:
    """How the base model of an adapter is loaded, in the words of a recipe.

    Args:
        folder: where the adapter lies, for messages.
        base, attn_implementation: as in `load_adapter_for_inference`.

    Raises:
        AdapterError: what the adapter says of its base model cannot be used.
    """
    if not base and not info.base_model:
        raise AdapterError(f"{folder} does not say what its base model is", hint="name it with --base")
    try:
        section = ModelSection.model_validate(
            {
                "path": base or info.base_model,
                "revision": None if base else info.base_revision,
                "dtype": info.dtype,
                "adapter_dtype": info.adapter_dtype,
                "attn_implementation": attn_implementation or info.attn_implementation,
            }
        )
    except ValidationError as error:  # a name with a null byte, say
        raise AdapterError(
            f"its base model cannot be used: {first_fault(error)}", where=str(folder / INFO)
        ) from None
    return section, QuantizationSection.model_validate(
        {"method": info.quantization, "double_quant": info.double_quant}
    )


def tokenizer_of(folder: Path, section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer that training saved beside the adapter, with the chat template and the end token that it used;
    the base model's where an adapter of other origin has none.
    """
    if (folder / "tokenizer_config.json").is_file():
        section = section.model_copy(update={"tokenizer": str(folder)})
    return load_tokenizer(section)
