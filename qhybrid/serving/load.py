"""Loads what is served: the base model once, and every adapter beside the others, all of the same base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel

from qhybrid.adapters.attach import attach_plain
from qhybrid.adapters.folder import read_plain
from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.plain import PlainAdapter, require_untouched_base
from qhybrid.architecture.layout import first_fault
from qhybrid.base.fingerprint import config_hash
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.base.locate import model_folder
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.errors import AdapterError, ModelError, ServingError
from qhybrid.evaluation.models import sections_of, tokenizer_of
from qhybrid.recipe.schema import ModelSection, QuantizationSection
from qhybrid.serving.engine import BASE, Engine, ServedModel
from qhybrid.serving.names import base_name
from qhybrid.serving.prompts import Prompter

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class BaseChoice:
    """What the user says of the base model; what is left out, the first adapter says.

    Attributes:
        path: where it lies.
        max_context: the most tokens of a prompt and its answer.
    """

    path: str | None = None
    quantization: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    max_context: int | None = None


def load_engine(adapters: Sequence[tuple[str, Path]], choice: BaseChoice) -> Engine:
    """Load the base model once, and every adapter beside the others.

    A and B have the dtype that they were trained in, or fp32 where the base model is not in bf16: what is rounded
    in one adapter of a mixed batch would otherwise be rounded in all.

    Args:
        adapters: names and folders. The first says how the base model is loaded, where `choice` does not.

    Raises:
        AdapterError: an adapter that cannot be read, or belongs to another base model than the first.
        ModelError: the base model cannot be loaded, or lacks modules of an adapter.
        ServingError: the names or the context do not fit the base model.
    """
    read = [(name, read_plain(folder)) for name, folder in adapters]
    for name, plain in read:
        require_untouched_base(plain)
        _require_same_base(read[0], (name, plain), choice)
    section, quantization = _sections(read, choice)
    name_of_base = base_name(section.path)
    for name, plain in read:
        if name == name_of_base:
            raise ServingError(
                f"{name} is the name of the base model", hint=f"give the adapter another: NAME={plain.source}"
            )
    _require_trained_on(read, model_folder(section))
    model: PreTrainedModel | PeftModel = load_base(section, quantization)
    keep_exact_on_cpu(model)
    max_context = _max_context(model, choice.max_context)
    vocabulary = model.get_input_embeddings().num_embeddings
    device, own_ends = model.device, _ends(model)

    def served(name: str, adapter: str, prompter: Prompter) -> ServedModel:
        eos = prompter.tokenizer.eos_token_id
        ends = own_ends | ({eos} if eos is not None else set())
        return ServedModel(name, adapter, prompter, frozenset(ends), max_context, vocabulary, device)

    models, notes = [], []
    for number, (name, plain) in enumerate(read):
        info, adapter = plain.info, f"a{number}"
        prompter = Prompter(
            tokenizer_of(plain.source, section),
            chat_template=info.chat_template,
            system_prompt=info.system_prompt,
            date=info.date,
        )
        if plain.modules:
            dtype = getattr(torch, info.adapter_dtype if section.dtype == "bfloat16" else "float32")
            try:
                model = attach_plain(model, plain.modules, dtype=dtype, name=adapter)
            except ModelError as error:
                raise ModelError(error.message, hint=error.hint, where=str(plain.source)) from None
        models.append(served(name, adapter if plain.modules else BASE, prompter))
        if (info.quantization, info.dtype) != (quantization.method, section.dtype):
            notes.append(
                f"{name} was trained on a base in {_words(info.quantization, info.dtype)}, and is served on "
                f"one in {_words(quantization.method, section.dtype)}"
            )
    models.append(served(name_of_base, BASE, Prompter(load_tokenizer(section))))
    return Engine(model, models, notes)


def _sections(
    read: Sequence[tuple[str, PlainAdapter]], choice: BaseChoice
) -> tuple[ModelSection, QuantizationSection]:
    given = {"path": choice.path, "dtype": choice.dtype, "attn_implementation": choice.attn_implementation}
    given = {key: value for key, value in given.items() if value}
    values, method, double_quant = {}, "nf4", True
    if read:
        info = read[0][1].info
        section, nf4 = sections_of(info, read[0][1].source, choice.path, choice.attn_implementation)
        values, method, double_quant = section.model_dump(), nf4.method, nf4.double_quant
        values["adapter_dtype"] = None  # of the first adapter; each has its own
    elif not choice.path:
        raise ModelError("nothing to load", hint="name an adapter, or a base model with --base")
    try:
        return ModelSection.model_validate({**values, **given}), QuantizationSection.model_validate(
            {"method": choice.quantization or method, "double_quant": double_quant}
        )
    except ValidationError as error:  # a path with a null byte, say
        raise ModelError(f"the base model cannot be used: {first_fault(error)}") from None


def _require_same_base(
    first: tuple[str, PlainAdapter], other: tuple[str, PlainAdapter], choice: BaseChoice
) -> None:
    """Refuse an adapter of another base model: by the hashes of both where they have them, else by name."""
    one, two = first[1].info, other[1].info
    pairs: list[tuple[Any, Any]] = [(one.base_config_sha256, two.base_config_sha256)]
    if one.base_sha256 and two.base_sha256 and one.base_sha256.keys() == two.base_sha256.keys():
        pairs.append((one.base_sha256, two.base_sha256))
    known = [pair for pair in pairs if None not in pair]
    if not known and not choice.path:  # else the user says what the base model is
        known = [(one.base_model, two.base_model)]
    if any(left != right for left, right in known):
        raise AdapterError(
            f"{other[0]} belongs to another base model than {first[0]}: {_base_of(two)}, not {_base_of(one)}",
            where=str(other[1].source),
            hint="serve it with another process"
            if None not in pairs[-1]
            else "if they are the same model, --base says where it lies",
        )


def _base_of(info: AdapterInfo) -> str:
    return info.base_model or "one that it does not name"


def _require_trained_on(read: Sequence[tuple[str, PlainAdapter]], folder: Path) -> None:
    """Refuse a base model with another configuration than the adapters were trained on."""
    actual = config_hash(folder)
    for name, plain in read:
        if plain.info.base_config_sha256 not in (None, actual):
            raise AdapterError(
                f"{name} was trained on another model than {folder}: their configurations differ",
                where=str(plain.source),
                hint="--base names the model that it was trained on",
            )


def _max_context(model: PreTrainedModel, wanted: int | None) -> int:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT
    if wanted is not None and wanted > most:
        raise ServingError(f"the model has a context of {most} tokens", hint=f"lower --max-context {wanted}")
    return wanted or min(most, DEFAULT_CONTEXT)


def _ends(model: PreTrainedModel) -> set[int]:
    """The tokens at which the model's own settings end an answer."""
    told = getattr(model.generation_config, "eos_token_id", None)
    return set(told if isinstance(told, list) else [told]) - {None}


def _words(quantization: str, dtype: str) -> str:
    return f"NF4 and {dtype}" if quantization == "nf4" else dtype
